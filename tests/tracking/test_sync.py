from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from proxytune.settings import Tracker
from proxytune.stages import sync
from proxytune.tracking import mirror, record
from tests.tracking.surroundings import command_lines
from tests.tracking.wandb_server import KEY


@pytest.fixture
def outputs(mirrored, tmp_path) -> Path:
    """A copy of the recorded runs to upload. Reduced to two, which are all a test needs."""
    copy = tmp_path / "outputs"
    shutil.copytree(mirrored.outputs, copy, symlinks=True)
    (broken,) = (copy / "wandb").glob(f"*{mirrored.run('broken').name}")
    shutil.rmtree(broken)
    return copy


def test_every_run_is_uploaded_once(outputs, mirrored, server, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with command_lines() as lines:
        assert sync.run(outputs) == 0
    assert any("wandb sync" in line and str(outputs) in line for line in lines)
    assert not any(KEY in line for line in lines)
    assert "2 of 2 runs uploaded" in capfd.readouterr().out
    assert set(server.runs) == {mirrored.run("full").name, mirrored.run("short").name}
    assert "code" in {asked["input"]["artifactCollectionName"] for asked in server.named("CreateArtifact")}

    (use,) = server.named("UseArtifact")
    assert (use["artifactID"], use["runName"]) == ("rows:local-f00d", mirrored.run("full").name)

    server.operations.clear()
    assert sync.run(outputs) == 0
    assert "no run waits" in capfd.readouterr().out and server.operations == []


@pytest.mark.parametrize("broken", ["killed", "refused"])
def test_lineage_that_was_not_told_is_told_by_the_next_sync(outputs, mirrored, server, monkeypatch, capfd, broken):
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    notes = outputs / "runs" / mirrored.run("full").name / "artifacts.jsonl"
    with notes.open("a") as file:
        file.write('{"how": "used", "na')  # as a kill may leave it
    with monkeypatch.context() as patch:
        if broken == "killed":
            patch.setattr(sync, "_link", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                sync.run(outputs)
        else:
            server.broken.add("UseArtifact")
            assert sync.run(outputs) == 1
            assert "its lineage waits for the next sync" in capfd.readouterr().err
    lines = {run: list(its) for run, its in server.runs.items()}
    server.broken.clear()
    server.operations.clear()
    assert sync.run(outputs) == 0
    (use,) = server.named("UseArtifact")
    assert (use["artifactID"], use["runName"]) == ("rows:local-f00d", mirrored.run("full").name)
    assert server.runs == lines and not server.named("UpsertBucket"), "no run is uploaded twice"
    assert sync.waiting(outputs) == []


def test_a_server_that_refuses_runs_leaves_them_waiting(outputs, server, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    server.broken.add("UpsertBucket")
    assert sync.run(outputs) == 1
    assert "0 of 2 runs uploaded" in capfd.readouterr().out
    assert len(sync.waiting(outputs)) == 2


def test_without_a_key_what_waits_is_listed(outputs, mirrored, capsys):
    assert sync.run(outputs) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("W&B: 2 runs not uploaded (there is no key")
    assert len(rest) == 2 and mirrored.run("full").name in rest[0] and mirrored.run("short").name in rest[1]


def test_a_dry_run_asks_nobody(outputs, server, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert sync.run(outputs, dry_run=True) == 0
    assert "2 runs not uploaded (only a dry run)" in capsys.readouterr().out and server.operations == []


def test_a_run_still_going_on_is_left_alone(tmp_path):
    told = {"stage": "s", "task": "t", "family": "f", "config": {}, "command": ""}
    with record.start(Tracker(name="local"), tmp_path, **told) as run:
        offline = tmp_path / "wandb" / f"offline-run-x-{run.folder.name}"
        offline.mkdir(parents=True)
        (offline / f"run-{run.folder.name}.wandb").touch()
        assert sync.waiting(tmp_path) == []
    assert len(sync.waiting(tmp_path)) == 1


def test_nothing_recorded_is_nothing_to_do(tmp_path, capsys):
    assert sync.run(tmp_path) == 0
    assert "no run waits" in capsys.readouterr().out


def test_the_end_of_the_last_whole_record_is_found_in_a_file_cut_anywhere(tmp_path):
    """LevelDB's log: parts of checksum, length, kind (1 whole, 2 first, 3 middle, 4 last), in blocks of 32 KiB."""
    path, data, ends = tmp_path / "run.wandb", bytearray(b":W&B\0\0\0"), [7]

    def part(kind: int, size: int) -> None:
        data.extend(b"\0" * 4 + size.to_bytes(2, "little") + bytes([kind]) + b"x" * size)

    for size in (3, 0, 100):
        part(1, size)
        ends.append(len(data))
    part(2, (1 << 15) - len(data) - 7)  # to the block's end, over all of the next, and into a third
    part(3, (1 << 15) - 7)
    part(4, 5)
    ends.append(len(data))
    part(1, (3 << 15) - len(data) - 7 - 4)  # 4 bytes are left of the block: no part fits
    ends.append(len(data))
    data.extend(b"\0" * 4)
    part(1, 9)
    ends.append(len(data))
    for cut in [*range(0, 200), *range(len(data) - 60, len(data) + 1), 1 << 15, (1 << 15) + 3, (2 << 15) + 9]:
        path.write_bytes(data[:cut])
        assert mirror.whole(path) == max((end for end in ends if end <= cut), default=7), cut
