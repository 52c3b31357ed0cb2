"""The mirror of a run in W&B: online where the server answers, else offline under `<outputs>/wandb`, for `make sync`.

Nothing here protects its caller: any exception out of wandb is the record's to catch (`record.Run`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from proxytune.settings import Tracker
from proxytune.tracking import server

START_SECONDS = 3.5  # for the probe and an online start, which waits for one answer more
INIT_SECONDS = 10.0  # for an offline start, which waits for wandb's own process alone
LINK_SECONDS = 5.0  # that a run's end waits for its artifacts, to put them into registries
FINISH_SECONDS = 30.0  # then the rest of an online run stays on disk
HEADER, BLOCK = 7, 1 << 15  # bytes; wandb's files are LevelDB logs after a header of its own
REGISTRIES = ("model", "dataset")  # the kinds that W&B keeps a registry for


def keep_under(outputs: Path) -> Path:
    """Make wandb write into `<outputs>/wandb` only. The user's own W&B settings are still read."""
    folder = outputs.absolute() / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["WANDB_DIR"] = str(folder.parent)
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"):
        os.environ[variable] = str(folder)
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", "5")  # a server lost half-way costs this much a question, not 19 s
    return folder


def open_mirror(tracker: Tracker, outputs: Path, *, run_id: str, **described: Any) -> Mirror | None:
    """Start the W&B run, never asking anything; `described` goes to `wandb.init`. None if WANDB_MODE is disabled."""
    mode = os.environ.get("WANDB_MODE", "online").lower()
    if mode == "disabled":
        return None
    folder = keep_under(outputs)
    options = dict(described, id=run_id, name=run_id, project=tracker.project, entity=tracker.entity, dir=folder.parent)
    if mode in ("offline", "dryrun"):
        reason = "WANDB_MODE says so"
    else:
        began, lost = time.monotonic(), _lost(server.base_url(), server.api_key())
        reason = lost[0] if lost else server.trouble()
        if reason is None:
            try:
                return Mirror(_init("online", options, START_SECONDS - (time.monotonic() - began)))
            except Exception as error:
                reason = f"it could not start: {' '.join(f'{type(error).__name__} {error}'.split())}"
                _forget()
        lost[:] = [reason]
    _tell(f"W&B is offline ({reason}): runs are kept in {folder}, `make sync` uploads them")
    return Mirror(_init("offline", options, INIT_SECONDS))


@functools.cache
def _lost(url: str, key: str | None) -> list[str]:
    """Why a run of this process could not use the server, once that was so: it costs the later ones no time."""
    return []


def _init(mode: Literal["online", "offline"], options: dict[str, Any], seconds: float) -> Any:
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=seconds,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
        disable_git=True,  # the record knows the commit of this code; wandb would find that of the current folder
        disable_code=True,
        save_code=False,
    )
    wandb.setup(wandb.Settings(silent=True))
    return wandb.init(mode=mode, reinit="finish_previous", settings=settings, **options)


def _forget() -> None:
    """End wandb's own process: it writes until then, and after a failed online start it refuses an offline one."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):  # it would leave with the other process's exit code
        wandb.teardown()


@functools.cache
def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Mirror:
    def __init__(self, run: Any):
        self.run = run
        self.mode = "offline" if run.offline else "online"
        self._uses: dict[tuple[str, str | None], dict[str, Any]] = {}
        self._registered: list[tuple[Any, str]] = []  # artifacts, and where in a registry they belong
        # W&B drops rows whose step goes back; our own step is an axis like any other, so nothing is dropped.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, Any]) -> None:
        self.run.log(dict(values))

    def summary(self, values: Mapping[str, Any]) -> None:
        self.run.summary.update(dict(values))

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        self.run.log({name: _table(columns, rows)})

    def curve(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str) -> None:
        import wandb

        self.run.log({name: wandb.plot.line(_table(columns, rows), columns[0], columns[1], title=title)})

    def image(self, name: str, path: Path) -> None:
        import wandb

        self.run.log({name: wandb.Image(str(path))})

    def artifact(self, name: str, alias: str | None, kind: str, path: Path, metadata: dict[str, Any]) -> None:
        """Declare files by reference: nothing is copied or uploaded, their hashes and lineage are."""
        import wandb

        artifact = wandb.Artifact(name, type=kind, metadata=metadata)
        artifact.add_reference(path.absolute().as_uri())
        logged = self.run.log_artifact(artifact, aliases=["latest", alias] if alias else ["latest"])
        if self.mode == "online" and kind in REGISTRIES:
            self._registered.append((logged, f"wandb-registry-{kind}/{name}"))

    def use(self, name: str, alias: str | None, **told: Any) -> None:
        """Lineage. Offline there is nothing to point at yet: the config says it, and `link` does it after upload."""
        if (name, alias) in self._uses:
            return
        self._uses[name, alias] = {"name": name, "alias": alias, **told}
        self.run.config.update({"uses": list(self._uses.values())}, allow_val_change=True)
        if self.mode == "online":
            with contextlib.suppress(Exception):  # never logged to this server: the config still says it
                self.run.use_artifact(f"{name}:{alias or 'latest'}")

    def finish(self, exit_code: int) -> None:
        """OSError where the server did not take all of an online run, or the disk not all of an offline one."""
        folder = Path(self.run.dir).parent
        self._register()
        try:
            self.run.finish(exit_code=exit_code)
            if self.mode == "online" and _refused(folder):
                raise ConnectionError("the server refused the rest of the run")
        except OSError:  # TimeoutError is one
            _tell(f"W&B did not take all of a run, which is kept in {folder}: `make sync` uploads it")
            raise
        if self.mode == "offline":
            _forget()
            written = list(folder.glob("run-*.wandb"))
            if not written or not all(is_whole(file) for file in written):
                _tell(f"W&B could not write all of a run to {folder}: is the disk full? Its record is whole")
                raise OSError(f"the end of the run is missing in {folder}")

    def _register(self) -> None:
        """Put models and datasets into their registries: only now, since that waits for what is being uploaded."""
        until = time.monotonic() + LINK_SECONDS
        for logged, place in self._registered:
            with contextlib.suppress(Exception):  # a server without registries is none the worse
                logged.wait(timeout=max(0.1, until - time.monotonic()))
                self.run.link_artifact(logged, place)


def _refused(folder: Path) -> bool:
    """wandb tells only its own log that a server refused a run's lines; a server that is away runs into the timeout."""
    log = folder / "logs" / "debug-internal.log"
    return log.exists() and "filestream: fatal error" in log.read_text("utf-8", "replace")


def whole(file: Path) -> int:
    """Bytes up to the end of the last whole record: what a kill or a full disk cut off lies behind it."""
    return max((end for end, _ in _records(file)), default=HEADER)


def is_whole(file: Path) -> bool:
    """Whether nothing was cut off: a disk can be full just where a record ends, so the run's end must be there too."""
    from wandb.proto.wandb_internal_pb2 import Record  # ty: ignore[missing-module-member]

    records = list(_records(file))
    told_end = any(Record.FromString(record).HasField("exit") for _, record in records)
    return told_end and records[-1][0] == file.stat().st_size


def _records(file: Path) -> Iterator[tuple[int, bytes]]:
    """Each whole record of a run's file, and where it ends."""
    data, place, record = file.read_bytes(), HEADER, b""
    while True:
        if (left := BLOCK - place % BLOCK) < HEADER:  # of a part as well: checksum, length, kind
            place += left
        if place + HEADER > len(data):
            return
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if place <= len(data) and kind in (1, 4):  # a record in one part, or its last one
            yield place, record
            record = b""


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)


def link(run_path: str, uses: Iterable[tuple[str, str | None]]) -> int:
    """Join an uploaded run (`project/id`) to the artifacts that it used, but for those that this server never got.

    Returns how many were found.
    """
    import wandb

    api = wandb.Api(timeout=10)
    run, linked = api.run(run_path), 0
    for name, alias in uses:
        path = f"{run_path.rpartition('/')[0]}/{name}:{alias or 'latest'}"
        if api.artifact_exists(path):
            run.use_artifact(api.artifact(path))
            linked += 1
    return linked
