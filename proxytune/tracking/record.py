"""The record of a run: a folder of plain JSON under `outputs/runs/`, readable with any tool and true after a kill.

    run.json         stage, status (running, finished, failed, interrupted), times, command, code, summary, warnings
    config.json      the resolved settings
    metrics.jsonl    one line per `log`, flushed; locked while the run lives
    artifacts.jsonl  what the run made and used
    tables/ images/

With tracker `none` only run.json is written. Numbers that JSON cannot hold (nan, inf) become null.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import json
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import proxytune
from proxytune.errors import INTERRUPTED, ProxytuneError
from proxytune.files import told, write_json, write_jsonl
from proxytune.settings import Tracker
from proxytune.tracking import mirror
from proxytune.tracking.plain import artifact_name, plain, safe_name, without_dots

EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": INTERRUPTED}


@functools.cache
def code_version() -> dict[str, str | None]:
    """`version` of the package and `commit` of its checkout (`+dirty` if tracked files differ); None outside one."""
    checkout = Path(proxytune.__file__).resolve().parents[1]
    describe = ("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+dirty")
    commit = None
    # Without this look, a package installed inside somebody's repository would take that one's commit.
    if (checkout / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            git = ["git", "--no-optional-locks", "-C", str(checkout), *describe]
            commit = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip() or None
    return {"version": proxytune.__version__, "commit": commit}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def start(
    tracker: Tracker,
    outputs: Path,
    *,
    stage: str,
    task: str,
    family: str,
    config: Mapping[str, Any],
    command: str,
    tags: Sequence[str] = (),
    group: str | None = None,
) -> Generator[Run]:
    """One run of a stage. However the block ends, the record says how, and the mirror is closed."""
    described = {
        "stage": stage,
        "task": task,
        "family": family,
        "group": tracker.group or group,
        "tags": [tag[:64] for tag in dict.fromkeys([task, family, *tags, *tracker.tags]) if tag],
        "command": command,
        **code_version(),
    }
    run = Run(tracker, outputs, described, plain(config))
    try:
        yield run
    except KeyboardInterrupt:
        run.close("interrupted")
        raise
    except BaseException as error:
        run.close("failed", str(error) if isinstance(error, ProxytuneError) else f"{type(error).__name__}: {error}")
        raise
    run.close("finished")


class Run:
    """A run under way. `folder` is there with every tracker, for the results of the stage."""

    def __init__(self, tracker: Tracker, outputs: Path, described: dict[str, Any], config: dict[str, Any]):
        self.folder = _new_folder(outputs / "runs", described["stage"])
        self._told: dict[str, Any] = {
            **described,
            "status": "running",
            "started": _now(),
            "ended": None,
            "summary": {},
            "warnings": [],
        }
        self._write()
        self._clock = time.monotonic()
        self._keeps = tracker.name != "none"
        self._mirror: mirror.Mirror | None = None
        if self._keeps:
            write_json(self.folder / "config.json", config, checked=True)
            with told(self.folder / "metrics.jsonl"):
                self._metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
                fcntl.flock(self._metrics, fcntl.LOCK_EX)
        if tracker.name == "wandb":
            self._open_mirror(tracker, outputs, config)

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Measurements, at a step where they have one."""
        if not self._keeps:
            return
        line = plain({**({} if step is None else {"step": step}), **values})
        with told(self.folder / "metrics.jsonl"):
            self._metrics.write(json.dumps({**line, "seconds": round(time.monotonic() - self._clock, 3)}) + "\n")
            self._metrics.flush()
        self._mirrored(lambda other: other.log(line))

    def summary(self, values: Mapping[str, Any]) -> None:
        """The run's last word on these; kept under `summary` in run.json."""
        if self._keeps:
            self._told["summary"].update(plain(values))
            self._write()
            self._mirrored(lambda other: other.summary(plain(values)))

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        kept = self._keep_table(name, columns, rows)
        self._mirrored(lambda other: other.table(name, columns, kept))

    def curve(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str) -> None:
        """A table whose second column is drawn over its first."""
        kept = self._keep_table(name, columns, rows)
        self._mirrored(lambda other: other.curve(name, columns, kept, title))

    def image(self, name: str, path: Path) -> None:
        if self._keeps and not path.resolve().is_relative_to(self.folder.resolve()):
            target = self.folder / "images" / (safe_name(name) + path.suffix)
            with told(target):
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
        self._mirrored(lambda other: other.image(name, path))

    def artifact(
        self, name: str, kind: str, path: Path, metadata: Mapping[str, Any] | None = None, uses: Iterable[str] = ()
    ) -> None:
        """What this run made: a `model`, `dataset` or `result`, as `name` or `name@version`, made from `uses`."""
        uses, metadata = list(uses), plain(metadata or {})
        self._note_artifact("made", name, kind=kind, path=str(path.absolute()), metadata=metadata, uses=uses)
        for used in uses:
            self._mirrored(lambda other, used=used: other.use(*artifact_name(used)))
        self._mirrored(lambda other: other.artifact(*artifact_name(name), kind, path, metadata))

    def use(self, name: str, kind: str, metadata: Mapping[str, Any] | None = None) -> None:
        """What this run consumed, by the name it was made under."""
        metadata = plain(metadata or {})
        self._note_artifact("used", name, kind=kind, metadata=metadata)
        self._mirrored(lambda other: other.use(*artifact_name(name), kind=kind, metadata=without_dots(metadata)))

    def warn(self, text: str) -> None:
        """A line for the record that is nobody's error."""
        self._told["warnings"].append(" ".join(text.split()))
        self._write()

    def close(self, status: str, error: str | None = None) -> None:
        self._told.update(status=status, ended=_now(), **({"error": error} if error else {}))
        self._write()
        self._mirrored(lambda other: other.finish(EXIT_CODES[status]))
        if self._mirror and self._mirror.mode == "online":
            self._told["wandb"]["uploaded"] = True
            self._write()
        if self._keeps:
            self._metrics.close()

    def _write(self) -> None:
        write_json(self.folder / "run.json", self._told, checked=True)

    def _keep_table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[list[Any]]:
        kept = [plain(list(row)) for row in rows]
        if self._keeps:
            path = self.folder / "tables" / f"{safe_name(name)}.jsonl"
            write_jsonl(path, (dict(zip(columns, row, strict=True)) for row in kept))
        return kept

    def _note_artifact(self, how: str, name: str, **rest: Any) -> None:
        if self._keeps:
            path = self.folder / "artifacts.jsonl"
            with told(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"how": how, "name": name, **rest}) + "\n")

    def _open_mirror(self, tracker: Tracker, outputs: Path, config: dict[str, Any]) -> None:
        known = {key: self._told[key] for key in ("stage", "task", "family", "command", "version", "commit")}
        described = {
            "run_id": self.folder.name,
            "group": self._told["group"],
            "job_type": self._told["stage"],
            "tags": self._told["tags"],
            "config": without_dots({**config, "run": known}),
        }
        try:
            self._mirror = mirror.open_mirror(tracker, outputs, **described)
        except Exception as error:
            self.warn(f"W&B could not start, this run has no mirror: {error}")
        if self._mirror:
            where: dict[str, Any] = {"mode": self._mirror.mode, "project": tracker.project, "entity": tracker.entity}
            if self._mirror.mode == "online":
                where["uploaded"] = False  # until it is: a run that is cut off waits for `make sync`
            self._told["wandb"] = where
            self._write()

    def _mirrored(self, do: Callable[[mirror.Mirror], None]) -> None:
        """Let the mirror follow; the first thing that goes wrong there switches it off and leaves a warning."""
        if self._mirror is None:
            return
        try:
            do(self._mirror)
        except Exception as error:
            self._mirror = None
            self.warn(f"W&B failed, the mirror of this run stops here: {type(error).__name__}: {error}")


def _new_folder(runs: Path, stage: str) -> Path:
    with told(runs):
        while True:
            name = f"{safe_name(stage)}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
            with contextlib.suppress(FileExistsError):
                (runs / name).mkdir(parents=True)
                return runs / name


def is_alive(folder: Path) -> bool:
    """Whether the process of a run still goes on: the kernel frees its lock however it ended."""
    try:
        with (folder / "metrics.jsonl").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
