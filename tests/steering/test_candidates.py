"""The certificate against the truth over the whole vocabulary: 100,000 random cases, none of them certified wrongly."""

from __future__ import annotations

import pytest
import torch

from proxytune.steering.arithmetic import difference, steer
from proxytune.steering.candidates import bound, decide, forbid, narrow, steer_bounds
from proxytune.steering.choice import Choice, Sampling, gumbel, warp

V, K = 64, 8
CHOICES = {
    "greedy": Sampling(),
    "sampled": Sampling(1.0),
    "cool": Sampling(0.6),
    "hot": Sampling(1.7),
    "top-k": Sampling(1.0, top_k=5),
    "top-p": Sampling(1.0, top_p=0.8),
    "min-p": Sampling(1.0, min_p=0.05),
    "all, cool": Sampling(0.7, top_k=12, top_p=0.9, min_p=0.02),
    "all, hot": Sampling(1.5, top_k=20, top_p=0.95, min_p=0.01),
}


class Cases:
    """B rows of random base, expert and anti; the server returns K of V base scores, `wide` sets how flat rows are."""

    def __init__(self, rows: int, seed: int, *, pairs: int = 1, k: int = K, noise: float = 0.0):
        draw = torch.Generator().manual_seed(seed)
        flat = torch.empty(rows, 1).uniform_(0.5, 6, generator=draw)
        self.base_BV = (torch.randn(rows, V, generator=draw) * flat).log_softmax(-1)
        small = [torch.randn(rows, V, generator=draw) * flat for _ in range(2 * pairs)]
        mixed = torch.empty(rows, 1).uniform_(0, 1, generator=draw)  # some pairs differ little
        self.differences = [
            (difference(a + mixed * (b - a), a), torch.empty(rows, 1).uniform_(-2, 2, generator=draw))
            for a, b in zip(small[::2], small[1::2], strict=True)
        ]
        told_BV = (
            self.base_BV + torch.empty_like(self.base_BV).uniform_(-noise, noise, generator=draw)
            if noise
            else self.base_BV
        )
        self.told = told_BV.topk(k, dim=-1)
        self.all_told_BV = told_BV
        self.seeds_B = torch.arange(rows) + seed
        self.positions_B = torch.arange(rows) % 50

    def truth(self, sampling: Sampling) -> torch.Tensor:
        choice = Choice([sampling] * len(self.base_BV))
        choice.seeds_N = self.seeds_B
        steered_BV = steer(self.base_BV, self.differences)
        return choice(steered_BV[:, None], self.positions_B[:, None])[:, 0]

    def noise(self, sampling: Sampling):
        return gumbel(self.seeds_B, self.positions_B, V) if sampling.temperature else None

    def decide(self, sampling: Sampling, base=None, tolerance: float = 0.0):
        if base is None:
            base = bound(self.told.indices, self.told.values, self.told.values[:, -1], V, tolerance=tolerance)
        bounds = whole = steer_bounds(base, self.differences)
        if sampling.temperature:
            bounds = narrow(
                bounds, sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p
            )
        return decide(bounds, self.noise(sampling), whole)


# Share of these cases that must be certified, in percent. Rows are far flatter, and steered far harder, than real ones.
USEFUL = {
    "greedy": 60,
    "sampled": 36,
    "cool": 46,
    "hot": 26,
    "top-k": 46,
    "top-p": 34,
    "min-p": 42,
    "all, cool": 40,
    "all, hot": 22,
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_certified_token_is_never_wrong_and_many_are_certified(name):
    """12,000 cases for each of the nine ways to choose: 108,000."""
    certified = right = 0
    for seed in range(6):
        cases = Cases(2_000, seed)
        truth_B = cases.truth(CHOICES[name])
        found = cases.decide(CHOICES[name])
        wrong_B = found.certified_B & (found.tokens_B != truth_B)
        assert not wrong_B.any(), f"{int(wrong_B.sum())} wrong of {int(found.certified_B.sum())} certified"
        certified += int(found.certified_B.sum())
        right += int((found.tokens_B == truth_B).sum())
    assert certified >= USEFUL[name] * 120, f"certified {certified / 12e3:.3f}, right {right / 12e3:.3f}"


@pytest.mark.parametrize("name", CHOICES)
def test_scores_that_are_off_within_the_tolerance_certify_nothing_wrong(name):
    cases = Cases(3_000, 77, noise=0.01)
    found = cases.decide(CHOICES[name], tolerance=0.0101)
    assert not (found.certified_B & (found.tokens_B != cases.truth(CHOICES[name]))).any()
    assert found.certified_B.float().mean() > 0.2
    careless = cases.decide(CHOICES[name], tolerance=0.0)
    assert (careless.certified_B & (careless.tokens_B != cases.truth(CHOICES[name]))).any()  # so the test can fail


@pytest.mark.parametrize("name", CHOICES)
def test_several_experts_are_certified_alike(name):
    cases = Cases(3_000, 5, pairs=3)
    found = cases.decide(CHOICES[name])
    assert not (found.certified_B & (found.tokens_B != cases.truth(CHOICES[name]))).any()
    assert found.certified_B.any()


@pytest.mark.parametrize("name", CHOICES)
def test_the_whole_vocabulary_certifies_nearly_everything(name):
    cases = Cases(3_000, 3, k=V)
    found = cases.decide(CHOICES[name])
    share, wrong_B = found.certified_B.float().mean(), found.tokens_B != cases.truth(CHOICES[name])
    if CHOICES[name].top_p == 1:
        assert found.certified_B.all()
    assert not (found.certified_B & wrong_B).any() and share > 0.998  # a nucleus' edge may lie within rounding


@pytest.mark.parametrize("name", CHOICES)
def test_asking_for_the_rivals_by_id_certifies_the_rest(name):
    cases = Cases(2_000, 11)
    ids_BK, scores_BK, floors_B = cases.told.indices, cases.told.values, cases.told.values[:, -1]
    before = cases.decide(CHOICES[name]).certified_B.float().mean()
    for _ in range(4):
        base = bound(ids_BK, scores_BK, floors_B, V)
        found = cases.decide(CHOICES[name], base)
        top = found.rivals_BV.topk(12, dim=-1)
        asked_BK = top.indices.where(top.values > -torch.inf, -1)
        known_BK = cases.base_BV.gather(-1, asked_BK.clamp(min=0)).where(asked_BK >= 0, -torch.inf)
        ids_BK, scores_BK = torch.cat([ids_BK, asked_BK], -1), torch.cat([scores_BK, known_BK], -1)
    assert not (found.certified_B & (found.tokens_B != cases.truth(CHOICES[name]))).any()
    assert found.certified_B.float().mean() > max(0.85 if CHOICES[name].top_p < 1 else 0.99, before)


def test_the_mass_that_is_left_bounds_more_tightly_than_the_last_score():
    """One token has nearly all the probability: the next ones returned are far above what can be left."""
    base_BV = torch.full((1, V), -9.0)
    base_BV[0, :2] = torch.tensor([-0.003, -6.1])
    ids = torch.tensor([[0, 1]])
    bounds = bound(ids, base_BV.gather(-1, ids), torch.tensor([-6.1]), V)
    left = 1 - base_BV[0, :2].double().exp().sum()
    assert bounds.upper_BV[0, 5].item() == pytest.approx(left.log().item(), abs=1e-2) and left.log() < -6.1


def test_bounds_are_as_tight_as_the_answer_allows():
    """Of ten ids two were returned, with .6 and .3: .1 is left, and no other has more than the floor says."""
    ids, scores = torch.tensor([[4, 7]]), torch.tensor([[0.6, 0.3]]).log()
    rest = [i for i in range(10) if i not in (4, 7)]
    for floor, cap, most in ((0.3, 0.1, 1), (0.04, 0.04, 3)):
        bounds = bound(ids, scores, torch.tensor([floor]).log(), 10)
        assert bounds.upper_BV[0, rest].exp().tolist() == pytest.approx([cap] * 8, rel=1e-4)
        assert bounds.most_B.item() == most and (bounds.lower_BV[0, rest] == -torch.inf).all()
        assert bounds.lower_BV[0, ids[0]].tolist() == bounds.upper_BV[0, ids[0]].tolist() == scores[0].tolist()
    off = bound(ids, scores, torch.tensor([0.04]).log(), 10, tolerance=0.01)
    assert (off.upper_BV - scores[0, 0])[0, 4].item() == pytest.approx(0.01, rel=1e-4)
    assert (off.lower_BV - scores[0, 0])[0, 4].item() == pytest.approx(-0.01, rel=1e-4)
    assert off.upper_BV[0, 5].item() == pytest.approx(torch.tensor(0.04).log().item() + 0.01, abs=1e-6)


def test_a_single_answer_leaves_another_token_up_to_as_much():
    """A base that gives its best alone, .5: another may have nearly .5, which small models may turn into the choice."""
    bounds = bound(torch.tensor([[2]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log(), 4)
    shift = torch.tensor([[0.0, 0.1, 0.0, 0.0]])
    assert not decide(steer_bounds(bounds, [(shift, 1.0)])).certified_B.item()
    assert decide(steer_bounds(bounds, [(shift, -1.0)])).certified_B.item() is False  # a tie with ids 0 and 3


@pytest.mark.parametrize("tolerance", [0.0, 1e-4])
def test_no_bound_is_rounded_below_what_it_bounds(tolerance):
    floors = -torch.linspace(3, 9, 500)
    bounds = bound(torch.zeros(500, 1).long(), floors[:, None], floors, 3, tolerance=tolerance)
    assert (bounds.upper_BV[:, 1].double() >= floors.double() + tolerance).all()
    assert tolerance or torch.equal(bounds.upper_BV[:, 1], floors)


def test_rules_that_are_off_change_no_interval():
    cases = Cases(3, 1)
    whole = bound(cases.told.indices, cases.told.values, cases.told.values[:, -1], V)
    same = narrow(whole, 1.0)
    assert torch.equal(same.lower_BV, whole.lower_BV) and torch.equal(same.upper_BV, whole.upper_BV)
    all_ = narrow(whole, 1.0, top_k=V, top_p=1.0, min_p=0.0)
    assert torch.equal(all_.lower_BV, whole.lower_BV) and torch.equal(all_.upper_BV, whole.upper_BV)


def test_top_1_is_the_likeliest_whatever_the_noise():
    scores = torch.tensor([[0.6, 0.3]]).log()
    bounds = narrow(bound(torch.tensor([[4, 7]]), scores, scores[:, -1], 10), 1.0, top_k=1)
    noise = torch.zeros(1, 10)
    noise[0, 7] = 5.0
    found = decide(bounds, noise)
    assert found.tokens_B.item() == 4 and found.certified_B.item()


def test_a_tie_at_the_edge_of_a_truncation_drops_neither():
    scores = torch.tensor([[0.4, 0.4]]).log()
    tied = bound(torch.tensor([[4, 7]]), scores, scores[:, -1], 10)
    for rule in ({"top_k": 1}, {"min_p": 1.0}):
        bounds = narrow(tied, 1.0, **rule)
        assert (bounds.upper_BV > -torch.inf)[0, [4, 7]].all() and (bounds.lower_BV > -torch.inf)[0, [4, 7]].all()


def test_few_unknown_tokens_at_the_cap_drop_what_lies_beyond_the_nucleus():
    """Of 1,000 ids two were returned, .6 and .3; the others have .1 between them, not .1 each."""
    scores = torch.tensor([[0.6, 0.3]]).log()
    bounds = narrow(bound(torch.tensor([[4, 7]]), scores, scores[:, -1], 1000), 1.0, top_p=0.8)
    assert (bounds.upper_BV[0] > -torch.inf).nonzero()[:, 0].tolist() == [4, 7]
    assert (bounds.lower_BV[0] > -torch.inf).nonzero()[:, 0].tolist() == [4, 7]


def test_heat_gives_many_small_masses_more_than_few_large_ones_and_drops_nothing_for_it():
    """.5 and .3 were returned. At temperature 2 two unknown ids at the cap would weigh .63, and 200 like ones 6.3."""
    ids, scores = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.3]]).log()
    base_BV = torch.full((1, 202), 0.2 / 200).log()
    base_BV[0, :2] = scores
    found = narrow(bound(ids, scores, scores[:, -1], 202), 2.0, top_p=0.5)
    kept_BV = warp(base_BV, 2.0, top_p=0.5) > -torch.inf
    assert kept_BV.sum() > 50 and (found.upper_BV[kept_BV] > -torch.inf).all()


def test_ids_that_the_server_cannot_name_may_score_anything_that_is_left():
    scores = torch.tensor([[0.5, 0.2, 0.1], [0.8, 0.1, 0.05]]).log()
    ids = torch.tensor([[3, -1, 9], [3, -1, 9]])  # the second text could be one of several ids
    bounds = bound(ids, scores, scores[:, -1], V, unbounded=(7, 8))
    assert bounds.upper_BV[:, 7].exp().tolist() == pytest.approx([0.4, 0.15], abs=1e-4)
    assert bounds.upper_BV[:, 20].exp().tolist() == pytest.approx([0.1, 0.05], abs=1e-4)
    assert bounds.known_BV[0].nonzero()[:, 0].tolist() == [3, 9]


def test_ids_beyond_the_shared_vocabulary_are_mass_and_never_said():
    scores = torch.tensor([[0.9, 0.05]]).log()
    for beyond in (V, V + 3):
        bounds = bound(torch.tensor([[beyond, 4]]), scores, scores[:, -1], V, unbounded=(7,))
        assert decide(bounds).tokens_B.item() == 4
        assert bounds.upper_BV[0, [5, 7]].exp().tolist() == pytest.approx([0.05, 0.95], abs=1e-4)


def test_with_nothing_returned_the_token_is_a_guess_and_never_certified():
    bounds = bound(torch.tensor([[-1]]), torch.tensor([[-torch.inf]]), torch.tensor([0.0]), V)
    shift = torch.zeros(1, V)
    shift[0, 9] = 3
    found = decide(steer_bounds(bounds, [(shift, 1.0)]))
    assert found.tokens_B.item() == 9 and not found.certified_B.any()


def test_equal_scores_are_not_certified():
    scores = torch.tensor([[-1.0, -1.0]])
    found = decide(bound(torch.tensor([[2, 3]]), scores, scores[:, -1], V))
    assert not found.certified_B.any()


def test_alpha_zero_certifies_the_base_s_own_best_token():
    cases = Cases(100, 2)
    cases.differences = [(difference_BV, 0.0) for difference_BV, _ in cases.differences]
    found = cases.decide(Sampling())
    assert found.certified_B.all() and torch.equal(found.tokens_B, cases.base_BV.argmax(-1))


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_never_said_is_neither_chosen_nor_asked_for(name):
    """The two best of every row are forbidden: the truth is the choice among the others."""
    cases, sampling = Cases(500, 9), CHOICES[name]
    never = sorted(set(steer(cases.base_BV, cases.differences).topk(2, dim=-1).indices[:20].flatten().tolist()))
    base = bound(cases.told.indices, cases.told.values, cases.told.values[:, -1], V)
    whole = bounds = forbid(steer_bounds(base, cases.differences), never)
    if sampling.temperature:
        bounds = narrow(bounds, sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
    found = decide(bounds, cases.noise(sampling), whole)
    steered_BV = steer(cases.base_BV, cases.differences)
    steered_BV[:, never] = -torch.inf
    choice = Choice([sampling] * 500)
    choice.seeds_N = cases.seeds_B
    truth_B = choice(steered_BV[:, None], cases.positions_B[:, None])[:, 0]
    assert not (found.certified_B & (found.tokens_B != truth_B)).any() and found.certified_B.any()
    assert not torch.isin(found.tokens_B[found.certified_B], torch.tensor(never)).any()
    assert (found.rivals_BV[:, never] == -torch.inf).all()
    assert forbid(whole, ()) is whole
