"""The vocabulary that a trio shares, verified id by id.

Models of one family may have unlike head sizes (padding rows) and unlike added tokens. Steering adds scores id by id,
so an id may only be said if every model means the same token by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from proxytune.errors import TrioError

MOST_FOREIGN = 0.01  # a larger share of ids that differ means other tokenizers, not a few added tokens


@dataclass(frozen=True)
class Vocabulary:
    """`size`: scores of all models are cut to ids below it. `foreign`: ids below it that not all models know alike."""

    size: int
    foreign: tuple[int, ...]

    def __contains__(self, i: int) -> bool:
        """Whether every model means the same token by this id."""
        return 0 <= i < self.size and i not in self.foreign

    def mask(self, scores: Tensor) -> Tensor:
        """Scores (..., V) with foreign ids at -inf, so that they are never said. Applied after the equation."""
        return scores.index_fill(-1, _index(self.foreign, scores.device), -torch.inf) if self.foreign else scores


@lru_cache(maxsize=8)  # made once: a GPU would wait for it at every step
def _index(ids: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(ids, device=device)


def shared(vocabularies: Mapping[str, tuple[Mapping[str, int], int]]) -> Vocabulary:
    """The shared vocabulary of named models, each given as (token -> id of its tokenizer, rows of its head).

    Ids that only some models know, or know by another name (reserved and added tokens), are foreign. Raises TrioError
    naming the first id where the vocabularies part: when a token stands at another id elsewhere, or when more than
    `MOST_FOREIGN` of ids differ.
    """
    size = min(rows for _, rows in vocabularies.values())
    meanings = {name: {i: token for token, i in tokens.items()} for name, (tokens, _) in vocabularies.items()}
    highest = max(max(meaning) for meaning in meanings.values()) + 1
    size = min(size, highest)
    foreign = [i for i in range(size) if len({meaning.get(i) for meaning in meanings.values()}) > 1]
    moved = [i for i in foreign if _moved(i, meanings, [tokens for tokens, _ in vocabularies.values()])]
    if moved or len(foreign) > MOST_FOREIGN * size:
        first = (moved or foreign)[0]
        example = ", ".join(f"{name} {meaning.get(first)!r}" for name, meaning in meanings.items())
        raise TrioError(
            f"the models do not share a vocabulary: {len(foreign)} of {size} ids differ, as id {first}: {example}",
            "use a base and an expert of one family",
        )
    unknown = [i for i in range(size) if all(i not in meaning for meaning in meanings.values())]
    return Vocabulary(size, tuple(sorted({*foreign, *unknown})))


def _moved(i: int, meanings: Mapping[str, Mapping[int, str]], known: list[Mapping[str, int]]) -> bool:
    """Whether a token that one model has at this id stands at another id in a model that knows it."""
    return any(tokens.get(meaning[i], i) != i for meaning in meanings.values() if i in meaning for tokens in known)
