from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.tracking.surroundings import PYTHON, ROOT, clean_environment
from tests.tracking.wandb_server import Server


@pytest.fixture(autouse=True)
def no_wandb_settings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def server() -> Iterator[Server]:
    serving = Server()
    yield serving
    serving.shutdown()
    serving.server_close()


@dataclass
class Mirrored:
    """The runs of `recorded_runs.py`, made without a key and with a closed standard input."""

    outputs: Path
    home: Path
    stdout: str
    stderr: str

    def records(self, name: str) -> list[dict[str, Any]]:
        """What wandb itself reads in the offline file of the run tagged `name`."""
        (folder,) = (self.outputs / "wandb").glob(f"offline-run-*-{self.run(name).name}")
        command = [PYTHON, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        shown = subprocess.run(command, env=clean_environment(self.home), capture_output=True, text=True, check=True)
        return [json.loads(line) for line in shown.stdout.splitlines()]

    def run(self, name: str) -> Path:
        (file,) = [
            file for file in self.outputs.glob("runs/*/run.json") if name in json.loads(file.read_text())["tags"]
        ]
        return file.parent


@pytest.fixture(scope="session")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Mirrored:
    outputs, home = tmp_path_factory.mktemp("recorded"), tmp_path_factory.mktemp("home")
    program = [PYTHON, str(ROOT / "tests" / "tracking" / "recorded_runs.py"), str(outputs)]
    done = subprocess.run(
        program, env=clean_environment(home), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return Mirrored(outputs, home, done.stdout, done.stderr)
