"""Trainings over several processes: what accelerate is told, and that no process outlives its command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from proxytune import files
from proxytune.errors import DataError, ModelError, SettingsError
from proxytune.experts import launch, ranks
from proxytune.settings import Expert, Launch, load
from tests.tracking.surroundings import command_lines

ROOT = Path(__file__).resolve().parents[2]
RANK = "tests.experts.sleeping_rank"


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch):
    monkeypatch.chdir(ROOT)  # where ranks find the tests' modules
    monkeypatch.setattr(launch, "devices", lambda: 0)


def environment(tmp_path: Path, monkeypatch, **settings) -> tuple[object, dict[str, str]]:
    """(accelerate's arguments, what it would set for each rank) from our configuration for four GPUs."""
    from accelerate.commands import launch as accelerate
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = tmp_path / "accelerate.json"
    file.write_text(json.dumps(launch.accelerate_configuration(Launch(**settings), gpus=4)))
    given = accelerate.launch_command_parser().parse_args(["--config_file", str(file), "-m", RANK, "folder"])
    arguments, *_ = accelerate._validate_launch_command(given)
    return arguments, prepare_multi_gpu_env(arguments)


def test_ddp_is_one_process_for_each_gpu_or_as_many_as_asked(tmp_path, monkeypatch):
    arguments, told = environment(tmp_path, monkeypatch, name="ddp")
    assert arguments.multi_gpu and not arguments.use_fsdp and arguments.num_processes == 4
    assert told["ACCELERATE_MIXED_PRECISION"] == "no" and "ACCELERATE_USE_FSDP" not in told
    assert environment(tmp_path, monkeypatch, name="ddp", processes=2)[0].num_processes == 2


@pytest.mark.parametrize("offload", [False, True])
def test_fsdp2_reaches_accelerate_s_plugin(tmp_path, monkeypatch, offload):
    from accelerate import FullyShardedDataParallelPlugin

    arguments, told = environment(tmp_path, monkeypatch, name="fsdp2", offload=offload)
    assert arguments.use_fsdp and arguments.num_processes == 4
    for key, value in told.items():
        if "FSDP" in key:
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT", "what is saved is one model"
    assert (type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy") is offload and plugin.cpu_ram_efficient_loading


def test_zero3_is_told_to_accelerate_and_needs_deepspeed(tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match="pip install deepspeed"):
        launch.accelerate_configuration(Launch(name="zero3"), gpus=4)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    arguments, _ = environment(tmp_path, monkeypatch, name="zero3", offload=True)
    assert arguments.use_deepspeed and arguments.zero_stage == 3 and arguments.zero3_save_16bit_model
    assert arguments.offload_optimizer_device == arguments.offload_param_device == "cpu"


@pytest.mark.parametrize(
    ("settings", "gpus", "said"),
    [
        ({"name": "fsdp2"}, 0, "launch=fsdp2 needs CUDA GPUs"),
        ({"name": "zero3"}, 0, "launch=zero3 needs CUDA GPUs"),
        ({"name": "ddp"}, 0, "add launch.processes=2"),
        ({"name": "ddp", "processes": 5}, 4, "launch.processes=5, and there are 4 GPUs"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(settings, gpus, said):
    with pytest.raises(SettingsError, match=said):
        launch.accelerate_configuration(Launch(**settings), gpus)


@pytest.mark.parametrize("settings", [{"processes": 2}, {"name": "ddp", "offload": True}])
def test_settings_that_do_not_go_together_are_refused(settings):
    with pytest.raises(SettingsError, match="launch="):
        Launch(**settings)


def test_the_number_of_processes_that_a_machine_makes_of_it_is_written_down(monkeypatch):
    monkeypatch.setattr(launch, "devices", lambda: 4)
    assert launch.resolved(Launch(name="ddp")).processes == launch.resolved(Launch(name="fsdp2")).processes == 4
    assert launch.resolved(Launch()) == Launch()


def test_samples_are_for_one_process():
    small = {"model": "embedded:small"}
    family = {"name": "tiny", "small": small, "bases": {"b": small}, "base": "b"}
    with pytest.raises(SettingsError, match="sample_steps needs launch=single"):
        load(Expert, {"family": family, "task": {"name": "qa"}, "launch": {"name": "ddp"}, "sample_steps": 5})


def test_without_a_launcher_there_is_one_process_and_nothing_to_wait_for(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with ranks.main_first():
        assert ranks.is_main()
    ranks.everyone()


# Real ranks, started by accelerate


def spread(folder: Path, do: str, log=lambda values, step: None) -> None:
    launch.spread(Launch(name="ddp", processes=2), folder, RANK, {"do": do}, log)


@pytest.mark.slow
def test_what_rank_0_measures_is_recorded_once_and_nothing_is_left(tmp_path, capfd, monkeypatch):
    """And no key is on a command line, whatever the ranks have in their environment."""
    monkeypatch.setenv("WANDB_API_KEY", canary := "canary-0123456789" * 2)
    seen = []
    with command_lines() as lines:
        spread(tmp_path / "run", "work", lambda values, step: seen.append((step, values)))
    assert any(RANK in line for line in lines) and not any(canary in line for line in lines)
    assert seen == [(step, {"train/loss": 1.0 / step}) for step in (1, 2, 3)]
    assert not (tmp_path / "run").exists()
    shown, note = capfd.readouterr().err.strip().splitlines()
    assert shown.startswith("training") and "3/3" in shown
    assert note == "proxytune: a note of both ranks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("do", "kind", "said"),
    [
        ("refuse", DataError, r"^row 7 is broken \(mend it\)$"),
        ("break", RuntimeError, "KeyError: 'a bug'"),
        ("die", ModelError, r"was killed by signal 9 \(.*log\.txt"),
    ],
)
def test_a_rank_that_fails_ends_all_with_its_own_error(tmp_path, do, kind, said):
    with pytest.raises(kind, match=said):
        spread(tmp_path / "run", do)
    assert_gone(pids(tmp_path / "run", ranks=1))  # the other may not even have begun


def pids(folder: Path, ranks: int = 2) -> list[int]:
    """Of ranks and of their launcher, once so many are there."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        told = [json.loads(text) for text in (file.read_text() for file in folder.glob("pid-*")) if text]
        if len(told) >= ranks:
            return sorted({pid for pair in told for pid in pair})
        time.sleep(0.1)
    raise AssertionError("the ranks never came up")


def assert_gone(found: list[int]) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if not any(running(pid) for pid in found):
            return
        time.sleep(0.1)
    raise AssertionError("processes are left")


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second: it went while it was read
        return False


def sleeping(folder: Path) -> subprocess.Popen[bytes]:
    """A command whose ranks sleep."""
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell's `&` has it ignored
        "import sys; from pathlib import Path; from tests.experts.test_launch import launch, spread; "
        "launch.devices = lambda: 0; spread(Path(sys.argv[1]), 'sleep')"  # torch need not be asked
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_its_command(tmp_path, ending):
    command = sleeping(tmp_path / "run")
    found = pids(tmp_path / "run")
    assert all(map(running, found)) and command.pid not in found
    command.send_signal(ending)
    command.communicate(timeout=300)
    assert command.returncode != 0
    assert_gone(found)


def test_a_rank_that_comes_up_after_its_command_has_gone_does_nothing(tmp_path):
    """Though another command has begun in the same folder meanwhile."""
    attend = "import sys, pathlib; from proxytune.experts import ranks; ranks.attend(pathlib.Path(sys.argv[1]))"
    folder = tmp_path / "run"
    with files.locked(ranks.alive(folder, "new")):
        ended = {
            command: subprocess.run(
                [sys.executable, "-c", attend, str(folder)], cwd=ROOT, env=os.environ | {ranks.COMMAND: command}
            ).returncode
            for command in ("new", "old")
        }
    assert ended == {"new": 0, "old": -signal.SIGKILL}


def waited_for(lock: Path) -> bool:
    """Whether somebody stands before this lock, as Linux lists them."""
    waiting = [line for line in Path("/proc/locks").read_text().splitlines() if "->" in line]
    return any(f":{lock.stat().st_ino} " in line for line in waiting)


@pytest.mark.slow
def test_no_command_begins_before_the_ranks_of_a_killed_one_are_dead(tmp_path):
    """Ranks that do not come to their turn, as on a busy machine, and then see a command that lives: not theirs."""
    command = sleeping(tmp_path / "run")
    found = pids(tmp_path / "run")
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    command.kill()
    command.communicate(timeout=300)
    seen: list[int] = []
    with ThreadPoolExecutor() as pool:
        following = pool.submit(spread, tmp_path / "run", "work", lambda step, values: seen.append(step))
        until = time.monotonic() + 60
        while not (waits := waited_for(ranks.lived(tmp_path / "run"))) and time.monotonic() < until:
            time.sleep(0.02)
        told = json.loads((tmp_path / "run" / ranks.SETTINGS).read_text())
        for pid in found:
            os.kill(pid, signal.SIGCONT)
        following.result(300)
    assert waits and told == {"do": "sleep"} and len(seen) == 3
    assert_gone(found)
