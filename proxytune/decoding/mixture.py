"""What is decoded or scored: a base, and any number of expert-anti pairs that steer it.

A single model is a mixture without pairs, so base, expert alone, steered and tuned base all go through the same loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from proxytune.models.source import Source, Stream
from proxytune.models.vocabulary import Vocabulary
from proxytune.steering.arithmetic import difference, steer

# The ids each role reads before the reply: {"base": [...], "expert": [...], "anti": [...]}
Prompts = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Term:
    """A source and the role whose prompt it reads."""

    source: Source
    role: str


@dataclass(frozen=True)
class Mixture:
    """steered = base + sum_i alpha_i * (expert_i - anti_i), over the ids that all of them share."""

    base: Term
    vocabulary: Vocabulary
    pairs: tuple[tuple[Term, Term], ...] = ()

    def terms(self) -> list[Term]:
        return [self.base, *(term for pair in self.pairs for term in pair)]

    def combine(self, scores: Sequence[Tensor], alphas: Sequence[float | Tensor]) -> Tensor:
        """The terms' scores, each (B, V), in the order of `terms()`, as steered scores, foreign ids masked."""
        base_BV, rest = scores[0], scores[1:]
        differences = [difference(rest[2 * i], rest[2 * i + 1]) for i in range(len(self.pairs))]
        return self.vocabulary.mask(steer(base_BV, list(zip(differences, alphas, strict=True))))

    def start(self, prompts: Sequence[Prompts]) -> tuple[list[Stream], list[Tensor]]:
        """One stream a term over the given rows, and each term's scores of the first token."""
        started = [term.source.start([row[term.role] for row in prompts]) for term in self.terms()]
        return [stream for stream, _ in started], [scores for _, scores in started]
