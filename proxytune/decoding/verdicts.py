"""What is known of one row's next positions, what is chosen there, and what to ask where that is not certain.

Each position climbs a ladder of its own: the best scores that the round asked for, then the tokens in the certificate's
way by id, or longer lists. Which rung comes next follows from what is known at that position alone, so neither drafts
nor neighbours change what is said, certified or not. One call climbs for all positions that the draft may still reach.

Shapes as in steering/candidates, with B = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from proxytune.decoding.round import Round
from proxytune.models.probe import Abilities
from proxytune.models.replies import Query, Told
from proxytune.steering import candidates
from proxytune.steering.arithmetic import steer
from proxytune.steering.candidates import Decision
from proxytune.steering.choice import gumbel

RUNGS = 5  # of a ladder: questions about one token before it is marked
LONGER = 8  # times as many scores on the next rung


def prefix(round: Round, i: int, drafted: int) -> tuple[int, ...]:
    """What the base reads of a row: the prompt, the reply so far, and so many drafted tokens."""
    row = round.rows.each[i]
    start = row.reply.token_ids[: int(round.rows.counts_R1[i])]
    return (*row.request.prompts["base"], *start, *round.drafted_RK[i, :drafted].tolist())


@dataclass(frozen=True)
class Step:
    """The next rung at one position: a list of the `top` best scores, or the tokens in `chosen`."""

    top: int
    chosen: tuple[int, ...] = ()


@dataclass
class Question:
    """A query for some positions' next rungs; `learn` takes its answer in."""

    verdicts: Verdicts
    steps: dict[int, Step]
    query: Query

    def learn(self, told: Sequence[Told]) -> None:
        first = min(self.steps)
        for position, step in self.steps.items():
            self.verdicts.ahead[position] = (step, told[position - first])


@torch.inference_mode()
def likely(round: Round, i: int, positions: int, count: int) -> list[tuple[int, ...]]:
    """At each position of row `i` the `count` ids that pull and noise favour most: where best scores leave them out,
    they are in the certificate's way.

    None for greedy choices, which seldom need them, and with top-p, where the mass of all tokens is in the way.
    """
    request = round.rows.each[i].request
    sampling = request.sampling
    if not (count and sampling.temperature and sampling.top_p == 1):
        return [()] * positions
    scores = {term: scores_RQV[i, :positions] for term, scores_RQV in round.scores.items()}
    differences = list(zip(round.mixture.differences(scores), request.alphas, strict=True))
    pull_QV = steer(torch.zeros_like(differences[0][0]), differences) / sampling.temperature
    said_Q = round.rows.counts_R1[i] + torch.arange(positions, device=pull_QV.device)
    pull_QV += gumbel(torch.full_like(said_Q, sampling.seed), said_Q, pull_QV.shape[-1])
    return [tuple(ids) for ids in pull_QV.topk(min(count, pull_QV.shape[-1])).indices.tolist()]


def own(told: Told, beside: Sequence[int]) -> Told:
    """Of what was told of a position its best scores, and the ids asked for because of this very position."""
    if not beside:
        return told
    kept = {i: s for i, s in zip(told.ids, told.scores, strict=True) if s >= told.floor or i in beside}
    return Told([*kept], [*kept.values()], told.floor, told.said)


class Verdicts:
    """The positions of row `i` in a round; told: the base's answer to it, one a position."""

    def __init__(
        self, round: Round, i: int, unbounded: Sequence[int], abilities: Abilities, top: int, told: Sequence[Told]
    ):
        self.round, self.i, self.abilities = round, i, abilities
        self.unbounded = [each for each in unbounded if each < round.mixture.vocabulary.size]
        self.told, self.tops, self.rungs = list(told), [top] * len(told), [1] * len(told)
        self.drafted: list[int] = round.drafted_RK[i].tolist()
        self.ahead: dict[int, tuple[Step, Told]] = {}
        self.decided: dict[int, Decision] = {}

    def decide(self, position: int) -> Decision:
        """The choice at a position, from all that is known there."""
        self._climb(position)
        if position not in self.decided:
            self.decided[position] = self._decide(position)
        return self.decided[position]

    def question(self, position: int) -> Question | None:
        """What to ask about an open position and those that the draft may reach from it; None if nothing helps."""
        step = self._step(position)
        if step is None:
            return None
        steps, last = {position: step}, position
        while self._together(step) and last < len(self.drafted) and self._may_hold(last):
            last += 1
            if last not in self.ahead and not self.decide(last).certified_B:
                other = self._step(last)
                if other and self._same_kind(steps, other):
                    steps[last] = other
        last, chosen = max(steps), dict.fromkeys(i for each in steps.values() for i in each.chosen)
        ids = prefix(self.round, self.i, last)
        return Question(self, steps, Query(ids, step.top, tuple(chosen), positions=last - position + 1))

    def _may_hold(self, position: int) -> bool:
        """Whether the drafted token may still be the choice: what is open is better foretold by the draft."""
        decision = self.decide(position)
        return not decision.certified_B or int(decision.tokens_B) == self.drafted[position]

    def _together(self, step: Step) -> bool:
        return self.abilities.prompt_scores and (not step.chosen or self.abilities.chosen_inside)

    def _same_kind(self, steps: dict[int, Step], other: Step) -> bool:
        first = next(iter(steps.values()))
        count = len({i for each in (*steps.values(), other) for i in each.chosen})
        return bool(first.chosen) == bool(other.chosen) and first.top == other.top and count <= self.abilities.chosen

    def _climb(self, position: int) -> None:
        """Take in what was learnt for a position, of it only what its own next step asks."""
        if position not in self.ahead or self._decided_certain(position):
            return
        step, told = self.ahead.pop(position)
        if step.chosen:
            wanted = {i: score for i, score in zip(told.ids, told.scores, strict=True) if i in step.chosen}
            told = Told(list(wanted), list(wanted.values()), told.floor)
        self.told[position], self.tops[position] = self.told[position].merge(told), step.top
        self.rungs[position] += 1
        self.decided.pop(position, None)

    def _decided_certain(self, position: int) -> bool:
        return position in self.decided and bool(self.decided[position].certified_B)

    def _step(self, position: int) -> Step | None:
        rivals_V = self.decided[position].rivals_BV[0]
        rivals, top, able = int((rivals_V > -torch.inf).sum()), self.tops[position], self.abilities
        longer = min(able.top, top * LONGER)
        if not rivals or self.rungs[position] >= RUNGS:
            return None
        by_id = able.chosen and (able.chosen_inside or not able.prompt_scores) and rivals <= RUNGS * able.chosen
        if longer > top and not by_id:
            return Step(longer)
        if able.chosen:
            return Step(top, tuple(sorted(rivals_V.topk(min(rivals, able.chosen)).indices.tolist())))
        return None

    @torch.inference_mode()
    def _decide(self, position: int) -> Decision:
        round, told = self.round, self.told[position]
        rows, vocabulary, device = round.rows, round.mixture.vocabulary, round.rows.device
        request = rows.each[self.i].request
        scores = {term: scores_RQV[self.i : self.i + 1, position] for term, scores_RQV in round.scores.items()}
        differences = list(zip(round.mixture.differences(scores), request.alphas, strict=True))
        dtype = differences[0][0].dtype
        bounds = candidates.bound(
            torch.tensor([told.ids], dtype=torch.int64, device=device),
            torch.tensor([told.scores], dtype=dtype, device=device),
            torch.tensor([told.floor], dtype=dtype, device=device),
            vocabulary.size,
            tolerance=self.abilities.tolerance,
            unbounded=self.unbounded,
        )
        said = int(rows.counts_R1[self.i]) + position
        never = [*vocabulary.foreign, *request.limits.banned]
        if said < request.limits.min_new_tokens:
            never += [end for end in request.limits.end_ids if end < vocabulary.size]
        whole = candidates.forbid(candidates.steer_bounds(bounds, differences), never)
        if not whole.upper_BV.amax(-1).isfinite().all():
            raise rows.broken(self.i, position)
        sampling = request.sampling
        if not sampling.temperature:
            return candidates.decide(whole)
        bounds = candidates.narrow(
            whole, sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p
        )
        seed, at = torch.tensor([sampling.seed], device=device), torch.tensor([said], device=device)
        return candidates.decide(bounds, gumbel(seed, at, vocabulary.size), whole)
