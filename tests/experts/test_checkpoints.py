from __future__ import annotations

import json
from pathlib import Path

import pytest

from proxytune.experts.checkpoints import MARKER, is_complete, last_complete, mark, prune


def checkpoint(folder: Path, step: int) -> Path:
    """A checkpoint, marked as the trainer's callback does it."""
    place = folder / f"checkpoint-{step}"
    (place / "ref").mkdir(parents=True)
    (place / "model.safetensors").write_bytes(b"weights")
    (place / "optimizer.pt").write_bytes(b"moments")
    (place / "ref" / "adapter.safetensors").write_bytes(b"frozen")
    mark(place)
    return place


@pytest.mark.parametrize(
    "harm",
    [
        lambda place: (place / MARKER).unlink(),
        lambda place: (place / MARKER).write_text('{"model'),
        lambda place: (place / MARKER).write_text('{"model.safetensors": "abc"}'),
        lambda place: (place / "optimizer.pt").unlink(),
        lambda place: (place / "model.safetensors").write_bytes(b"weig"),
        lambda place: (place / "model.safetensors").write_bytes(b"weightz"),
        lambda place: (place / "ref" / "adapter.safetensors").unlink(),
    ],
    ids=["no marker", "half a marker", "another marker", "missing file", "file cut", "file changed", "missing below"],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over_for_the_one_before(tmp_path, harm):
    whole, broken = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert last_complete(tmp_path) == broken
    harm(broken)
    assert last_complete(tmp_path) == whole and not broken.exists()
    assert last_complete(tmp_path / "none") is None


def test_a_checkpoint_whose_best_one_is_broken_is_passed_over(tmp_path):
    """The trainer would load that one in the end without a look."""
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        place = checkpoint(tmp_path, step)
        state = {"best_model_checkpoint": str(tmp_path / f"checkpoint-{best}")}
        (place / "trainer_state.json").write_text(json.dumps(state))
        mark(place)
    assert last_complete(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"weightz")
    assert last_complete(tmp_path) == tmp_path / "checkpoint-1"


def test_a_marker_tells_files_sizes_and_hashes(tmp_path):
    marked = json.loads((checkpoint(tmp_path, 1) / MARKER).read_text())
    assert sorted(marked) == ["model.safetensors", "optimizer.pt", "ref/adapter.safetensors"]
    assert marked["optimizer.pt"]["size"] == 7 and len(marked["optimizer.pt"]["sha256"]) == 64


def test_a_folder_may_be_marked_from_outside(tmp_path):
    place = checkpoint(tmp_path, 1)
    (place / MARKER).unlink()
    mark(place, tmp_path / "done.json")
    assert is_complete(place, tmp_path / "done.json") and not is_complete(place)


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    places = {step: checkpoint(tmp_path, step) for step in (2, 4, 6, 8, 10)}
    prune(tmp_path, 2, spare=places[4])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-4", "checkpoint-8"]
    assert last_complete(tmp_path) == places[10]


def test_what_is_being_removed_does_not_count_as_complete(tmp_path, monkeypatch):
    """A kill in the midst of a removal leaves files, but no marker."""
    old, _ = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    monkeypatch.setattr("proxytune.experts.checkpoints.remove_folder", lambda folder: None)
    prune(tmp_path, 1)
    assert old.exists() and not is_complete(old)
