"""W&B that fails, goes away in mid-run or cannot write: the run ends as it would, and its local record is whole."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from proxytune.stages import sync
from tests.tracking.conftest import no_wandb_settings, server  # noqa: F401
from tests.tracking.surroundings import PYTHON, clean_environment
from tests.tracking.wandb_server import KEY, Server

LINES, FINISH_SECONDS = 50, 8.0  # that closing a run may take whose server is lost; elsewhere it is more
STOPPED = "W&B failed, the mirror of this run stops here"
RUN = f"""
import sys, time
from pathlib import Path
from tests.tracking.recorded_runs import start
from proxytune.tracking import mirror
import wandb
mirror.FINISH_SECONDS = float(sys.argv[3])
outputs, began = Path(sys.argv[1]), time.monotonic()
with start(outputs, "one") as run:
    started = time.monotonic() - began
    half = int(sys.argv[2])
    for n in range(half):
        run.log({{"n": n}})
    print("half", flush=True)
    sys.stdin.readline()
    for n in range(half, {LINES}):
        run.log({{"n": n}})
    run.summary({{"done": 1}})
    logged = time.monotonic() - began
print(started, time.monotonic() - began - logged)
"""


MAKES = f"""
import sys, time
from pathlib import Path
from tests.tracking.recorded_runs import start
from proxytune.tracking import mirror
import wandb
from PIL import Image
mirror.FINISH_SECONDS = float(sys.argv[3])
mirror.LINK_SECONDS = mirror.FINISH_SECONDS / 2
outputs = Path(sys.argv[1])
Image.new("RGB", (1, 1)).save(outputs / "picture.png")
with start(outputs, "one") as run:
    run.log({{"n": 0}})
    print("half", flush=True)
    sys.stdin.readline()
    began = time.monotonic()
    for what in ("dataset", "model"):
        run.artifact(f"{{what}}@v1", what, outputs / "picture.png")
    run.table("rows", ["a"], [[1]])
    run.image("picture", outputs / "picture.png")
    for n in range(1, {LINES}):
        run.log({{"n": n}})
    run.summary({{"done": 1}})
    made = time.monotonic() - began
    ended = time.monotonic()
print(made, time.monotonic() - ended)
"""


def begin(
    outputs: Path,
    home: Path,
    half: int = 1,
    finish: float = 60,
    within: Sequence[str] = (),
    program: str = RUN,
    **environment: str,
) -> subprocess.Popen[str]:
    """within: the command that the program is run by."""
    process = subprocess.Popen(
        [*within, PYTHON, "-c", program, str(outputs), str(half), str(finish)],
        env=clean_environment(home, **environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "half\n"
    return process


def end(process: subprocess.Popen[str], outputs: Path, count: int = LINES) -> tuple[float, float, dict]:
    """Seconds until the run had started, seconds that closing it took, and what the record says."""
    out, err = process.communicate("go on\n", timeout=120)
    assert process.returncode == 0, err
    (folder,) = (outputs / "runs").iterdir()
    told = json.loads((folder / "run.json").read_text())
    lines = [json.loads(line)["n"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(count)) and told["status"] == "finished" and told["summary"] == {"done": 1}
    started, closed = map(float, out.split())
    return started, closed, told


def test_a_server_that_fails_costs_no_time_and_no_line(tmp_path, server):  # noqa: F811
    """At most 5 s later than a run that asks nobody; a busy machine is given three tries."""
    server.status = 500
    for turn in range(3):
        places = [tmp_path / f"{name}{turn}" for name in ("asked", "alone")]
        asked, _, told = end(begin(places[0], tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY), places[0])
        alone, _, _ = end(begin(places[1], tmp_path, WANDB_MODE="offline"), places[1])
        assert told["wandb"]["mode"] == "offline"
        if asked - alone < 5:
            return
    pytest.fail(f"started {asked - alone:.1f} s later")


@pytest.mark.parametrize("how", ["gone", pytest.param("failing", marks=pytest.mark.crash), "refusing", "silent"])
def test_a_server_that_is_lost_in_mid_run_leaves_the_record_whole(tmp_path, monkeypatch, how):
    """And the run is uploaded later, to its end, once; a busy machine is given three tries to close it in time."""
    for turn in range(3):
        lost, outputs = Server(), tmp_path / str(turn)
        process = begin(outputs, tmp_path, finish=FINISH_SECONDS, WANDB_BASE_URL=lost.url, WANDB_API_KEY=KEY)
        if how == "gone":
            lost.vanish()
        elif how == "silent":  # it takes every connection and says nothing
            lost.silent.add("*")
        else:
            lost.status = {"refusing": 403, "failing": 500}[how]
        _, closed, told = end(process, outputs)
        lost.vanish()
        assert told["wandb"]["mode"] == "online" and told["wandb"]["uploaded"] is False
        assert uploaded_later(outputs, monkeypatch) == list(range(LINES))
        if closed < FINISH_SECONDS + 15:
            return
    pytest.fail(f"closing it took {closed:.1f} s")


@pytest.mark.parametrize("how", ["failing", pytest.param("silent", marks=pytest.mark.crash)])
def test_artifacts_that_the_server_does_not_take_hold_no_work_up(tmp_path, server, how):  # noqa: F811
    """The rest of it goes on: only the run's end waits, and no longer than for anything else."""
    getattr(server, how).add("CreateArtifact")
    process = begin(tmp_path, tmp_path, finish=2, program=MAKES, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    made, closed, told = end(process, tmp_path)
    assert made < 20 and closed < 2 + 20  # minutes otherwise
    assert [warning.partition(":")[0] for warning in told["warnings"]] == [STOPPED]


def test_a_server_lost_before_artifacts_tables_and_pictures_costs_one_question(tmp_path, server):  # noqa: F811
    """Which takes 5 s: then the mirror stops."""
    process = begin(tmp_path, tmp_path, finish=2, program=MAKES, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    server.silent.add("*")
    made, _, told = end(process, tmp_path)
    assert made < 5 + 15
    assert [warning.partition(":")[0] for warning in told["warnings"]] == [STOPPED]
    (folder,) = (tmp_path / "runs").iterdir()
    assert len((folder / "artifacts.jsonl").read_text().splitlines()) == 2
    assert (folder / "tables" / "rows.jsonl").exists() and (folder / "images" / "picture.png").exists()


def test_artifacts_are_put_into_registries_once_the_run_ends(tmp_path, server):  # noqa: F811
    process = begin(tmp_path, tmp_path, program=MAKES, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    _, _, told = end(process, tmp_path)
    assert told["warnings"] == [] and told["wandb"]["uploaded"] is True
    assert len(server.named("FetchOrgInfoFromEntity")) == 2  # where the registry of an artifact is


@pytest.mark.parametrize("half", [1, 2000])
def test_of_a_run_that_was_killed_online_all_that_wandb_wrote_is_uploaded_later(tmp_path, server, monkeypatch, half):  # noqa: F811
    """It writes in blocks of 32 KiB, so that of a short run there is nothing, and nothing waits."""
    process = begin(tmp_path, tmp_path, half, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    assert sync.waiting(tmp_path) == []  # it goes on
    process.kill()
    process.communicate()
    (record,) = (tmp_path / "runs").iterdir()
    assert len((record / "metrics.jsonl").read_text().splitlines()) == half
    if half == 1:
        assert sync.waiting(tmp_path) == []
    else:
        found = uploaded_later(tmp_path, monkeypatch)
        assert found == list(range(len(found))) and len(found) > 100


def test_a_run_that_was_uploaded_to_its_end_does_not_wait(tmp_path, server):  # noqa: F811
    process = begin(tmp_path, tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    _, _, told = end(process, tmp_path)
    assert told["wandb"]["uploaded"] is True and sync.waiting(tmp_path) == []


def uploaded_later(outputs: Path, monkeypatch) -> list[int]:
    """The `n` of each line that a server which is there gets of the only run; a second call uploads nothing."""
    later = Server()
    monkeypatch.setenv("WANDB_BASE_URL", later.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (waiting,) = sync.waiting(outputs)
    assert sync.run(outputs) == 0
    (lines,) = later.runs.values()
    asked = len(later.operations)
    assert sync.waiting(outputs) == [] and sync.run(outputs) == 0 and len(later.operations) == asked
    later.shutdown()
    later.server_close()
    assert waiting.with_name(waiting.name + ".synced").exists()
    return [json.loads(line)["n"] for line in lines]


def test_a_folder_that_wandb_cannot_have_is_one_warning(tmp_path):
    (tmp_path / "wandb").write_text("in the way")
    _, _, told = end(begin(tmp_path, tmp_path, WANDB_MODE="offline"), tmp_path)
    assert len(told["warnings"]) == 1 and "this run has no mirror" in told["warnings"][0]


@pytest.mark.parametrize("kilobytes", [0, 16, 64])
def test_a_disk_that_is_full_for_wandb_alone_costs_neither_the_run_nor_a_line(tmp_path, kilobytes):
    """A file system of its own for its folder, full at once or in mid-run: the mirror is lost, the record is whole."""
    folder = tmp_path / "wandb"
    folder.mkdir()
    small = f"mount -t tmpfs -o size=64k tmpfs {folder} && head -c {64 - kilobytes}K /dev/zero > {folder}/fill"
    within = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{small} && exec "$@"', "sh")
    try:
        subprocess.run([*within, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets nobody mount a file system of their own")
    process = begin(tmp_path, tmp_path, half=2000, within=within, WANDB_MODE="offline")
    _, _, told = end(process, tmp_path, 2000)
    assert len(told["warnings"]) == 1 and "the mirror of this run stops here" in told["warnings"][0]
