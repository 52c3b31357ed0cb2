"""Which token is said next, as a pure function of the scores and a seed.

Sampling is the arg-max of warped scores plus Gumbel noise (Gumbel 1954; Maddison et al. 2014), and the noise is a
function of (seed, output position, token id) alone. So the same seed gives the same text whatever shares the batch, and
greedy is the same rule with no noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Choice:
    """temperature >= 0 (0 is greedy); top_k >= 0 (0 is off); 0 < top_p <= 1 (1 is off)."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __call__(self, scores_BV: Tensor, seeds_B: Tensor, positions_B: Tensor) -> Tensor:
        """The chosen token ids, (B,). positions count output tokens from 0."""
        if self.temperature == 0:
            return scores_BV.argmax(-1)
        warped_BV = warp(scores_BV, self.temperature, self.top_k, self.top_p)
        return (warped_BV + gumbel(seeds_B, positions_B, scores_BV.shape[-1])).argmax(-1)


def warp(scores_BV: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Scores of the distribution that is sampled: divided by temperature, then top-k, then top-p; others -inf.

    top-p keeps the smallest set of most likely tokens whose probability reaches top_p (Holtzman et al. 2020), at least
    one. Ties at an edge are all kept, so the result does not depend on the order in which a sort leaves them.
    """
    scores_BV = scores_BV / temperature
    if 0 < top_k < scores_BV.shape[-1]:
        edge_B1 = scores_BV.topk(top_k, dim=-1).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < edge_B1, -torch.inf)
    if top_p < 1:
        sorted_BV = scores_BV.sort(dim=-1, descending=True).values
        shares_BV = sorted_BV.softmax(-1)
        before_BV = shares_BV.cumsum(-1) - shares_BV  # probability of everything more likely
        count_B1 = (before_BV < top_p).sum(-1, keepdim=True).clamp(min=1)
        edge_B1 = sorted_BV.gather(-1, count_B1 - 1)
        scores_BV = scores_BV.masked_fill(scores_BV < edge_B1, -torch.inf)
    return scores_BV


def gumbel(seeds_B: Tensor, positions_B: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise (B, V), float32: one number for each (seed, position, token id), on any device."""
    tokens_V = torch.arange(vocabulary, dtype=torch.int64, device=seeds_B.device)
    row_B1 = _mix(_mix(seeds_B.to(torch.int64) & _MASK) ^ (positions_B.to(torch.int64) & _MASK))[:, None]
    bits_BV = _mix(_mix(row_B1 ^ _mix(tokens_V)) + tokens_V)
    uniform_BV = (bits_BV.double() + 0.5) / 2**32
    return -(-uniform_BV.log()).log().float()


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers in which every input bit moves about half of the output bits ("lowbias32")."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
