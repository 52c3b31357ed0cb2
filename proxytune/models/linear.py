"""Linear layers that read a few rows at once as fast as a CPU can, in float32.

Verifying a draft of four tokens, or writing eleven alphas, multiplies each weight matrix by 5 or 11 rows. There the
stock product costs 2.7 and 4.8 times one row; with weights laid out for oneDNN beforehand 1.8 and 2.3 times, at the
price of a second copy of them; with the factors swapped 2.2 and 2.6 times, at none (one thread of a Xeon with AVX-512,
551M parameters; docs/results.md).
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn

from proxytune.models.described import free_memory

FEW = range(3, 65)  # rows that the laid-out weights are quicker for
SWAPPED = range(5, 16)  # rows that swapping the factors is quicker for
LARGE = 200_000  # weights; below, the call costs more than the product


class QuickLinear(nn.Module):
    """The product of `nn.Linear`, by the way that is quickest for the number of rows. Results differ by rounding."""

    def __init__(self, linear: nn.Linear, packed: bool):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 8) if packed else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if self.packed is not None and rows in FEW:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        if rows in SWAPPED:
            y = (self.weight @ x.reshape(rows, -1).t()).t()
            y = y if self.bias is None else y + self.bias
            return y.reshape(*x.shape[:-1], -1)
        return nn.functional.linear(x, self.weight, self.bias)


def quicken(model, *, second_copy: bool = True):
    """Replace the large linear layers of a float32 model on an x86 CPU, in place; other models stay as they are.

    second_copy: lay weights out a second time, where memory for three more of them is free.
    """
    weight = next(model.parameters())
    x86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    if not x86 or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return model
    packed = second_copy and sum(p.nbytes for p in model.parameters()) * 3 < (free_memory("cpu") or 0)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            # torchao keeps the layer and makes its weight a tensor of another kind
            if type(child) is nn.Linear and type(child.weight) is nn.Parameter and child.weight.numel() >= LARGE:
                setattr(module, name, QuickLinear(child, packed))
    return model
