"""The loss of given replies under a mixture, for many alphas in one pass of each model.

At each scored position the base's scores and the differences are kept while every alpha is tried on them, so any number
of alphas costs one forward of each model. The normaliser needs the whole vocabulary: nothing is cut to a top-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proxytune.decoding.mixture import Mixture, Prompts, Term
from proxytune.steering.arithmetic import steer


@dataclass(frozen=True)
class Given:
    """A prompt and the reply whose loss is asked: `completion` holds the same ids for every model."""

    prompts: Prompts
    completion: Sequence[int]


@torch.inference_mode()
def losses(
    mixture: Mixture, rows: Sequence[Given], alphas: Sequence[Sequence[float]], *, batch_size: int = 32
) -> Iterator[list[list[float]]]:
    """Yield, batch by batch, for each row its summed negative log-likelihood in nats under every alpha.

    alphas: one entry for each mixture of alphas, itself one number for each pair. Rows are scored in order.
    """
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        scores: dict[Term, list[Tensor]] = {}
        for group in mixture.groups:
            prompts = [[row.prompts[term.role] for term in group] for row in batch]
            members = [term.member for term in group]
            found = group[0].source.score(prompts, [row.completion for row in batch], members)
            scores |= {term: [each[m] for each in found] for m, term in enumerate(group)}
        yield [
            _row(mixture, {term: each[i] for term, each in scores.items()}, row.completion, alphas)
            for i, row in enumerate(batch)
        ]


def _row(mixture: Mixture, scores: Mapping[Term, Tensor], completion: Sequence[int], alphas) -> list[float]:
    base_TV = scores[mixture.base]
    scores = {term: each.to(base_TV.device) for term, each in scores.items()}
    differences = mixture.differences(scores)
    wanted_T = torch.tensor(list(completion), device=base_TV.device)
    found = []
    for entry in alphas:
        steered_TV = mixture.vocabulary.mask(steer(base_TV, list(zip(differences, entry, strict=True))))
        nats_T = torch.logsumexp(steered_TV, -1) - steered_TV.gather(-1, wanted_T[:, None])[:, 0]
        found.append(float(nats_T.double().sum()))
    return found
