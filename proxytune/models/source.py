"""The protocol between models and the loop: a source gives next-token scores for token ids.

One source is one copy of weights. It has one or more members: the variants of those weights that it scores in the same
forward, such as an expert and its anti, which differ by an adapter only.

Shapes: N rows, M members, Q new positions, T positions of a reply, V vocabulary (the trio's shared one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Stream(Protocol):
    """Room for sequences in progress: `rows` of them for each of M members, none longer than `length` ids.

    A sequence's slot is its position. Reading at a position that was read before overwrites it, so rolling back is
    reading again from a smaller position, and what was read beyond it is never seen.
    """

    def read(self, tokens_NMQ: Tensor, starts_NM: Tensor, *, first: int = 0, member: int | None = None) -> Tensor:
        """Read Q ids of N neighbouring rows, from row `first` on, at positions starts + 0..Q-1.

        Returns the scores (N, M, Q, V) of what follows each id. `member` reads that one member only (M = 1).
        Ids after a row's own last one may be anything: they change no score before them.
        """
        ...

    def fill(self, tokens_NMQ: Tensor, starts_NM: Tensor, *, first: int = 0) -> None:
        """Read like `read` where no scores are wanted: prompts, without the cost of the vocabulary."""
        ...

    def copy(self, row: int, to: int) -> None:
        """Make row `to` a copy of `row`, for every member."""
        ...


class Source(Protocol):
    """Anything that scores next tokens."""

    @property
    def device(self) -> torch.device: ...

    @property
    def longest(self) -> int | None:
        """The ids that its context holds; None if it does not say."""
        ...

    @property
    def ids(self) -> int:
        """Ids below it can be read: the rows of its embedding."""
        ...

    def open(self, rows: int, length: int, members: Sequence[int] = (0,)) -> Stream:
        """Room for sequences of these members, in this order."""
        ...

    def score(
        self,
        prompts: Sequence[Sequence[Sequence[int]]],
        completions: Sequence[Sequence[int]],
        members: Sequence[int] = (0,),
    ) -> list[list[Tensor]]:
        """Scores of each position of given replies: for each row and member a tensor (its reply's length, V).

        prompts[row][m] are the ids that the m-th of `members` reads before the row's reply.
        """
        ...


@dataclass(frozen=True)
class Term:
    """One member of a source, and the role whose prompt it reads."""

    source: Source
    role: str
    member: int = 0
