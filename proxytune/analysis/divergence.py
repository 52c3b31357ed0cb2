"""How far steering moves the base, and how near it comes to the expert: Kullback-Leibler divergence over alpha.

Measured at every position of given replies, from one scoring pass of each model for any number of alphas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from proxytune.decoding.mixture import Mixture
from proxytune.decoding.scoring import Given, scored

VERSION = 1  # raise when the meaning of the numbers changes


def kl(of_TV: Tensor, against_TV: Tensor) -> Tensor:
    """KL(of || against) in nats at each position, (T,), of log-probabilities (T, V); never below 0."""
    apart_TV = torch.where(of_TV == -torch.inf, 0.0, of_TV - against_TV)
    return (of_TV.exp() * apart_TV).sum(-1).clamp(min=0)


@torch.inference_mode()
def divergences(
    mixture: Mixture, rows: Sequence[Given], alphas: Sequence[Sequence[float]], *, batch_size: int = 32
) -> Iterator[list[list[tuple[float, float]]]]:
    """Yield, batch by batch, for each row and each entry of alphas KL(steered || base) and KL(steered || expert), in
    nats summed over the reply. The expert is that of the first pair."""
    expert = mixture.pairs[0][0]
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        found = []
        for scores in scored(mixture, batch):
            alone = [mixture.vocabulary.mask(scores[term]).float().log_softmax(-1) for term in (mixture.base, expert)]
            each = []
            for entry in alphas:
                steered_TV = mixture.combine(scores, entry).float().log_softmax(-1)
                from_base, from_expert = (float(kl(steered_TV, own_TV).double().sum()) for own_TV in alone)
                each.append((from_base, from_expert))
            found.append(each)
        yield found
