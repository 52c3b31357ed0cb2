from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from proxytune.models import linear
from proxytune.models.linear import QuickLinear, quicken
from tests.decoding.tiny_models import model


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 4), (2, 1), (11, 1), (16, 5)])
def test_every_number_of_rows_gives_the_stock_product(packed, bias, shape):
    if packed and not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN here")
    torch.manual_seed(0)
    stock = nn.Linear(96, 70, bias=bias)
    x = torch.randn(*shape, 96)
    with torch.inference_mode():
        assert torch.allclose(QuickLinear(stock, packed)(x), stock(x), rtol=1e-5, atol=1e-5)


def test_a_model_says_the_same_after_and_only_float32_ones_are_touched(monkeypatch):
    monkeypatch.setattr(linear, "LARGE", 1)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    stock = model(1, dtype=torch.float32)
    quick = quicken(copy.deepcopy(stock))
    swapped = sum(isinstance(module, QuickLinear) for module in quick.modules())
    assert swapped == sum(isinstance(module, nn.Linear) for module in stock.modules()) or not linear.free_memory("cpu")
    with torch.inference_mode():
        assert torch.allclose(quick(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)
    double = quicken(copy.deepcopy(model(1)))
    assert not any(isinstance(module, QuickLinear) for module in double.modules())


def test_a_second_copy_is_made_only_where_memory_allows(monkeypatch):
    monkeypatch.setattr(linear, "LARGE", 1)
    monkeypatch.setattr(linear, "free_memory", lambda device: 0)
    quick = quicken(copy.deepcopy(model(1, dtype=torch.float32)))
    assert all(module.packed is None for module in quick.modules() if isinstance(module, QuickLinear))


def test_a_weight_of_another_kind_keeps_its_layer(monkeypatch):
    monkeypatch.setattr(linear, "LARGE", 1)

    class Quantised(nn.Parameter):
        """As torchao puts one in place of a layer's own."""

    quick = copy.deepcopy(model(1, dtype=torch.float32))
    quick.lm_head.weight = Quantised(quick.lm_head.weight.detach().clone())
    quicken(quick)
    assert type(quick.lm_head) is nn.Linear and isinstance(quick.model.layers[0].mlp.up_proj, QuickLinear)
