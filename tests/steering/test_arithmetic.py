from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxytune.steering.arithmetic import difference, steer, uncap

SEEDS = st.integers(0, 2**31)
ALPHAS = st.floats(-3, 3)


def scores(seed: int, rows: int = 3, vocabulary: int = 17, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, rows, vocabulary, generator=generator, dtype=dtype) * 5


@given(SEEDS)
def test_alpha_zero_is_the_base_bit_for_bit(seed):
    base, expert, anti = scores(seed)
    assert torch.equal(steer(base, [(difference(expert, anti), 0.0)]), base)


@given(SEEDS, ALPHAS)
def test_an_expert_that_is_its_anti_changes_nothing(seed, alpha):
    base, expert, _ = scores(seed)
    assert torch.equal(steer(base, [(difference(expert, expert.clone()), alpha)]), base)


@given(SEEDS)
def test_a_base_that_is_the_anti_becomes_the_expert_at_alpha_one(seed):
    _, expert, anti = scores(seed, dtype=torch.float64)
    torch.testing.assert_close(steer(anti, [(difference(expert, anti), 1.0)]), expert)


@given(SEEDS, ALPHAS, ALPHAS)
def test_scores_are_linear_in_alpha(seed, one, other):
    base, expert, anti = scores(seed, dtype=torch.float64)
    change = difference(expert, anti)
    both = steer(base, [(change, one), (change, other)])
    torch.testing.assert_close(both, steer(base, [(change, one + other)]))


@given(SEEDS, ALPHAS, st.floats(-50, 50))
def test_a_constant_added_to_a_model_changes_no_probability(seed, alpha, constant):
    base, expert, anti = scores(seed, dtype=torch.float64)
    plain = steer(base, [(difference(expert, anti), alpha)]).softmax(-1)
    moved = steer(base + constant, [(difference(expert - constant, anti), alpha)]).softmax(-1)
    torch.testing.assert_close(plain, moved)


@pytest.mark.parametrize("alpha", [-1, -0.5, 0.5, 1, 2])
def test_steered_is_the_base_and_alpha_times_what_tuning_taught(alpha):
    base, expert, anti = scores(4, dtype=torch.float64)
    assert torch.equal(steer(base, [(difference(expert, anti), alpha)]), base + alpha * (expert - anti))


def test_alpha_zero_is_the_base_even_where_the_pair_is_broken():
    base, expert, anti = scores(5)
    expert[:, 2], expert[:, 3] = torch.nan, torch.inf
    assert torch.equal(steer(base, [(difference(expert, anti), 0.0)]), base)


def test_each_row_has_its_own_alpha():
    base, expert, anti = scores(1)
    alpha_B1 = torch.tensor([[0.0], [0.5], [2.0]])
    together = steer(base, [(difference(expert, anti), alpha_B1)])
    for row, alpha in enumerate((0.0, 0.5, 2.0)):
        alone = steer(base[row : row + 1], [(difference(expert, anti)[row : row + 1], alpha)])
        assert torch.equal(together[row : row + 1], alone)


def test_half_precision_scores_are_combined_in_float32():
    base, expert, anti = scores(2)
    half = [x.bfloat16() for x in (base, expert, anti)]
    steered = steer(half[0], [(difference(half[1], half[2]), 0.3)])
    assert steered.dtype == torch.float32
    torch.testing.assert_close(steered, half[0].float() + 0.3 * (half[1].float() - half[2].float()))


def test_tokens_that_no_small_model_can_say_do_not_become_nan():
    base, expert, anti = scores(3)
    expert[:, 4] = anti[:, 4] = -torch.inf
    steered = steer(base, [(difference(expert, anti), 1.5)])
    assert not steered.isnan().any()
    assert torch.equal(steered[:, 4], base[:, 4])


@given(SEEDS)
def test_soft_capping_is_undone(seed):
    raw = scores(seed, dtype=torch.float64)[0]
    torch.testing.assert_close(uncap(30 * torch.tanh(raw / 30), 30.0), raw, atol=1e-3, rtol=1e-3)


def test_scores_at_the_cap_stay_finite_and_the_largest():
    """tanh in half precision reaches 1, whose inverse is infinite."""
    found = uncap(torch.tensor([[-30.0, -29.9, 0.0, 29.9, 30.0]]), 30.0)
    assert found.isfinite().all() and torch.equal(found.argsort(-1), torch.arange(5)[None])


def test_infinity_of_a_small_model_is_nan_and_neither_silence_nor_a_ban():
    expert, anti = torch.tensor([[torch.inf, torch.inf, 1.0]]), torch.tensor([[torch.inf, 1.0, torch.inf]])
    assert difference(expert, anti).isnan().all()
    expert, anti = torch.tensor([[1.0, -torch.inf]]), torch.tensor([[-torch.inf, 1.0]])
    assert difference(expert, anti).tolist() == [[torch.inf, -torch.inf]]
