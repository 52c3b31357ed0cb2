"""Departures from the equation that others have found useful. All are off unless asked for, and none is proxy-tuning.

`base_top_p`: only tokens in the base's own nucleus may be said, as DExperts does (Liu et al. 2021, arXiv 2105.03023,
section 3). `alpha_by`: alpha of each token, not of the reply.

What is said is still exactly what these rules choose, whatever is drafted: they look at the base's scores and the
position alone.

Shapes: R rows, Q positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from proxytune.steering.choice import nucleus_edge

AlphaBy = Literal["constant", "position", "confidence"]


@dataclass(frozen=True)
class Variant:
    """0 < base_top_p <= 1 (1 is off).

    alpha_by: `constant`; `position`: alpha falls in a line to 0 over alpha_steps tokens; `confidence`: alpha times one
    minus the probability of the base's likeliest token, so that the base is let be where it is sure.
    """

    base_top_p: float = 1.0
    alpha_by: AlphaBy = "constant"
    alpha_steps: int = 64


EQUATION = Variant()


class Variants:
    """The variants of R rows."""

    def __init__(self, each: Sequence[Variant], device: torch.device | str = "cpu"):
        def column(values) -> Tensor:
            return torch.tensor(list(values), device=device)[:, None]

        self.off = all(v.base_top_p == 1 and v.alpha_by == "constant" for v in each)
        self.top_p_R1 = column(v.base_top_p for v in each)
        self.steps_R1 = column(v.alpha_steps for v in each)
        self.falls_R1 = column(v.alpha_by == "position" for v in each)
        self.defers_R1 = column(v.alpha_by == "confidence" for v in each)

    def share(self, base_RQV: Tensor, positions_RQ: Tensor) -> Tensor:
        """What each alpha is multiplied by, (R, Q, 1), in 0..1."""
        left_RQ = (1 - positions_RQ / self.steps_R1).clamp(min=0)
        unsure_RQ = 1 - base_RQV.double().softmax(-1).amax(-1)
        share_RQ = torch.where(self.falls_R1, left_RQ.double(), torch.where(self.defers_R1, unsure_RQ, 1.0))
        return share_RQ[..., None]

    def filter(self, base_RQV: Tensor, steered_RQV: Tensor) -> Tensor:
        """Steered scores, -inf for what is outside the base's nucleus.

        What may not be said is -inf in the base's scores already: a nucleus of nothing else would leave no token.
        """
        flat = base_RQV.flatten(0, 1).double()
        edge = nucleus_edge(flat, self.top_p_R1.double().repeat_interleave(base_RQV.shape[1], 0))
        return steered_RQV.masked_fill((flat < edge).view_as(steered_RQV), -torch.inf)
