"""Upload the runs recorded while W&B was out of reach, and those that it was lost to half-way.

Needs a key and a server that answers; else it says so. wandb marks an uploaded run beside its file, and so is its
lineage marked, which needs what other runs made to be there first: a second call finds nothing to do, and goes on
where a first was killed. Runs still going on are left alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from proxytune.files import read_json, read_jsonl
from proxytune.tracking import mirror, server
from proxytune.tracking.plain import artifact_name
from proxytune.tracking.record import is_alive


def run(outputs: Path, dry_run: bool = False) -> int:
    """Upload every waiting run. Returns 1 if some wait still although the server answered, else 0."""
    runs = waiting(outputs)
    if not runs:
        print(f"W&B: no run waits under {outputs / 'wandb'}")
        return 0
    reason = "only a dry run" if dry_run else server.trouble()
    if reason:
        print(f"W&B: {len(runs)} {_runs(runs)} not uploaded ({reason})")
        print("\n".join(f"  {file.parent}" for file in runs))
        return 0
    _upload(outputs, [file for file in runs if not is_uploaded(file)])
    done = [file for file in runs if is_uploaded(file)]
    for file in done:
        _link(outputs, file)
    print(f"W&B: {len(done)} of {len(runs)} {_runs(runs)} uploaded to {server.base_url()}")
    return int(any(map(_waits, runs)))


def waiting(outputs: Path) -> list[Path]:
    """The files of runs that have ended and are not uploaded, or not to their end, or without their lineage: offline
    ones first, each by age."""
    files = sorted((outputs / "wandb").glob("offline-run-*/run-*.wandb"))
    online = sorted((outputs / "wandb").glob("run-*/run-*.wandb"))
    files += [file for file in online if _was_cut(_record_of(outputs, file)) and mirror.whole(file) > mirror.HEADER]
    return [file for file in files if _waits(file) and not is_alive(_record_of(outputs, file))]


def _was_cut(record: Path) -> bool:
    """Whether a run was online and ended, or was killed, before the server had all of it."""
    told = record / "run.json"
    return told.exists() and read_json(told).get("wandb", {}).get("uploaded") is False


def is_uploaded(file: Path) -> bool:
    return file.with_name(file.name + ".synced").exists()


def _linked(file: Path) -> Path:
    """The mark of an uploaded run whose lineage is told."""
    return file.with_name(file.name + ".linked")


def _waits(file: Path) -> bool:
    return not (is_uploaded(file) and _linked(file).exists())


def _runs(runs: Sequence[Path]) -> str:
    return "run" if len(runs) == 1 else "runs"


def _record_of(outputs: Path, file: Path) -> Path:
    return outputs / "runs" / file.stem.removeprefix("run-")


def _upload(outputs: Path, runs: Sequence[Path]) -> None:
    mirror.keep_under(outputs)
    if not runs:  # all were uploaded before, and wait for their lineage
        return
    for file in runs:
        os.truncate(
            file, mirror.whole(file)
        )  # wandb takes a file with a torn end for one that is not uploaded, for ever
    folders = [str(file.parent.absolute()) for file in runs]
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", *folders]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=False)


def _link(outputs: Path, file: Path) -> None:
    """Lineage of an uploaded run, from its record. What cannot be linked costs a line, and waits for the next sync."""
    record = _record_of(outputs, file)
    noted = record / "artifacts.jsonl"
    try:
        lines = read_jsonl(noted, grown=True) if noted.exists() else []
        used = [name for line in lines for name in ([line["name"]] if line["how"] == "used" else line["uses"])]
        where = read_json(record / "run.json").get("wandb", {}) if used else {}
        if "project" in where:
            path = "/".join(filter(None, (where["entity"], where["project"], record.name)))
            mirror.link(path, [artifact_name(name) for name in dict.fromkeys(used)])
        _linked(file).touch()
    except Exception as error:
        told = " ".join(str(error).split())
        print(f"W&B: {record.name} is uploaded, its lineage waits for the next sync: {told}", file=sys.stderr)
