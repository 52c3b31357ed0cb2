"""The protocol between models and the loop: a source gives next-token scores for token ids.

Shapes: B rows, T positions, V vocabulary (the trio's shared one once a source is inside a trio).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Stream(Protocol):
    """B sequences in progress in one model."""

    def advance(self, tokens_B: Tensor) -> Tensor:
        """Append one token to every row; the scores (B, V) of what follows it."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only (indices into the present ones)."""
        ...


class Source(Protocol):
    """Anything that scores next tokens."""

    def start(self, prompts: Sequence[Sequence[int]]) -> tuple[Stream, Tensor]:
        """Read prompts of any lengths (each >= 1 id); the stream and the scores (B, V) of the first token."""
        ...

    def score(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[Tensor]:
        """Scores of each position of given completions: for each row a tensor (its completion's length, V)."""
        ...
