"""W&B that fails, goes away in mid-run or cannot write: the run ends as it would, and its local record is whole."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.tracking.conftest import no_wandb_settings, server  # noqa: F401
from tests.tracking.surroundings import PYTHON, clean_environment
from tests.tracking.wandb_server import KEY

LINES = 50
RUN = f"""
import sys, time
from pathlib import Path
from tests.tracking.recorded_runs import start
import wandb
outputs, began = Path(sys.argv[1]), time.monotonic()
with start(outputs, "one") as run:
    started = time.monotonic() - began
    run.log({{"n": 0}})
    print("half", flush=True)
    sys.stdin.readline()
    for n in range(1, {LINES}):
        run.log({{"n": n}})
    run.summary({{"done": 1}})
    logged = time.monotonic() - began
print(started, time.monotonic() - began - logged)
"""


def begin(outputs: Path, home: Path, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [PYTHON, "-c", RUN, str(outputs)],
        env=clean_environment(home, **environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "half\n"
    return process


def end(process: subprocess.Popen[str], outputs: Path) -> tuple[float, float, dict]:
    """Seconds until the run had started, seconds that closing it took, and what the record says."""
    out, err = process.communicate("go on\n", timeout=120)
    assert process.returncode == 0, err
    (folder,) = (outputs / "runs").iterdir()
    told = json.loads((folder / "run.json").read_text())
    lines = [json.loads(line)["n"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(LINES)) and told["status"] == "finished" and told["summary"] == {"done": 1}
    started, closed = map(float, out.split())
    return started, closed, told


def test_a_server_that_fails_costs_no_time_and_no_line(tmp_path, server):  # noqa: F811
    server.failing = True
    process = begin(tmp_path, tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    started, _, told = end(process, tmp_path)
    assert started < 5 + 5 and told["wandb"]["mode"] == "offline"  # 5 s for a busy machine


@pytest.mark.parametrize("how", ["gone", pytest.param("failing", marks=pytest.mark.crash)])
def test_a_server_that_is_lost_in_mid_run_leaves_the_record_whole(tmp_path, server, how):  # noqa: F811
    process = begin(tmp_path, tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    if how == "gone":
        server.shutdown()
        server.socket.close()
    server.failing = True
    began = time.monotonic()
    _, closed, told = end(process, tmp_path)
    assert told["wandb"]["mode"] == "online" and closed < 45 and time.monotonic() - began < 90


def test_a_folder_that_wandb_cannot_have_is_one_warning(tmp_path):
    (tmp_path / "wandb").write_text("in the way")
    _, _, told = end(begin(tmp_path, tmp_path, WANDB_MODE="offline"), tmp_path)
    assert len(told["warnings"]) == 1 and "this run has no mirror" in told["warnings"][0]
