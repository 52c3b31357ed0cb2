"""Where programs under test run: the clone, its interpreter, an environment without a trace of W&B."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable


def clean_environment(home: Path, **more: str) -> dict[str, str]:
    """This process's environment without a trace of W&B, at home in an empty folder."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "XDG", "NETRC"))}
    return kept | {"HOME": str(home), "PYTHONPATH": str(ROOT)} | more
