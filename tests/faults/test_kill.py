"""A command that is killed at any of its writes, or at any moment, and run again ends as if it had been left alone."""

from __future__ import annotations

import random

import pytest

from tests.faults.conftest import LONG
from tests.faults.place import Place, Whole

POINTS, MOMENTS = 3, 20  # kills at writes of each stage in the short form; at random moments in the long one
STAGES = ("expert", "decode", "evaluate", "sweep")
SHORT = (*STAGES[:3], pytest.param("sweep", marks=pytest.mark.crash))


def job(place: Place, stage: str) -> tuple[str, list[str]]:
    if stage == "tag":
        return "trained", ["registry", "tag", "qa", "good"]
    return "empty" if stage == "expert" else "trained", place.stage(stage)


def points(whole: Whole) -> list[int]:
    """Every write, or a few spread over all of them."""
    count = len(whole.seen)
    return list(range(1, count + 1)) if LONG else [1 + (2 * n + 1) * count // (2 * POINTS) for n in range(POINTS)]


@pytest.mark.parametrize("stage", [*SHORT, "tag"])
def test_a_kill_at_a_write_loses_nothing_and_changes_nothing(place, stage):
    state, arguments = job(place, stage)
    whole = place.whole(state, arguments)
    broken = {
        (at, whole.seen[at - 1]): faults
        for at in points(whole)
        if (faults := place.killed_and_run_again(state, arguments, whole, at=at))
    }
    assert broken == {}


@pytest.mark.crash
@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_any_moment_loses_nothing_and_changes_nothing(place, stage):
    state, arguments = job(place, stage)
    whole = place.whole(state, arguments)
    chance = random.Random(stage)
    moments = [chance.uniform(0, whole.seconds) for _ in range(MOMENTS)]
    broken = {
        after: faults
        for after in moments
        if (faults := place.killed_and_run_again(state, arguments, whole, after=after))
    }
    assert broken == {}


def test_a_killed_writer_s_rest_is_cleared_by_the_next_one(tmp_path, monkeypatch):
    from proxytune import files

    rest, held = (tmp_path / f".a.json.{name}.tmp" for name in ("dead", "living"))
    rest.touch()
    monkeypatch.setattr(files, "LEFTOVER_SECONDS", -1.0)
    with files.locked(held):
        files.write_json(tmp_path / "a.json", {})
    assert sorted(tmp_path.iterdir()) == sorted([held, tmp_path / "a.json"])


def test_a_damaged_step_of_the_harness_would_be_seen(place):
    """The comparison itself: a reply that differs, a file that is lost and one that is new are told."""
    state, arguments = job(place, "decode")
    whole = place.whole(state, arguments)
    changed = {**whole.tree, "replies.jsonl": [{"id": "other"}], "lost.json": [1]}
    told = place.killed_and_run_again(state, arguments, Whole(changed, whole.units, whole.seconds, whole.seen), at=9)
    assert "replies.jsonl differs" in told and "lost.json is lost" in told
