"""The variants against a reading of their definitions, one row and position at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxytune.steering.variants import EQUATION, Variant, Variants

VARIANTS = st.builds(
    Variant,
    st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    st.sampled_from(["constant", "position", "confidence"]),
    st.integers(1, 12),
)
SEEDS = st.integers(0, 10**6)


def scores(rows: int, width: int, seed: int, vocabulary: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, vocabulary, generator=generator, dtype=torch.float64) * 3


def share(variant: Variant, base_V: torch.Tensor, position: int) -> float:
    match variant.alpha_by:
        case "position":
            return max(0.0, 1 - position / variant.alpha_steps)
        case "confidence":
            return 1 - base_V.softmax(-1).max().item()
    return 1.0


@given(st.lists(VARIANTS, min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 20), SEEDS)
def test_each_row_s_alpha_is_shared_out_by_its_own_rule(each, width, first, seed):
    base = scores(len(each), width, seed)
    positions = torch.arange(first, first + width).expand(len(each), width)
    found = Variants(each).share(base, positions)
    assert found.shape == (len(each), width, 1)
    for row, variant in enumerate(each):
        for q in range(width):
            assert found[row, q].item() == pytest.approx(share(variant, base[row, q], first + q), abs=1e-6)


@given(st.lists(VARIANTS, min_size=1, max_size=4), st.integers(1, 5), SEEDS)
def test_what_may_be_said_is_the_base_s_nucleus_whatever_steering_does(each, width, seed):
    base, steered = scores(len(each), width, seed), scores(len(each), width, seed + 1)
    found = Variants(each).filter(base, steered)
    for row, variant in enumerate(each):
        for q in range(width):
            likeliest = base[row, q].argsort(descending=True)
            before = base[row, q].softmax(-1)[likeliest].cumsum(-1) - base[row, q].softmax(-1)[likeliest]
            inside = likeliest[(before < variant.base_top_p) | (variant.base_top_p == 1)]
            assert set((found[row, q] > -torch.inf).nonzero()[:, 0].tolist()) == set(inside.tolist())
            assert torch.equal(found[row, q, inside], steered[row, q, inside])


def test_the_base_s_likeliest_token_is_always_left():
    base = scores(6, 3, 4)
    left = Variants([Variant(base_top_p=1e-9)] * 6).filter(base, scores(6, 3, 5)) > -torch.inf
    assert torch.equal(left.sum(-1), torch.ones(6, 3, dtype=torch.int64))
    assert torch.equal(left.to(torch.int64).argmax(-1), base.argmax(-1))


@pytest.mark.parametrize(
    ("changes", "off"),
    [({}, True), ({"alpha_steps": 3}, True), ({"base_top_p": 0.5}, False), ({"alpha_by": "position"}, False)],
)
def test_rules_are_off_only_where_every_row_is_the_equation(changes, off):
    variant = dataclasses.replace(EQUATION, **changes)
    assert Variants([EQUATION, variant, EQUATION]).off is off


def test_alpha_falls_in_a_line_to_nothing_and_stays_there():
    falling = Variants([Variant(alpha_by="position", alpha_steps=4)])
    positions = torch.arange(6)[None]
    assert falling.share(scores(1, 6, 1), positions)[0, :, 0].tolist() == [1, 0.75, 0.5, 0.25, 0, 0]


def test_alpha_goes_where_the_base_is_sure_and_stays_where_it_is_not():
    sure, unsure = torch.tensor([0.0, 1e4]), torch.zeros(2)
    found = Variants([Variant(alpha_by="confidence")]).share(torch.stack([sure, unsure])[None], torch.tensor([[0, 1]]))
    assert found[0, :, 0].tolist() == [0, 0.5]
