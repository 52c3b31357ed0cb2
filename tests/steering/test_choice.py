from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxytune.steering.choice import Choice, gumbel, warp


def rows(count: int, value: int = 0):
    return torch.full((count,), value)


def test_greedy_is_the_arg_max_whatever_the_seed():
    scores = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    for seed in (0, 1, 99):
        assert torch.equal(Choice()(scores, rows(5, seed), rows(5)), scores.argmax(-1))


@given(st.integers(0, 2**40), st.integers(0, 5000), st.integers(1, 7))
def test_noise_depends_on_seed_position_and_token_alone(seed, position, neighbours):
    alone = gumbel(torch.tensor([seed]), torch.tensor([position]), 50)
    crowd = gumbel(torch.tensor([3] * neighbours + [seed]), torch.tensor([1] * neighbours + [position]), 80)
    assert torch.equal(alone[0], crowd[-1, :50])


def test_noise_is_standard_gumbel():
    noise = gumbel(torch.arange(200), rows(200, 7), 1000).double()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)  # the Euler-Mascheroni constant
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    quantiles = torch.quantile(noise[:100].flatten(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    expected = torch.tensor([-math.log(-math.log(q)) for q in (0.1, 0.5, 0.9)], dtype=torch.float64)
    torch.testing.assert_close(quantiles, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("axis", ["seed", "position"])
def test_noise_of_neighbouring_seeds_and_positions_is_uncorrelated(axis):
    steps = torch.arange(2000)
    noise = gumbel(steps, rows(2000), 50) if axis == "seed" else gumbel(rows(2000), steps, 50)
    correlation = torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))[0, 1]
    assert abs(correlation) < 0.02


def test_sampled_tokens_follow_the_softmax():
    """Chi-square with 9 degrees of freedom over 200,000 draws; 27.9 is its 99.9% point."""
    scores = torch.linspace(-1, 2, 10)
    draws = 200_000
    choice = Choice(temperature=0.7)
    found = torch.zeros(10)
    for position in range(20):
        batch = scores.expand(draws // 20, -1)
        tokens = choice(batch, torch.arange(draws // 20), rows(draws // 20, position))
        found += torch.bincount(tokens, minlength=10)
    expected = (scores / 0.7).softmax(-1) * draws
    assert ((found - expected) ** 2 / expected).sum() < 27.9


@given(st.integers(0, 10**6), st.integers(1, 30))
def test_top_k_keeps_the_k_most_likely(seed, k):
    scores = torch.randn(2, 30, generator=torch.Generator().manual_seed(seed))
    kept = warp(scores, 1.0, top_k=k) > -torch.inf
    assert kept.sum(-1).tolist() == [k, k]
    assert torch.equal(kept.nonzero()[:, 1].view(2, k), scores.topk(k).indices.sort().values)


@given(st.integers(0, 10**6), st.floats(0.05, 0.99))
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed, p):
    scores = torch.randn(1, 25, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    kept = warp(scores, 1.0, top_p=p)[0] > -torch.inf
    shares = scores[0].softmax(-1)
    assert shares[kept].sum() >= p - 1e-9
    assert shares[kept].sum() - shares[kept].min() < p + 1e-9


def test_top_p_always_leaves_one_token():
    assert (warp(torch.tensor([[9.0, 0.0, 0.0]]), 1.0, top_p=0.001) > -torch.inf).sum() == 1
