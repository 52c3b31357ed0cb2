"""What is decoded or scored: a base, and any number of expert-anti pairs that steer it.

A single model is a mixture without pairs, so base, expert alone, steered and tuned base all go through the same loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from proxytune.errors import DataError, ModelError
from proxytune.models.source import Term
from proxytune.models.vocabulary import Vocabulary
from proxytune.steering.arithmetic import difference, steer

# The ids each role reads before the reply: {"base": [...], "expert": [...], "anti": [...]}
Prompts = Mapping[str, Sequence[int]]


def no_number(where: str) -> ModelError:
    return ModelError(f"a model gave NaN or infinity at {where}", "load it in float32 (family.dtype=float32)")


@dataclass(frozen=True)
class Mixture:
    """steered = base + sum_i alpha_i * (expert_i - anti_i), over the ids that all of them share.

    limit: the ids that a base elsewhere holds, where these terms only stand beside it.
    """

    base: Term
    vocabulary: Vocabulary
    pairs: tuple[tuple[Term, Term], ...] = ()
    limit: int | None = None

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """Every term once: experts that share an anti share its scores."""
        return tuple(dict.fromkeys([self.base, *(term for pair in self.pairs for term in pair)]))

    @cached_property
    def groups(self) -> tuple[tuple[Term, ...], ...]:
        """The terms by source: those of one group are read in one forward."""
        return tuple(
            tuple(term for term in self.terms if term.source is source)
            for source in dict.fromkeys(term.source for term in self.terms)
        )

    @cached_property
    def longest(self) -> int | None:
        """The ids that the shortest context among the models holds; None where none of them says."""
        each = (self.limit, *(term.source.longest for term in self.terms))
        return min((longest for longest in each if longest), default=None)

    def check(self, prompts: Prompts) -> None:
        """DataError for an id beyond a model's embedding: some tokenizers have tokens that their models lack."""
        for term in self.terms:
            largest = max(prompts[term.role], default=0)
            if largest >= term.source.ids:
                what = f"a prompt has the token with id {largest}, and the {term.role}'s model knows ids below "
                raise DataError(f"{what}{term.source.ids}", "leave that special token out")

    def differences(self, scores: Mapping[Term, Tensor]) -> list[Tensor]:
        return [difference(scores[expert], scores[anti]) for expert, anti in self.pairs]

    def combine(self, scores: Mapping[Term, Tensor], alphas: Sequence[float | Tensor]) -> Tensor:
        """The terms' scores (..., V) as steered scores, foreign ids masked."""
        differences = zip(self.differences(scores), alphas, strict=True)
        return self.vocabulary.mask(steer(scores[self.base], list(differences)))
