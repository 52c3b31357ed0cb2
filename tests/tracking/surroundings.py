"""Where programs under test run: the clone, its interpreter, an environment without a trace of W&B."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable


def clean_environment(home: Path, **more: str) -> dict[str, str]:
    """This process's environment without a trace of W&B, at home in an empty folder."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "XDG", "NETRC"))}
    return kept | {"HOME": str(home), "PYTHONPATH": str(ROOT)} | more


@contextlib.contextmanager
def command_lines() -> Iterator[set[str]]:
    """The command lines of all processes while the block runs, as anybody on the machine can list them."""
    found: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):  # it ended just now
                    found.add(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield found
    finally:
        over.set()
        looking.join()
