"""What tests of the sandbox need of the machine they run on."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from proxytune.errors import SettingsError


@contextlib.contextmanager
def or_skip() -> Iterator[None]:
    """Skip where no isolated sandbox can be had and plain `unshare` gets nothing like it either; else it is a fault."""
    try:
        yield
    except SettingsError as error:
        if "no isolated sandbox" not in str(error) or _unshared():
            raise
        pytest.skip(str(error))


def anybodys_python() -> str:
    """For `limits`, which gives up what root may read."""
    python = "/usr/bin/python3" if os.geteuid() == 0 else sys.executable
    if not shutil.which(python):
        pytest.skip(f"{python} is needed: one that an unprivileged user can read")
    return python


def _unshared() -> bool:
    command = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0
