"""How many tokens are drafted, and what reads are timed for it; costs come from a clock that the tests set."""

from __future__ import annotations

import pytest
import torch

from proxytune.decoding import drafting
from proxytune.decoding.drafting import AGAIN, MOST, Clock, Planner, Stats
from proxytune.decoding.mixture import Mixture
from proxytune.errors import SettingsError
from proxytune.models.source import Term
from proxytune.models.vocabulary import Vocabulary
from tests.decoding.tiny_models import mixture


class Placed:
    """All of a source that costs depend on."""

    def __init__(self, device: str):
        self.device = torch.device(device)


class Machine:
    """Reads that cost what they are said to: `cost` seconds by role, and a tenth of that for each further position."""

    def __init__(self, monkeypatch, device: str, **cost: float):
        self.now, self.waited, self.cost = 0.0, 0, cost
        monkeypatch.setattr(drafting, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", self._wait)
        base, small = Placed(device), Placed(device)
        pair = (Term(small, "expert", 1), Term(small, "anti", 0))
        self.mixture = Mixture(Term(base, "base"), Vocabulary(9, ()), (pair,))
        self.clock = Clock(Stats())
        self.planner = Planner(self.mixture, drafting.drafter("expert", self.mixture), self.clock)

    def _wait(self, device) -> None:
        self.waited += 1

    def round(self, holds: bool) -> int:
        """One round of the loop; returns how many tokens were drafted."""
        count = self.planner.next(1)
        base, small = self.mixture.groups
        for part, width in [(small, 1)] * (count + holds) + [(base, count + 1)]:
            with self.clock.reading(part, 1, width):
                self.now += self.cost[part[0].role] * (1 + (width - 1) / 10)
        self.planner.learn(count, [count if holds else 0])
        self.clock.stats.rounds += 1
        return count


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("holds", "best"), [(True, MOST), (False, 0)])
def test_as_many_are_drafted_as_pay_whatever_is_timed(monkeypatch, device, holds, best):
    machine = Machine(monkeypatch, device, base=1.0, expert=0.05)
    counts = [machine.round(holds) for _ in range(AGAIN)]
    assert set(counts[40:-1]) == {best}
    assert counts[-1] != best  # the other way, tried again


def test_a_gpu_is_waited_for_only_where_its_times_are_wanted(monkeypatch):
    machine = Machine(monkeypatch, "cuda", base=1.0, expert=0.05)
    waited = []
    for number in range(2 * AGAIN):
        before = machine.waited
        machine.round(True)
        waited += [number] * (machine.waited > before)
    assert {each for each in waited if each > 10} == {*range(16, 128, 16), AGAIN - 1, 2 * AGAIN - 1}
    assert machine.clock.cost(("base",), 1, 1) == 1.0  # timed when it was tried again, though it never paid


def test_the_first_read_of_a_kind_on_a_gpu_is_not_timed_since_it_loads_kernels(monkeypatch):
    machine = Machine(monkeypatch, "cuda", base=1.0, expert=0.05)
    base, _ = machine.mixture.groups
    for seconds in (9.0, 1.0):
        assert machine.clock.cost(("base",), 1, 5) is None
        with machine.clock.reading(base, 1, 5):
            machine.now += seconds
    assert machine.clock.cost(("base",), 1, 5) == 1.0


def test_a_width_that_was_never_read_costs_what_lies_on_the_line():
    clock = Clock(Stats())
    assert clock.cost(("base",), 1, 3) is None
    clock.costs[("base",), 1] = {5: 3.0}
    assert clock.cost(("base",), 1, 1) == 3.0
    clock.costs[("base",), 1] = {2: 1.0, 5: 4.0, 6: 4.5}
    assert [clock.cost(("base",), 1, width) for width in (1, 2, 4, 8)] == [0.1, 1.0, 3.0, 5.5]


def test_one_bad_draft_does_not_end_drafting():
    mix = mixture()
    planner = Planner(mix, drafting.drafter("expert", mix), Clock(Stats()))
    for roles, seconds in ((("base",), 1.0), (("expert",), 0.1), (("anti",), 0.1)):
        planner.clock.costs[roles, 1] = {width: seconds * (1 + 0.3 * width) for width in range(1, 9)}
    planner.learn(4, [0])
    assert planner.next(1) > 0
    for _ in range(30):
        planner.learn(4, [0])
    assert planner.next(1) == 0


def test_an_unknown_drafter_is_answered_with_the_nearest():
    with pytest.raises(SettingsError, match="expert"):
        drafting.drafter("expret", mixture())
