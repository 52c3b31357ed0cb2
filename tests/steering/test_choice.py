from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxytune.steering.choice import GREEDY, Choice, Sampling, gumbel, penalise, warp

KNOWN_NOISE = [
    [-3.129995, 0.127416, 1.680406, -0.440226],
    [-1.759466, 1.403792, -0.069164, -0.330923],
    [-0.305127, -0.682870, 1.045124, 0.187251],
]


def rows(count: int, value: int = 0):
    return torch.full((count,), value)


def test_greedy_is_the_arg_max_whatever_the_seed():
    scores = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    for seed in (0, 1, 99):
        choice = Choice([Sampling(seed=seed)] * 5)
        assert torch.equal(choice(scores[:, None], rows(5)[:, None])[:, 0], scores.argmax(-1))


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
    choice = Choice([Sampling(0.7, seed=seed) for seed in range(draws // 20)])
    found = torch.zeros(10)
    for position in range(20):
        batch = scores.expand(draws // 20, -1)
        tokens = choice(batch[:, None], rows(draws // 20, position)[:, None])[:, 0]
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


SAMPLINGS = st.builds(
    Sampling,
    st.sampled_from([0.0, 0.5, 1.3]),
    st.sampled_from([0, 1, 5, 80]),
    st.sampled_from([1.0, 0.8, 0.2]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([1.0, 1.4]),
    st.integers(0, 99),
)


@given(st.lists(SAMPLINGS, min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 10**6))
def test_a_row_s_choices_are_those_it_makes_alone(each, width, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(each), width, 50, generator=generator)
    seen = torch.rand(len(each), width, 50, generator=generator) < 0.2
    positions = torch.arange(width).expand(len(each), width)
    together = Choice(each)(scores, positions, seen)
    for i, sampling in enumerate(each):
        for q in range(width):
            at = (slice(i, i + 1), slice(q, q + 1))
            assert together[i, q] == Choice([sampling])(scores[at], positions[at], seen[at]).item()


@given(st.integers(0, 10**6), st.floats(0.01, 1))
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(seed, share):
    scores = torch.randn(3, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = warp(scores, 1.0, min_p=share) > -torch.inf
    chances = scores.softmax(-1)
    clear = (chances / chances.amax(-1, keepdim=True) - share).abs() > 1e-12
    assert torch.equal(kept[clear], (chances >= share * chances.amax(-1, keepdim=True))[clear])


def test_a_nucleus_larger_than_the_sorted_head_is_the_same_as_by_a_full_sort():
    flat = torch.randn(2, 5000, generator=torch.Generator().manual_seed(1)) * 0.1
    peaked = torch.cat([flat[:1], 20 * flat[1:]])
    for scores in (flat, peaked):
        kept = warp(scores, 1.0, top_p=0.9) > -torch.inf
        for row, mask in zip(scores, kept, strict=True):
            order = row.argsort(descending=True)
            count = int((row.softmax(-1)[order].cumsum(-1) < 0.9).sum()) + 1
            assert abs(int(mask.sum()) - count) <= 1 and mask[order[: count - 1]].all()


def test_seen_tokens_are_penalised_away_from_zero_whatever_their_sign():
    scores = torch.tensor([[[1.0, 0.9, -2.0, -2.1]]])
    seen = torch.tensor([[[True, False, True, False]]])
    assert Choice([Sampling(repetition_penalty=1.5)])(scores, torch.zeros(1, 1), seen).item() == 1
    assert Choice([Sampling(repetition_penalty=1.5)])(scores[..., 2:], torch.zeros(1, 1), seen[..., 2:]).item() == 1


def test_ties_at_the_edge_of_any_truncation_are_all_kept():
    tied = torch.tensor([[3.0, 1.0, 3.0, 1.0, 0.0]])
    for cut in ({"top_k": 1}, {"top_p": 0.3}, {"min_p": 1.0}):
        assert (warp(tied, None, **cut) > -torch.inf).tolist() == [[True, False, True, False, False]]
    assert (warp(tied, None, top_k=3) > -torch.inf).tolist() == [[True, True, True, True, False]]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 10**6))
def test_rows_with_other_top_k_beside_them_keep_their_own(each, seed):
    scores = torch.randn(len(each), 7, generator=torch.Generator().manual_seed(seed))
    kept = warp(scores, None, top_k=torch.tensor(each)[:, None]) > -torch.inf
    assert kept.sum(-1).tolist() == [k if 0 < k < 7 else 7 for k in each]  # 0, or more than there are: off


@given(st.lists(st.sampled_from([1.0, 0.9, 0.5]), min_size=2, max_size=5), st.integers(0, 10**6))
def test_rows_with_other_nuclei_beside_them_keep_their_own(each, seed):
    """Longer than the head that is sorted first, and flat, so that a nucleus may or may not fit into it."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.empty(len(each), 1).uniform_(0.1, 5, generator=generator)
    scores = torch.randn(len(each), 1500, generator=generator) * flat
    kept = warp(scores, None, top_p=torch.tensor(each)[:, None]) > -torch.inf
    for row, p in enumerate(each):
        alone = warp(scores[row : row + 1], None, top_p=p)[0] > -torch.inf
        assert torch.equal(kept[row], alone) and (alone.all() if p == 1 else not alone.all())


def test_temperature_divides_and_the_penalty_divides_or_multiplies():
    scores, seen = torch.tensor([[2.0, -2.0, -0.5, 1.0, 0.0]]), torch.tensor([[True, True, True, False, True]])
    assert warp(scores, 0.5).tolist() == [[4.0, -4.0, -1.0, 2.0, 0.0]]
    assert penalise(scores, seen, torch.tensor([[2.0]])).tolist() == [[1.0, -4.0, -1.0, 1.0, 0.0]]


def test_what_is_not_asked_for_is_off():
    scores = torch.randn(1, 2, 30, generator=torch.Generator().manual_seed(5))
    plain = Choice([GREEDY, Sampling()])
    assert all(value is None for name, value in vars(plain).items() if name != "seeds_N")
    assert torch.equal(warp(scores[0], None), scores[0])
    seen = torch.ones(1, 2, 30, dtype=torch.bool)
    assert torch.equal(Choice([Sampling()])(scores, torch.zeros(1, 2), seen), scores.argmax(-1))
    assert Sampling().seed == 0


def test_a_seed_gives_the_same_noise_in_every_version():
    """Else the same settings would say another text after an update."""
    noise = gumbel(torch.tensor([0, 1, 2**40 + 7]), torch.tensor([0, 5, 4095]), 4)
    torch.testing.assert_close(noise, torch.tensor(KNOWN_NOISE), rtol=0, atol=1e-5)


def test_a_number_that_is_none_stays_in_sight_of_the_choice():
    """So that whoever chooses finds the fault, instead of a token."""
    for cut in ({"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.1}, {}):
        scores = torch.tensor([[1.0, torch.nan, 3.0], [1.0, 2.0, torch.inf]])
        assert warp(scores, 0.7, **cut).argmax(-1).tolist() == [1, 2]


def test_one_token_is_all_of_a_vocabulary_of_one():
    rules = Sampling(0.5, top_k=3, top_p=0.1, min_p=0.9, repetition_penalty=2.0)
    found = Choice([rules])(torch.tensor([[[-4.0]]]), torch.zeros(1, 1), torch.ones(1, 1, 1, dtype=torch.bool))
    assert found.tolist() == [[0]] and warp(torch.tensor([[-4.0]]), None, top_k=3).tolist() == [[-4.0]]
