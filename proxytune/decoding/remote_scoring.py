"""The loss of given replies with the base behind an API, where the server's scores say it for certain.

A loss needs the mass of the whole vocabulary. What a server leaves out has a mass that is bounded (as in
steering/candidates): where all bounds together move a token's loss by no more than scores may be off anyway, the loss
is told, else it is not, and nothing is put in its place. Lists of a thousand ids do not do; whole ones do.

Which of several continuations of one token each is the likeliest needs no mass: their own scores say it.

Shapes: T positions of a reply, V shared vocabulary.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from proxytune.decoding.mixture import Mixture, Prompts
from proxytune.decoding.scoring import Given, check, scored
from proxytune.decoding.served import Served
from proxytune.models.probe import WOBBLE
from proxytune.models.replies import Query, Told
from proxytune.models.source import Term
from proxytune.steering import candidates
from proxytune.steering.candidates import Bounds

FIRST = 8192  # scores asked for at each position before the whole of a larger vocabulary is
MOST = 4_000_000  # scores in an answer; more would be some 200 MB


@dataclass(frozen=True)
class Weight:
    """What one reply weighs: nats under each entry of alphas, None where they cannot be told; the calls it took."""

    nats: list[float] | None
    calls: int


@dataclass(frozen=True)
class Standing:
    """How continuations of one token each stand under one entry of alphas.

    nats: relative to each other, None for those whose score the server did not give. certain: none of these can be
    likelier than the best of the others.
    """

    nats: list[float | None]
    certain: bool


class Weigher:
    """Weighs replies with the base that `served` has, and the small models of `mixture` (`remote.small`).

    rows: at once at most; no more than calls may be in flight.
    """

    def __init__(self, served: Served, mixture: Mixture, rows: int | None = None):
        self.served, self.mixture, self.batch = served, mixture, served.at_once(rows)
        self.abilities, self.unbounded = served.probe.abilities, served.base.dialect.unbounded
        self.size = mixture.vocabulary.size

    @property
    def able(self) -> bool:
        """Whether losses may be had at all: whole lists, or long ones where one call has all positions of a reply.

        Not where the server's own scores change by more than `WOBBLE`.
        """
        long = self.abilities.top >= min(self.size, FIRST if self.abilities.prompt_scores else self.size)
        return long and self.abilities.tolerance <= 2 * WOBBLE

    def losses(self, rows: Sequence[Given], alphas: Sequence[Sequence[float]]) -> Iterator[tuple[int, Weight]]:
        """Yield (place, what that row weighs); nothing more is asked once a row's loss cannot be told.

        What was done before a fault is yielded first.
        """
        able = self.able
        for first in range(0, len(rows), self.batch):
            part = rows[first : first + self.batch]
            if not able:
                yield from ((first + i, Weight(None, 0)) for i in range(len(part)))
                continue
            scores = _scored(self.mixture, part)
            work = [self._weigh(row, its, alphas) for row, its in zip(part, scores, strict=True)]
            for i, weight in self._together(work):
                yield first + i, weight
                able = able and weight.nats is not None

    def standings(
        self, prompts: Sequence[Prompts], options: Sequence[Sequence[int]], alphas: Sequence[Sequence[float]]
    ) -> Iterator[tuple[int, list[Standing], int]]:
        """Yield (place of the prompt, how its continuations of one id stand under every entry of alphas, calls)."""
        for first in range(0, len(prompts), self.batch):
            here = slice(first, first + self.batch)
            given = [Given(each, ids[:1]) for each, ids in zip(prompts[here], options[here], strict=True)]
            scores = _scored(self.mixture, given)
            parts = zip(prompts[here], options[here], scores, strict=True)
            for i, found in self._together([self._stand(*part, alphas) for part in parts]):
                yield first + i, *found

    def _together(self, work: Sequence[Coroutine[Any, Any, Any]]) -> Iterator[tuple[int, Any]]:
        """(place, result) of all that came to one; then the first fault is raised."""

        async def all_() -> list[Any]:
            async with self.served.base:
                return await asyncio.gather(*work, return_exceptions=True)

        found = asyncio.run(all_())
        yield from ((i, each) for i, each in enumerate(found) if not isinstance(each, BaseException))
        for each in found:
            if isinstance(each, BaseException):
                raise each

    async def _weigh(self, row: Given, scores: Mapping[Term, Tensor], alphas: Sequence[Sequence[float]]) -> Weight:
        calls, most = 0, self.abilities.top
        for top in sorted({min(most, FIRST), most}):
            told = await self._ask(row, top)
            if told is None:
                break
            calls += 1 if self.abilities.prompt_scores else len(told)
            nats = self._nats(told, row.completion, scores, alphas)
            if nats is not None:
                return Weight(nats, calls)
        return Weight(None, calls)

    async def _ask(self, row: Given, top: int) -> list[Told] | None:
        """The base's `top` best at each position of a reply: in one call, else in one for each."""
        ids, count = (*row.prompts["base"], *row.completion[:-1]), len(row.completion)
        if top * (len(ids) if count > 1 else 1) > MOST:
            return None
        if self.abilities.prompt_scores or count == 1:
            return await self.served.base.ask(Query(ids, top, positions=count))
        ends = range(len(ids) - count + 1, len(ids) + 1)
        return [told for end in ends for told in await self.served.base.ask(Query(ids[:end], top))]

    def _bounds(self, told: Sequence[Told], scores: Mapping[Term, Tensor], alphas: Sequence[float]) -> Bounds:
        width = max(len(each.ids) for each in told)
        ids = torch.tensor([each.ids + [-1] * (width - len(each.ids)) for each in told], dtype=torch.int64)
        known = torch.tensor([each.scores + [-torch.inf] * (width - len(each.ids)) for each in told])
        floors = torch.tensor([each.floor for each in told])
        unbounded = [each for each in self.unbounded if each < self.size]
        base = candidates.bound(ids, known.float(), floors, self.size, unbounded=unbounded)
        differences = [each.float().cpu() for each in self.mixture.differences(scores)]
        steered = candidates.steer_bounds(base, list(zip(differences, alphas, strict=True)))
        allowed = candidates.forbid(steered, self.mixture.vocabulary.foreign)
        check(allowed.upper_BV.amax(-1))
        return allowed

    def _nats(
        self, told: Sequence[Told], completion: Sequence[int], scores: Mapping[Term, Tensor], alphas
    ) -> list[float] | None:
        wanted_T1, found = torch.tensor(list(completion))[:, None], []
        for entry in alphas:
            bounds = self._bounds(told, scores, entry)
            said_T1 = bounds.lower_BV.gather(-1, wanted_T1)
            mass_T1 = torch.logsumexp(bounds.lower_BV, -1, keepdim=True)
            beyond_T1 = torch.log1p((_beyond(bounds) - mass_T1).exp())
            if (said_T1 == -torch.inf).any() or (beyond_T1 > self.served.base.settings.tolerance).any():
                return None
            found.append(float((mass_T1 + beyond_T1 / 2 - said_T1).double().sum()))
        return found

    async def _stand(
        self, prompts: Prompts, options: Sequence[int], scores: Mapping[Term, Tensor], alphas: Sequence[Sequence[float]]
    ) -> tuple[list[Standing], int]:
        able = self.abilities
        chosen = tuple(dict.fromkeys(options)) if len(options) <= able.chosen else ()
        top = min(self.served.base.settings.top, able.top)
        ids = tuple(prompts["base"])
        told, calls = (await self.served.base.ask(Query(ids, top, chosen)))[0], 1
        if not chosen and top < able.top and not set(options) <= set(told.ids):
            told, calls = told.merge((await self.served.base.ask(Query(ids, able.top)))[0]), 2
        return [self._standing(told, options, scores, entry) for entry in alphas], calls

    def _standing(self, told: Told, options: Sequence[int], scores: Mapping[Term, Tensor], alphas) -> Standing:
        bounds = self._bounds([told], scores, alphas)
        lower, upper = (ends_BV[0, list(options)].tolist() for ends_BV in (bounds.lower_BV, bounds.upper_BV))
        known = [score for score in lower if score > -torch.inf]
        best = max(known, default=-torch.inf)
        certain = all(high < best for high, low in zip(upper, lower, strict=True) if low == -torch.inf)
        nats = [best - score if score > -torch.inf else None for score in lower]
        return Standing(nats, bool(known) and certain)


def _beyond(bounds: Bounds) -> Tensor:
    """The log of the most mass that all unknown tokens can have together, (T, 1)."""
    unknown_TV = bounds.upper_BV.masked_fill(bounds.known_BV, -torch.inf)
    largest_TV = unknown_TV.sort(-1, descending=True).values.double()
    return largest_TV.logcumsumexp(-1).gather(-1, bounds.most_B[:, None] - 1).float()


@torch.inference_mode()
def _scored(mixture: Mixture, rows: Sequence[Given]) -> list[dict[Term, Tensor]]:
    return scored(mixture, rows)
