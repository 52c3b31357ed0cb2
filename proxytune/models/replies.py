"""What is asked of a server, and what it tells: checked, since a wrong score is worse than none.

A score that is no log-probability, a wrong count or order, probabilities that add up to more than 1 raise BadReply, and
nothing is made of the rest of the answer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxytune.errors import ModelError

ABOVE_ZERO = 1e-4  # how far a log-probability may be above 0, and each probability be off: rounding
NEVER = -9999.0  # vLLM and others write this for -inf


class BadReply(ModelError):
    """A server's answer that cannot be believed."""


class Spoilt(BadReply):
    """An answer that was mixed up with another request's; the next one may be whole."""


@dataclass(frozen=True)
class Query:
    """Ask what follows each of the last `positions` of `ids`: the `top` best tokens, or those in `chosen`.

    beside: ids that are asked for as well as the best ones, where a server tells both. extra: fields that replace those
    of the request's body, to find out what a server makes of them.
    """

    ids: tuple[int, ...]
    top: int
    chosen: tuple[int, ...] = ()
    positions: int = 1
    beside: tuple[int, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Told:
    """What a server told of one position: log-probabilities of some ids; no other id scores above `floor`.

    An id of -1 stands for a text that could be any of several ids. said: the id that the server chose itself.
    """

    ids: list[int]
    scores: list[float]
    floor: float
    said: int | None = None

    def merge(self, other: Told) -> Told:
        """What both tell together."""
        known = {i: score for i, score in zip(self.ids, self.scores, strict=True) if i >= 0}
        fresh = [(i, s) for i, s in zip(other.ids, other.scores, strict=True) if i >= 0 and i not in known]
        return Told(
            [*self.ids, *(i for i, _ in fresh)],
            [*self.scores, *(s for _, s in fresh)],
            min(self.floor, other.floor),
            self.said,
        )


def checked(pairs: Sequence[tuple[Any, Any]], count: int, *, said: int | None = None, apart: int | None = None) -> Told:
    """The `count` best (id, score) pairs of a position, in order, as Told.

    apart: an id that some servers put out of order, or add to the best ones: the token they chose.
    """
    _believe(pairs)
    best, extra = [score for i, score in pairs if i != apart], [score for i, score in pairs if i == apart]
    if len(pairs) != count and (len(pairs) != count + 1 or len(best) != count):
        raise BadReply(f"asked for {count} scores, the server gave {len(pairs)}")
    floor = best[-1] if len(pairs) > count else min(best + extra)
    if any(a < b for a, b in itertools.pairwise(best)) or (len(pairs) > count and extra[0] > floor):
        raise BadReply("the server's best scores are not in order")
    return _told(pairs, max(min(floor, 0.0), NEVER), said)


def named(ids: Sequence[int], scores: Mapping[Any, Any], said: int | None = None) -> Told:
    """The ids that were asked for by name, out of what a server gave; they tell nothing of others."""
    missing = [i for i in ids if i not in scores]
    if missing:
        raise BadReply(f"asked for the score of id {missing[0]}, the server left it out")
    pairs = [(i, scores[i]) for i in dict.fromkeys(ids)]
    _believe(pairs)
    return _told(pairs, 0.0, said)


def _told(pairs: Sequence[tuple[int, float]], floor: float, said: int | None) -> Told:
    kept = [(i, min(float(score), 0.0)) for i, score in pairs if score > NEVER]
    return Told([i for i, _ in kept], [score for _, score in kept], floor, said)


def _believe(pairs: Sequence[tuple[Any, Any]]) -> None:
    """Raises BadReply for what can be no log-probabilities of tokens."""
    ids, scores = [i for i, _ in pairs], [score for _, score in pairs]
    if not all(type(i) is int and i >= -1 for i in ids):
        raise BadReply("the server named a token by something that is no id")
    given = [i for i in ids if i >= 0]
    if len(set(given)) < len(given):
        raise BadReply("the server gave two scores for one token")
    if not all(type(score) in (int, float) and math.isfinite(score) for score in scores):
        raise BadReply("the server gave something that is no number for a score")
    if max(scores, default=0.0) > ABOVE_ZERO:
        raise BadReply(f"the server gave the score {max(scores):g}, which is no log-probability")
    if sum(map(math.exp, scores)) > 1 + max(1e-3, ABOVE_ZERO * len(scores)):
        raise BadReply("the server's probabilities add up to more than 1")
