"""Which token is said next, as a pure function of the scores and a seed.

Sampling is the arg-max of warped scores plus Gumbel noise (Gumbel 1954; Maddison et al. 2014), and the noise is a
function of (seed, output position, token id) alone. So the same seed gives the same text whatever shares the batch, and
greedy is the same rule with no noise.

Shapes: N rows (or row-position pairs), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_HEAD = 1024  # scores sorted before a whole row is: top-p seldom needs more


@dataclass(frozen=True)
class Sampling:
    """How one reply's tokens are chosen from its steered scores.

    temperature >= 0 (0 is greedy); top_k >= 0 (0 is off); 0 < top_p <= 1 (1 is off); 0 <= min_p <= 1 (0 is off);
    repetition_penalty > 0 (1 is off; Keskar et al. 2019). Equal seeds give equal noise.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


GREEDY = Sampling()


class Choice:
    """The choice for N rows, each by its own `Sampling`. A row's choice does not depend on the other rows."""

    def __init__(self, each: Sequence[Sampling], device: torch.device | str = "cpu"):
        def column(values, off, dtype):
            values = list(values)
            return None if all(v == off for v in values) else torch.tensor(values, dtype=dtype, device=device)[:, None]

        self.seeds_N = torch.tensor([s.seed for s in each], dtype=torch.int64, device=device)
        self.penalty_N1 = column((s.repetition_penalty for s in each), 1.0, torch.float64)
        self.sampled_N1 = column((s.temperature > 0 for s in each), False, torch.bool)
        self.temperature_N1 = column((s.temperature or 1.0 for s in each), 1.0, torch.float64)
        self.top_k_N1 = column((s.top_k for s in each), 0, torch.int64)
        self.top_p_N1 = column((s.top_p for s in each), 1.0, torch.float64)
        self.min_p_N1 = column((s.min_p for s in each), 0.0, torch.float64)

    def __call__(self, scores_NQV: Tensor, positions_NQ: Tensor, seen_NQV: Tensor | None = None) -> Tensor:
        """The chosen token ids, (N, Q), for Q positions of each row, counted in output tokens from 0.

        `seen` marks the ids that the repetition penalty is for, at each position those before it.
        """
        width = scores_NQV.shape[1]
        scores_MV, positions_M = scores_NQV.flatten(0, 1), positions_NQ.flatten()

        def each(column: Tensor) -> Tensor:  # (N, 1) to (N * Q, 1)
            return column if width == 1 else column.repeat_interleave(width, 0)

        if self.penalty_N1 is not None and seen_NQV is not None:
            scores_MV = penalise(scores_MV, seen_NQV.flatten(0, 1), each(self.penalty_N1))
        if self.sampled_N1 is not None:
            columns = (self.temperature_N1, self.top_k_N1, self.top_p_N1, self.min_p_N1)
            scores_MV = warp(scores_MV, *(None if column is None else each(column) for column in columns))
            noise_MV = gumbel(self.seeds_N.repeat_interleave(width), positions_M, scores_MV.shape[-1])
            scores_MV = scores_MV + noise_MV * each(self.sampled_N1)
        return scores_MV.argmax(-1).view(-1, width)


def penalise(scores_NV: Tensor, seen_NV: Tensor, penalty_N1: Tensor) -> Tensor:
    """Scores with those of seen ids made less likely: divided by the penalty if positive, else multiplied."""
    penalty_N1 = penalty_N1.to(scores_NV.dtype)
    return torch.where(seen_NV, torch.where(scores_NV > 0, scores_NV / penalty_N1, scores_NV * penalty_N1), scores_NV)


def warp(
    scores_NV: Tensor,
    temperature: float | Tensor | None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
) -> Tensor:
    """Scores of the distribution that is sampled: divided by temperature, then top-k, top-p and min-p; others -inf.

    Each is a number, (N, 1), or None where it is off. top-p keeps the smallest set of most likely tokens whose
    probability reaches top_p (Holtzman et al. 2020), at least one; min-p those at least min_p times as likely as the
    likeliest (Nguyen et al. 2024). Ties at an edge are all kept, so no sort's order of equals matters.
    """
    if temperature is not None:
        scores_NV = scores_NV / _column(temperature, scores_NV)
    if top_k is not None:
        scores_NV = _cut_below(scores_NV, _kth_largest(scores_NV, top_k))
    if top_p is not None:
        scores_NV = _cut_below(scores_NV, nucleus_edge(scores_NV, _column(top_p, scores_NV)))
    if min_p is not None:
        scores_NV = _cut_below(scores_NV, scores_NV.amax(-1, keepdim=True) + _column(min_p, scores_NV).log())
    return scores_NV


def _column(value: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _cut_below(scores_NV: Tensor, edge_N1: Tensor) -> Tensor:
    return scores_NV.masked_fill(scores_NV < edge_N1, -torch.inf)


def _kth_largest(scores_NV: Tensor, k: int | Tensor) -> Tensor:
    """The k-th largest score of each row, (N, 1); -inf where k is 0 or more than there are."""
    size = scores_NV.shape[-1]
    k_N1 = torch.as_tensor(k, device=scores_NV.device).expand(len(scores_NV), 1)
    on_N1 = (k_N1 > 0) & (k_N1 < size)
    k_N1 = torch.where(on_N1, k_N1, 1)
    top_NK = scores_NV.topk(int(k_N1.max()), dim=-1).values
    return torch.where(on_N1, top_NK.gather(-1, k_N1 - 1), -torch.inf)


def nucleus_edge(scores_NV: Tensor, p_N1: Tensor) -> Tensor:
    """The lowest score inside the nucleus of each row, (N, 1); -inf where p is 1.

    The head of a row is sorted first, and the whole of it only where the nucleus is larger: at 128k tokens a full sort
    costs more than a small model's step. Both give the same edge, since shares come from the same normaliser.
    """
    whole_N1 = torch.logsumexp(scores_NV, -1, keepdim=True)
    size = scores_NV.shape[-1]
    for count in (min(_HEAD, size), size):
        top_NK = scores_NV.topk(count, dim=-1).values
        shares_NK = (top_NK - whole_N1).exp()
        before_NK = shares_NK.cumsum(-1) - shares_NK  # probability of everything more likely
        inside_NK = before_NK < p_N1
        if count == size or not (inside_NK[:, -1:] & (p_N1 < 1)).any():
            break
    last_N1 = inside_NK.sum(-1, keepdim=True).clamp(min=1) - 1
    return torch.where(p_N1 < 1, top_NK.gather(-1, last_N1), -torch.inf)


def gumbel(seeds_N: Tensor, positions_N: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise (N, V), float32: one number for each (seed, position, token id), on any device."""
    tokens_V = torch.arange(vocabulary, dtype=torch.int64, device=seeds_N.device)
    row_N1 = _mix(_mix(seeds_N.to(torch.int64) & _MASK) ^ (positions_N.to(torch.int64) & _MASK))[:, None]
    bits_NV = _mix(_mix(row_N1 ^ _mix(tokens_V)) + tokens_V)
    uniform_NV = (bits_NV.double() + 0.5) / 2**32
    return -(-uniform_NV.log()).log().float()


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers in which every input bit moves about half of the output bits ("lowbias32")."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
