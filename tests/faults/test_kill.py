"""A command that is killed at any of its writes, or at any moment, and run again ends as if it had been left alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection
from dataclasses import replace

import pytest

from tests.faults.conftest import LONG
from tests.faults.place import COMMANDS, Place, Resumed, Whole
from tests.faults.warm import Ended
from tests.tracking.conftest import server  # noqa: F401
from tests.tracking.wandb_server import KEY

POINTS, MOMENTS = 3, 20  # kills at writes of a command in the short form; at random moments in the long one
BRIEF = ("expert", "decode", "evaluate", "tag", "import")  # in the short form
ALL = [name if name in BRIEF else pytest.param(name, marks=pytest.mark.crash) for name in COMMANDS]


def points(whole: Whole, kinds: Collection[str] = ()) -> list[int]:
    """Every write (of these kinds, where some are given), or in the short form a few spread over all of them."""
    found = [at for at, seen in enumerate(whole.ended.seen, 1) if not kinds or seen.split()[0] in kinds]
    if LONG:
        return found
    return [found[(2 * n + 1) * len(found) // (2 * POINTS)] for n in range(POINTS)]


def tell(record: Callable[[str, object], None], done: dict[str, Resumed]) -> None:
    """Count the kills, and fail on those that broke something."""
    record("kills", len(done))
    record("lost or changed", sum(map(bool, (one.faults for one in done.values()))))
    record("units redone at most", max((one.redone for one in done.values()), default=0))
    record("seconds more at most", round(max((one.overhead for one in done.values()), default=0), 2))
    assert {where: one.faults for where, one in done.items() if one.faults} == {}


@pytest.mark.parametrize("name", ALL)
def test_a_kill_at_a_write_loses_nothing_and_changes_nothing(place: Place, name, record_property):
    whole = place.whole(name)
    found = {f"{at} {whole.ended.seen[at - 1]}": at for at in points(whole)}
    done = {where: place.killed_and_run_again(name, whole, at=at) for where, at in found.items()}
    assert [where for where, one in done.items() if not one] == [], "no kill came there"
    tell(record_property, {where: one for where, one in done.items() if one})


@pytest.mark.crash
@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_at_any_moment_loses_nothing_and_changes_nothing(place: Place, name, record_property):
    whole = place.whole(name)
    chance, done = random.Random(name), dict[str, Resumed]()
    while len(done) < MOMENTS:  # a kill that came when all was done does not count
        after = chance.uniform(0, whole.ended.wall)
        if one := place.killed_and_run_again(name, whole, after=after):
            done[f"after {after:.3f} s"] = one
    tell(record_property, done)


def test_a_sync_that_is_killed_uploads_and_links_every_run_in_the_end(place: Place, server, record_property):  # noqa: F811
    def synced(**how) -> Ended:
        return place.warm.run(["sync"], root=place.folder, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY, **how)

    assert place.run([*place.begin("decode"), "tracker=wandb"])[0].code == 0
    place.keep("mirrored")
    synced()
    place.reset("mirrored")
    server.artifacts.add("qa")
    whole, lines, (use,) = synced(), uploaded(server), server.named("UseArtifact")
    assert whole.code == 0 and all(lines.values()) and len(lines) == 1 and use["runName"] in lines

    def killed(**how) -> bool:
        place.reset("mirrored")
        server.runs.clear(), server.operations.clear()
        was_killed = synced(**how).code == -9
        again = synced()
        assert again.code == 0 and uploaded(server) == lines and use in server.named("UseArtifact"), (how, again.err)
        assert "no run waits" in synced().out
        return was_killed

    chance = random.Random("sync")
    kills = sum(killed(at=at) for at in range(1, len(whole.seen) + 1)) if LONG else 0
    wanted = kills + (MOMENTS if LONG else 1)
    while kills < wanted:
        kills += killed(after=chance.uniform(0, whole.wall))
    record_property("kills", kills)


def uploaded(server) -> dict[str, list[tuple[int, list[str]]]]:  # noqa: F811
    """By run the step and the keys of each line: their order, and what an artifact is called, differ each time."""
    lines = {run: map(json.loads, lines) for run, lines in server.runs.items()}
    return {run: [(line["_step"], sorted(line)) for line in its] for run, its in lines.items()}


def test_a_killed_writer_s_rest_is_cleared_by_the_next_one(tmp_path, monkeypatch):
    from proxytune import files

    rest, held = (tmp_path / f".a.json.{name}.tmp" for name in ("dead", "living"))
    rest.touch()
    monkeypatch.setattr(files, "LEFTOVER_SECONDS", -1.0)
    with files.locked(held):
        files.write_json(tmp_path / "a.json", {})
    assert sorted(tmp_path.iterdir()) == sorted([held, tmp_path / "a.json"])


def test_a_damaged_step_of_the_harness_would_be_seen(place: Place):
    """The comparison itself: a reply that differs, a file that is lost and one that is new are told."""
    whole = place.whole("decode")
    changed = {**whole.tree, "replies.jsonl": [{"id": "other"}], "lost.json": [1]}
    told = place.killed_and_run_again("decode", replace(whole, tree=changed), at=9)
    assert told and "replies.jsonl differs" in told.faults and "lost.json is lost" in told.faults
