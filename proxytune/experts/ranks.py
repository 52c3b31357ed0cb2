"""What a rank, one process of a training that `launch` spreads, knows and does; and the folder that it shares with
its command:

    settings.json     resolved, the same for every rank
    accelerate.json   how the ranks share the work
    alive-<command>   locked while that command lives
    steps.jsonl       what rank 0 measured, for the command to follow
    failure.json      the first error of a rank
    log.txt           whatever ranks and libraries print

Beside it lies a lock that every rank shares for as long as it lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

from proxytune import files
from proxytune.errors import ProxytuneError

SETTINGS, CONFIG, STEPS, FAILURE, LOG = (
    "settings.json", "accelerate.json", "steps.jsonl", "failure.json", "log.txt",
)  # fmt: skip
COMMAND = "PROXYTUNE_LAUNCH"  # the environment variable that names a rank's command
LOOK_SECONDS = 0.2


def is_main() -> bool:
    """Whether this process is the one that writes files: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def everyone() -> None:
    """Wait until all ranks have come here."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


@contextlib.contextmanager
def main_first() -> Generator[None]:
    """Rank 0 goes through the block before the others do."""
    if not is_main():
        everyone()
    yield
    if is_main():
        everyone()


def alive(folder: Path, command: str) -> Path:
    """Locked while the command of that name lives. The next one in the same folder has another."""
    return folder / f"alive-{command}"


def lived(folder: Path) -> Path:
    """Locked, shared, while any rank lives: the next command waits until those of a killed one are dead."""
    return folder.with_suffix(".ranks.lock")


def attend(folder: Path) -> None:
    """Kill this rank as soon as its command is gone; at once where that happened before the rank came up."""
    mine, begun = alive(folder, os.environ[COMMAND]), threading.Event()

    def look() -> None:
        with files.locked(lived(folder), shared=True):
            while files.is_locked(mine):
                begun.set()
                time.sleep(LOOK_SECONDS)
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=look, daemon=True).start()
    begun.wait()


def tell(folder: Path, step: int, **more: Any) -> None:
    """A line for the command to follow. Only rank 0 writes."""
    if is_main():
        with (folder / STEPS).open("ab") as file:
            file.write(json.dumps({"step": step, **more}).encode() + b"\n")


def report(folder: Path, error: BaseException) -> None:
    """Tell the command why this rank fails; the first one's reason counts."""
    if isinstance(error, ProxytuneError):
        told = {"kind": type(error).__name__, "what": error.what, "hint": error.hint}
    else:
        told = {"kind": "", "what": "".join(traceback.format_exception(error)), "hint": ""}
    if not (folder / FAILURE).exists():
        files.write_json(folder / FAILURE, told)
