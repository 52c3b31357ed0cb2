import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxytune.errors import DataError
from proxytune.evaluation.intervals import Measured, bootstrap, gap_closed, mean_interval, paired_difference


def measured(values, weights=None) -> Measured:
    values = np.asarray(values, float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights)
    return Measured([str(i) for i in range(len(values))], values, weights)


def normal(size=300, mean=0.0, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, size)


def test_interval_of_a_mean_is_as_wide_as_its_standard_error_says():
    values = normal(400)
    interval = mean_interval(measured(values), samples=4000)
    expected = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.value == pytest.approx(expected, rel=0.08)
    assert interval.value - interval.low == pytest.approx(expected, rel=0.08)


def test_interval_covers_the_truth_as_often_as_its_level_says():
    def covered(level):
        intervals = [
            mean_interval(measured(normal(80, 3.0, seed)), level, samples=400, seed=seed) for seed in range(400)
        ]
        return np.mean([one.low <= 3.0 <= one.high for one in intervals])

    assert covered(0.95) == pytest.approx(0.94, abs=0.025)
    assert covered(0.5) == pytest.approx(0.5, abs=0.07)


def test_loss_per_token_is_a_ratio_of_sums_and_its_interval_follows_the_delta_method():
    random = np.random.default_rng(1)
    tokens = random.integers(5, 200, 500)
    loss = tokens * random.normal(2.0, 0.5, 500)
    interval = mean_interval(measured(loss, tokens), samples=4000)
    ratio = loss.sum() / tokens.sum()
    error = (loss - ratio * tokens).std() / np.sqrt(500) / tokens.mean()
    assert interval.value == pytest.approx(ratio)
    assert interval.value != pytest.approx((loss / tokens).mean(), abs=1e-4)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_paired_interval_is_much_narrower_than_unpaired_on_rows_that_differ_in_difficulty():
    difficulty = 5 * normal()
    a, b = measured(difficulty + 0.1 * normal(seed=1)), measured(difficulty + 0.2 + 0.1 * normal(seed=2))
    together = bootstrap({"a": a, "b": b})
    paired = paired_difference(together["b"], together["a"])
    apart = paired_difference(bootstrap({"b": b}, seed=1)["b"], bootstrap({"a": a}, seed=2)["a"])
    assert paired.high - paired.low < (apart.high - apart.low) / 10
    assert paired.excludes_zero and not apart.excludes_zero


def test_difference_of_a_system_with_itself_is_exactly_zero_and_never_excludes_it():
    one = bootstrap({"a": measured(normal()), "b": measured(normal())})
    interval = paired_difference(one["a"], one["b"])
    assert (interval.value, interval.low, interval.high) == (0, 0, 0)
    assert not interval.excludes_zero


@given(
    st.lists(st.floats(-100, 100), min_size=2, max_size=40),
    st.floats(-1000, 1000),
    st.floats(0.01, 100),
    st.integers(0, 2**32),
)
def test_interval_moves_and_stretches_with_the_data(values, shift, scale, seed):
    plain = mean_interval(measured(values), samples=100, seed=seed)
    moved = mean_interval(measured(np.array(values) * scale + shift), samples=100, seed=seed)
    for before, after in zip((plain.value, plain.low, plain.high), (moved.value, moved.low, moved.high), strict=True):
        assert after == pytest.approx(before * scale + shift, rel=1e-9, abs=1e-6)
    assert plain.low <= plain.high


def test_same_seed_gives_the_same_interval_and_another_seed_another():
    first, again = mean_interval(measured(normal()), seed=3), mean_interval(measured(normal()), seed=3)
    assert first == again != mean_interval(measured(normal()), seed=4)


def test_an_interval_does_not_depend_on_what_else_is_measured():
    alone = bootstrap({"a": measured(normal())})["a"].interval()
    beside = bootstrap({"b": measured(normal(seed=9)), "a": measured(normal())})["a"].interval()
    assert beside.low == pytest.approx(alone.low) and beside.high == pytest.approx(alone.high)


def test_resampling_in_several_chunks_equals_one_chunk(monkeypatch):
    whole = mean_interval(measured(normal(50)))
    monkeypatch.setattr("proxytune.evaluation.intervals.CHUNK", 50 * 7)
    assert mean_interval(measured(normal(50))).low == pytest.approx(whole.low)


@pytest.mark.parametrize(
    ("base", "steered", "tuned", "share"),
    [(3, 2, 1, 0.5), (3, 0.5, 1, 1.25), (3, 3.5, 1, -0.25), (0.2, 0.5, 0.6, 0.75)],
)
def test_gap_closed_is_unclipped(base, steered, tuned, share):
    noise = 0.01 * normal()
    noise -= noise.mean()
    found = bootstrap({name: measured(level + noise) for name, level in (("b", base), ("s", steered), ("t", tuned))})
    gap = gap_closed(found["b"], found["s"], found["t"])
    assert gap.share.value == pytest.approx(share)
    assert gap.share.low == pytest.approx(share) == gap.share.high
    assert not gap.unstable


def test_gap_is_unstable_where_base_and_tuned_cannot_be_told_apart():
    found = bootstrap({name: measured(normal(seed=seed)) for seed, name in enumerate("bst")})
    assert gap_closed(found["b"], found["s"], found["t"]).unstable


def test_gap_without_any_distance_is_undefined_and_unstable():
    found = bootstrap({name: measured(np.ones(10) * level) for name, level in (("b", 1), ("s", 2), ("t", 1))})
    gap = gap_closed(found["b"], found["s"], found["t"])
    assert gap.unstable and np.isnan([gap.share.value, gap.share.low, gap.share.high]).all()


def test_systems_measured_on_other_rows_are_refused():
    a = measured(normal(3))
    with pytest.raises(AssertionError, match="other rows"):
        bootstrap({"a": a, "b": Measured(["0", "2", "1"], a.values, a.weights)})


@pytest.mark.parametrize("nothing", [measured([]), measured([1.0, 2.0], [0, 0])])
def test_nothing_to_score_is_told_in_one_line(nothing):
    with pytest.raises(DataError, match="no row has anything to score"):
        mean_interval(nothing)


def test_a_row_without_tokens_does_not_spoil_the_interval():
    interval = mean_interval(measured([0.0, 2.0, 4.0], [0, 1, 2]))
    assert (interval.value, interval.low, interval.high) == (2, 2, 2)


def test_ten_thousand_rows_and_two_thousand_samples_take_under_two_seconds_of_work():
    start = time.process_time()
    bootstrap({name: measured(normal(10_000)) for name in range(8)}, samples=2000)
    assert time.process_time() - start < 2
