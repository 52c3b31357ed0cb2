"""Who drafts, and how many tokens: decided at run time from measured acceptance and measured costs.

A round that drafts k tokens says (1 - b^(k+1)) / (1 - b) tokens on average where each drafted token holds with
probability b (Leviathan et al. 2023, arXiv 2211.17192, equation 1). It costs k reads by the models that draft, one read
of k + 1 positions by the others, and, where all k held, one more by those that draft. An anti that shares the expert's
weights is among those that draft.
"""

from __future__ import annotations

from bisect import bisect
from collections import defaultdict, deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Protocol

import torch

from proxytune.decoding.mixture import Mixture, Term
from proxytune.decoding.round import Round
from proxytune.errors import SettingsError, did_you_mean
from proxytune.steering.arithmetic import steer

MOST = 7  # drafted tokens in a round
PROBE = 4  # how many are drafted to find out what drafting costs and how much of it holds
PRIOR = (3.2, 4.0)  # drafted tokens that held, of so many: believed before any was tried, so one bad draft ends nothing
AGAIN = 64  # rounds after which the other way, drafts or none, is tried again


class Drafter(Protocol):
    """`terms` are read one position at a time while drafting, so their scores need no second read."""

    @property
    def terms(self) -> Sequence[Term]: ...

    def propose(self, round: Round, count: int) -> None:
        """Draft `count` tokens for every row with `round.draft`. Any tokens are allowed."""
        ...


@dataclass(frozen=True)
class Chain:
    """Small models draft, token by token, by the row's own rules and noise.

    `expert`: the expert's scores, the first of terms. `pair`: anti + alpha * (expert - anti), the steering with the
    anti as its base; at alpha 1 both draft the same.
    """

    terms: Sequence[Term]
    pairs: Sequence[tuple[Term, Term]] = ()

    def propose(self, round: Round, count: int) -> None:
        for position in range(count):
            round.extend(self.terms, position + 1)
            at = {term: round.scores[term][:, position : position + 1] for term in self.terms}
            if self.pairs:
                alphas = [alpha_R1[:, :, None] for alpha_R1 in round.rows.alphas]
                differences = [(at[expert] - at[anti], a) for (expert, anti), a in zip(self.pairs, alphas, strict=True)]
                scores_R1V = steer(at[self.pairs[0][1]], differences)
            else:
                scores_R1V = at[self.terms[0]]
            round.draft(round.choose(round.mixture.vocabulary.mask(scores_R1V), position))


@dataclass(frozen=True)
class Lookup:
    """What followed the last few tokens where they last stood in prompt or reply (prompt lookup, Saxena 2023)."""

    longest: int = 3
    terms: Sequence[Term] = ()

    def propose(self, round: Round, count: int) -> None:
        drafts = torch.tensor([self._after(ids, count) for ids in round.rows.texts()], device=round.rows.device)
        round.draft(drafts.clamp(max=round.mixture.vocabulary.size - 1))  # the base's prompt may hold ids of its own

    def _after(self, ids: list[int], count: int) -> list[int]:
        for size in range(min(self.longest, len(ids) - 1), 0, -1):
            tail = ids[-size:]
            for at in range(len(ids) - size - 1, -1, -1):
                if ids[at : at + size] == tail:
                    found = ids[at + size : at + size + count]
                    return found + [ids[-1]] * (count - len(found))
        return [ids[-1]] * count


DRAFTERS = ("none", "expert", "pair", "ngram")


def drafter(name: str, mixture: Mixture) -> Drafter | None:
    """The drafter of that name for a mixture; None where nothing is drafted, as for a mixture without pairs."""
    if name not in DRAFTERS:
        raise SettingsError(f"drafter={name} is not known", did_you_mean(name, DRAFTERS))
    if name == "ngram":
        return Lookup()
    if name == "none" or not mixture.pairs:
        return None
    if name == "expert":
        # What shares the expert's weights is read with it, at nearly no cost, and needs no reading afterwards.
        expert = mixture.pairs[0][0]
        return Chain((expert, *(term for term in mixture.terms if term.source is expert.source and term != expert)))
    return Chain(tuple(term for term in mixture.terms if term != mixture.base), mixture.pairs)


@dataclass
class Stats:
    """What the loop did. forwards, seconds: timed reads of each model, by role."""

    rounds: int = 0
    row_rounds: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    forwards: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that held, of those that were looked at."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_round(self) -> float | None:
        """Tokens said for each position that a row read by itself: 1 without drafts."""
        return self.tokens / self.row_rounds if self.row_rounds else None


class Clock:
    """Times of the models' reads, by what was read: `costs` are seconds by width, for each roles and size of batch.

    A GPU has to be waited for, so its reads are timed in every 16th round, and where the planner wants to know
    (`asked`); the first of a kind is not, which loads its kernels.
    """

    def __init__(self, stats: Stats):
        self.stats = stats
        self.asked = False
        self.seen: dict[tuple[tuple[str, ...], int, int], deque[float]] = {}
        self.costs: dict[tuple[tuple[str, ...], int], dict[int, float]] = defaultdict(dict)

    @contextmanager
    def reading(self, part: Sequence[Term], rows: int, width: int) -> Generator[None]:
        device, roles, size = part[0].source.device, tuple(term.role for term in part), rows.bit_length()
        waits = device.type == "cuda"
        first = (roles, size, width) not in self.seen
        seen = self.seen.setdefault((roles, size, width), deque(maxlen=9))
        if waits and (first or (self.stats.rounds % 16 and not self.asked)):
            yield
            return
        if waits:
            torch.cuda.synchronize(device)
        began = perf_counter()
        yield
        if waits:
            torch.cuda.synchronize(device)
        seen.append(perf_counter() - began)
        self.stats.forwards["+".join(roles)] += 1
        self.stats.seconds["+".join(roles)] += seen[-1]
        self.costs[roles, size][width] = median(seen)

    def cost(self, roles: tuple[str, ...], rows: int, width: int) -> float | None:
        """Seconds of such a read: measured, or on the line through the measured widths beside it."""
        known = self.costs[roles, rows.bit_length()]
        if width in known or len(known) < 2:
            return known.get(width, next(iter(known.values()), None))
        widths = sorted(known)
        at = min(max(bisect(widths, width), 1), len(widths) - 1)
        low, high = widths[at - 1], widths[at]
        slope = (known[high] - known[low]) / (high - low)
        return max(known[low] + slope * (width - low), 0.1 * known[low])


class Planner:
    """Chooses how many tokens to draft each round; `fixed` drafts always so many."""

    def __init__(self, mixture: Mixture, drafter: Drafter | None, clock: Clock, fixed: int | None = None):
        self.mixture, self.drafter, self.clock, self.fixed = mixture, drafter, clock, fixed
        self.held, self.tried = PRIOR
        self.round = 0

    def next(self, rows: int) -> int:
        if self.drafter is None:
            return 0
        if self.fixed is not None:
            return self.fixed
        self.round += 1
        rates = {count: self._rate(count, rows) for count in range(MOST + 1)}
        untimed, again = None in rates.values(), self.round % AGAIN == 0
        self.clock.asked = untimed or again
        if untimed:  # some read, with about so many rows
            return PROBE if self.round % 2 else 0
        best = max(rates, key=lambda count: rates[count] or 0.0)
        if again:  # what was not done for long is timed anew
            return 0 if best else PROBE
        return best

    def learn(self, count: int, kept: Sequence[int]) -> None:
        if count:
            self.held = 0.98 * self.held + sum(kept)
            self.tried = 0.98 * self.tried + sum(min(k + 1, count) for k in kept)

    def _rate(self, count: int, rows: int) -> float | None:
        """Expected tokens a second and row when `count` are drafted; None where a cost is not known yet."""
        assert self.drafter is not None
        b = min(self.held / self.tried, 0.999)
        readers = self.drafter.terms if count else ()
        total = 0.0
        for group in self.mixture.groups:
            drafting = tuple(term.role for term in group if term in readers)
            rest = tuple(term.role for term in group if term not in readers)
            for roles, width, times in (
                (drafting, 1, count + 1 - (1 - b**count) ** rows),
                (rest, count + 1, 1.0),
            ):
                if roles:
                    cost = self.clock.cost(roles, rows, width)
                    if cost is None:
                        return None
                    total += times * cost
        return (1 - b ** (count + 1)) / (1 - b) / total
