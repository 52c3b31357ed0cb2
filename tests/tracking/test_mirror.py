from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import time
from pathlib import Path

import pytest

from proxytune.settings import Tracker
from proxytune.tracking import mirror
from proxytune.tracking import server as reach
from tests.tracking.surroundings import PYTHON, clean_environment, command_lines
from tests.tracking.wandb_server import KEY

RECORD = (
    "import sys, time; from pathlib import Path; from tests.tracking.recorded_runs import start\n"
    "import wandb\n"
    "for name in sys.argv[2:]:\n"
    "    began = time.monotonic()\n"
    "    with start(Path(sys.argv[1]), name) as run:\n"
    "        print(time.monotonic() - began); run.log({'a': 1})"
)


def told(outputs: Path) -> dict:
    (file,) = outputs.glob("runs/*/run.json")
    return json.loads(file.read_text())


PATIENT = (
    "from proxytune.tracking import mirror, server\n"
    "mirror.START_SECONDS, server.PROBE_SECONDS = 120.0, 60.0\n"
)  # for tests of what a server gets, on a busy machine too


def record(
    outputs: Path, home: Path, *names: str, before: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs of these names, one after the other in one process; it prints the seconds that each took to start."""
    return subprocess.run(
        [PYTHON, "-c", before + RECORD, str(outputs), *names],
        env=clean_environment(home, **environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


def kinds(records: list[dict], kind: str) -> list[dict]:
    return [record[kind] for record in records if record["type"] == kind]


def test_offline_run_reads_back_whole(mirrored):
    records = mirrored.records("full")
    (run,) = kinds(records, "run")
    assert (run["run_id"], run["project"]) == (mirrored.run("full").name, "tests")
    assert (run["job_type"], run["run_group"], run["tags"]) == ("sweep", "alpha-sweep", ["code", "tiny", "full"])
    config = run["config"]["update"]
    assert config["method"] == {"train_lr": 0.1} and config["alphas"] == [0.0, 1.0]
    assert config["run"]["command"] == "proxytune sweep task=code"

    history = [item["item"] for item in kinds(records, "history")]
    losses = [(row["step"], row["train/loss"]) for row in history if "train/loss" in row]
    assert losses == [(10, 2.0), (20, 1.5), (15, 1.75)]
    tables = {
        key.removesuffix(".nrows"): value for row in history for key, value in row.items() if key.endswith(".nrows")
    }
    assert tables == {"generations": 2, "alpha_table": 2}

    summary = {key: value for item in kinds(records, "summary") for key, value in item["update"].items()}
    assert summary["steered/loss"] == 1.25
    later = {key: value for item in kinds(records, "config") for key, value in item["update"].items()}
    assert later["_wandb.visualize.alpha"]["panel_config"]["stringSettings"]["title"] == "Loss over alpha"
    assert [used["name"] for used in later["uses"]] == ["rows"]

    (expert,) = [artifact for artifact in kinds(records, "artifact") if artifact["type"] == "model"]
    assert expert["name"] == "code" and "local-v3" in expert["aliases"]
    (reference,) = expert["manifest"]["contents"]
    assert reference["ref"] == (mirrored.outputs / "weights" / "adapter.bin").as_uri()
    assert kinds(records, "exit")[0].get("exit_code", 0) == 0


def test_a_run_cut_just_where_a_record_ends_is_not_whole(mirrored, tmp_path):
    """As a full disk can cut it: nothing is torn, only the rest is missing."""
    (file,) = mirrored.outputs.glob(f"wandb/offline-run-*/run-{mirrored.run('full').name}.wandb")
    data, cut = file.read_bytes(), tmp_path / "run.wandb"
    ends, size = [], len(data)
    while size > mirror.HEADER:
        cut.write_bytes(data[:size])
        assert mirror.whole(cut) == size and mirror.is_whole(cut) is (size == len(data))
        cut.write_bytes(data[: size - 1])
        ends, size = [*ends, size], mirror.whole(cut)
    assert len(ends) == len(mirrored.records("full"))
    cut.write_bytes(data + b"\0")
    assert not mirror.is_whole(cut)


def test_runs_of_one_process_are_runs_of_their_own(mirrored):
    files = list((mirrored.outputs / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {file.stem.removeprefix("run-") for file in files} == {
        mirrored.run(n).name for n in ("full", "short", "broken")
    }
    history = [item["item"] for item in kinds(mirrored.records("short"), "history")]
    assert [row["other"] for row in history] == [1] and "train/loss" not in history[0]


def test_an_exception_inside_wandb_is_one_warning_and_work_goes_on(mirrored):
    assert mirrored.stdout == "still here\n"
    folder = mirrored.run("broken")
    kept = json.loads((folder / "run.json").read_text())
    assert kept["status"] == "finished"
    (warning,) = kept["warnings"]
    assert "W&B failed" in warning
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_offline_is_told_in_one_line_a_process(mirrored):
    (line,) = mirrored.stderr.splitlines()
    assert "no key" in line and str(mirrored.outputs / "wandb") in line and "make sync" in line


RECORD_LONG = (
    "import sys; from pathlib import Path; from tests.tracking.recorded_runs import start\n"
    "outputs = Path(sys.argv[1])\n"
    "for name in 'abc':\n"
    "    with start(outputs, name) as run:\n"
    "        for n in range(2000): run.log({'n': n})\n"
    "    print(sum(file.stat().st_size for file in outputs.glob('wandb/offline-run-*/run-*.wandb')))"
)


def test_an_offline_run_is_whole_on_disk_once_it_has_ended(tmp_path):
    """wandb's own process writes its last block in its own time, which is no full disk."""
    environment = clean_environment(tmp_path, WANDB_MODE="offline")
    done = subprocess.run([PYTHON, "-c", RECORD_LONG, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert [json.loads(file.read_text())["warnings"] for file in tmp_path.glob("runs/*/run.json")] == [[]] * 3
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    sizes = [file.stat().st_size for file in files]
    assert list(map(int, done.stdout.split())) == [sum(sizes[:count]) for count in (1, 2, 3)]


def test_nothing_is_written_at_home(mirrored):
    assert list(mirrored.home.rglob("*")) == []


def test_a_terminal_is_never_asked(tmp_path):
    parent, child = pty.openpty()
    done = subprocess.run(
        [PYTHON, "-c", RECORD, str(tmp_path / "outputs"), "one"],
        env=clean_environment(tmp_path, WANDB_MODE="online"),
        stdin=child,
        stdout=child,
        stderr=child,
        timeout=300,
    )
    os.close(child)
    shown = os.read(parent, 65536).decode()
    os.close(parent)
    assert done.returncode == 0 and len(shown.splitlines()) == 2 and "there is no key" in shown
    assert told(tmp_path / "outputs")["wandb"]["mode"] == "offline"


def test_a_server_that_never_answers_is_given_up_after_the_probe(tmp_path):
    """At most 5 s later than one that asks nobody; a busy machine is given three tries."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for turn in range(3):
            asked = record(tmp_path / f"{turn}", tmp_path, "one", WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
            alone = record(tmp_path / f"alone{turn}", tmp_path, "one", WANDB_MODE="offline")
            assert "did not answer within 3 s" in asked.stderr
            assert told(tmp_path / f"{turn}")["wandb"]["mode"] == "offline"
            if reach.PROBE_SECONDS - 1 < (later := float(asked.stdout) - float(alone.stdout)) < 5:
                break
    assert reach.PROBE_SECONDS - 1 < later < 5


def test_a_socket_is_never_given_up_before_the_probe_is(monkeypatch):
    """So one line tells of both, on a busy machine too."""
    monkeypatch.setattr(reach, "PROBE_SECONDS", 0.4)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert {reach._ask(url, KEY) for _ in range(4)} == {f"{url} did not answer within 0 s"}


def test_a_start_that_hangs_costs_the_first_run_5_s_and_the_next_one_nothing(tmp_path, server):
    """The probe is answered, and then nothing is. Later than a run that asks nobody; three tries, as above."""
    server.silent.add("UpsertBucket")
    for turn in range(3):
        done = record(tmp_path / f"{turn}", tmp_path, "one", "two", WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        assert len(server.named("Viewer")) == turn + 1 and len(done.stderr.splitlines()) == 1
        modes = [json.loads(file.read_text())["wandb"]["mode"] for file in tmp_path.glob(f"{turn}/runs/*/run.json")]
        assert modes == ["offline"] * 2
        alone = float(record(tmp_path / f"alone{turn}", tmp_path, "one", WANDB_MODE="offline").stdout)
        first, second = (float(seconds) - alone for seconds in done.stdout.split())
        if first < 5 and second < 1:
            return
    pytest.fail(f"started {first:.1f} and {second:.1f} s later")


def test_a_server_that_answers_gets_the_run(tmp_path, server):
    done = record(tmp_path, tmp_path, "one", before=PATIENT, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    assert (told(tmp_path)["wandb"]["mode"], told(tmp_path)["warnings"], done.stderr) == ("online", [], "")
    (history,) = server.runs.values()
    assert [json.loads(line)["a"] for line in history] == [1]


def test_wandb_keeps_the_key_to_itself_and_tells_nobody_of_its_errors_unless_the_user_wants_it(tmp_path, server):
    """Its process is told by an argument; with a `true` of the user's own that is missing, so the test can fail."""
    known = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    for given, silent in (({}, True), ({"WANDB_ERROR_REPORTING": "true"}, False)):
        with command_lines() as lines:
            done = record(tmp_path, tmp_path, "one", before=PATIENT, **known, **given)
        cores = [line for line in lines if "wandb-core" in line and "--port-filename" in line]  # that serve a run
        assert cores and all("--no-observability" in line for line in cores) is silent
        assert not [text for text in (*lines, done.stdout, done.stderr) if KEY in text]
    assert len(server.runs) == 2
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {".wandb", ".log"} <= {path.suffix for path in files}
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_an_online_start_that_fails_goes_on_offline(tmp_path, server):
    server.broken.add("UpsertBucket")
    done = record(tmp_path, tmp_path, "one", WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    (line,) = done.stderr.splitlines()
    assert "could not start" in line
    assert told(tmp_path)["wandb"]["mode"] == "offline"
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


def test_wandb_mode_disabled_means_no_mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mirror.open_mirror(Tracker(name="wandb"), tmp_path, run_id="x") is None
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize("place", ["environment", "netrc", "settings"])
def test_the_key_is_found_where_wandb_keeps_it(tmp_path, monkeypatch, place):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert reach.api_key() is None and "no key" in reach.trouble()
    match place:
        case "environment":
            monkeypatch.setenv("WANDB_API_KEY", KEY)
        case "netrc":
            (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
        case "settings":
            (tmp_path / ".config" / "wandb").mkdir(parents=True)
            (tmp_path / ".config" / "wandb" / "settings").write_text(f"[default]\napi_key = {KEY}\n")
    assert reach.api_key() == KEY


def test_a_key_for_another_server_is_not_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert reach.api_key() is None


def test_the_probe_says_what_is_wrong(server, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert reach.trouble() is None
    server.broken.add("Viewer")
    assert "answered 400" in reach.trouble()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    began = time.monotonic()
    assert "cannot be reached" in reach.trouble() and time.monotonic() - began < reach.PROBE_SECONDS


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000,
        b"HTTP/1.1 200 OK\r\n\r\n[]",
    ],
    ids=["another protocol", "a body cut short", "deep nesting", "another shape"],
)
def test_what_is_no_w_and_b_server_is_told_in_one_line(server, capfd, raw):
    server.raw = raw
    assert "is no W&B server" in reach._ask(server.url, KEY)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("host", ["127.0.0.1:9", "127.0.0.1", "host:abc", "[::1]:9"])
def test_an_address_with_a_password_is_shown_without(capfd, host):
    told = reach._ask(f"http://user:hunter2@{host}", KEY)
    assert told.startswith(f"http://{host} ") and "hunter2" not in told
    assert capfd.readouterr() == ("", "")


def test_the_key_does_not_follow_a_redirect(server):
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.setblocking(False)
        where = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/graphql".encode()
        server.raw = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + where + b"\r\n\r\n"
        assert "answered 302" in reach._ask(server.url, KEY)
        with pytest.raises(BlockingIOError):
            elsewhere.accept()
