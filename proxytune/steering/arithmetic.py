"""The steering equation (Liu et al. 2024, arXiv 2401.08565, equation 1).

    steered = base + sum_e alpha_e * (expert_e - anti_e)

Shapes: B rows, V shared vocabulary. Scores are raw (unnormalised): any constant a model adds to a whole row cancels in
the softmax, so log-probabilities would give the same result, at more cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def difference(expert_BV: Tensor, anti_BV: Tensor) -> Tensor:
    """What tuning taught, in float32 or wider: expert - anti.

    Where both are -inf (a token that neither can say) the difference is 0; where one is +inf it is NaN: a fault of the
    model, which must not pass for a token that is never or always said.
    """
    expert_BV, anti_BV = _wide(expert_BV), _wide(anti_BV)
    larger_BV = torch.maximum(expert_BV, anti_BV)
    found_BV = (expert_BV - anti_BV).masked_fill_(larger_BV == -torch.inf, 0)
    return found_BV.masked_fill_(larger_BV == torch.inf, torch.nan)


def steer(base_BV: Tensor, differences: Sequence[tuple[Tensor, float | Tensor]]) -> Tensor:
    """Steered next-token scores, (B, V), float32 or wider.

    differences: pairs of `difference(expert, anti)`, (B, V), and its alpha: a number, or (B, 1) for one alpha a row.
    Rows with alpha 0 are the base bit for bit. Combine first; temperature, top-k, top-p and masks come after.
    """
    steered_BV = _wide(base_BV)
    for difference_BV, alpha in differences:
        alpha_B1 = torch.as_tensor(alpha, dtype=steered_BV.dtype, device=steered_BV.device)
        steered_BV = torch.where(alpha_B1 == 0, steered_BV, steered_BV + alpha_B1 * difference_BV)
    return steered_BV


def uncap(scores_BV: Tensor, cap: float) -> Tensor:
    """Undo logit soft-capping, cap * tanh(x / cap) (Gemma 2: cap 30), before mixing with a model that has none."""
    ratio = (_wide(scores_BV) / cap).clamp(-1 + 1e-6, 1 - 1e-6)
    return cap * torch.atanh(ratio)


def _wide(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()
