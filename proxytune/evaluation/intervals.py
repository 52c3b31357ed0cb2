"""How sure a measured number is: percentile bootstrap over rows (Efron and Tibshirani 1993, chapter 13).

Every measure here is a ratio of two sums over rows: loss per token is sum(loss) / sum(tokens), a metric is
sum(score) / number of rows. So a resample is only a count of how often each row was drawn, and one matrix product gives
the sums of all measures at once. All measures of one `bootstrap` see the same resampled rows: differences and ratios of
its estimates are paired by construction.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from proxytune.errors import DataError

LEVEL = 0.95
SAMPLES = 2000
CHUNK = 1 << 20  # row counts held at once: 8 MB, whatever the number of rows and samples

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Measured:
    """What is measured is values.sum() / weights.sum(); both are (N,), one per row of `ids`."""

    ids: Sequence[str]
    values: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Interval:
    """A number with its percentile interval; all NaN where it is undefined."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Gap:
    """The share of the way from base to tuned that steering went; below 0 and above 1 are possible.

    way: tuned minus base, which tells whether there is anything to close.
    """

    share: Interval
    way: Interval

    @property
    def unstable(self) -> bool:
        """Base and tuned cannot be told apart (their difference's interval includes 0), so the share says nothing."""
        return not self.way.excludes_zero


@dataclass(frozen=True)
class Estimate:
    """A measure on all rows, and on each resample: draws is (S,)."""

    value: float
    draws: np.ndarray

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.draws - other.draws)

    def __truediv__(self, other: Estimate) -> Estimate:
        return Estimate(float(_ratio(np.array(self.value), np.array(other.value))), _ratio(self.draws, other.draws))

    def interval(self, level: float = LEVEL) -> Interval:
        """level: share of the resamples that lie inside, in (0, 1)."""
        assert 0 < level < 1, f"level is {level}"
        drawn = self.draws[~np.isnan(self.draws)]
        if not np.isfinite(self.value) or not drawn.size:
            return Interval(np.nan, np.nan, np.nan)
        with np.errstate(invalid="ignore"):  # a bound between two infinite draws
            low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        return Interval(self.value, float(low), float(high))


def bootstrap(measures: Mapping[Key, Measured], samples: int = SAMPLES, seed: int = 0) -> dict[Key, Estimate]:
    """Estimate all measures on the same resampled rows. They must be of the same rows in the same order.

    Raises DataError where there is nothing to measure.
    """
    return pooled({key: [measure] for key, measure in measures.items()}, samples, seed)


def pooled(
    runs: Mapping[Key, Sequence[Measured]], samples: int = SAMPLES, seed: int = 0, *, together: bool = True
) -> dict[Key, Estimate]:
    """Estimate measures that several runs, such as seeds, have of the same rows: sums over rows and runs.

    Rows are resampled and so are runs, each for themselves and crossed (the pigeonhole bootstrap, Owen 2007, Annals of
    Applied Statistics 1): the interval is over rows that could have been drawn and runs that could have been made, and
    three seeds on 200 rows are never taken for 600 rows. Of few runs it sees too little of how runs differ: a share
    (R - 1) / R of their variance. together: the r-th run of every measure is one run, drawn with all its measures; else
    each measure's runs are its own. Raises DataError where there is nothing to measure.
    """
    if not runs:
        return {}
    keys = list(runs)
    ids = list(runs[keys[0]][0].ids)
    for key, several in runs.items():
        for measure in several:
            assert list(measure.ids) == ids, f"{key} was measured on other rows than {keys[0]}"
            assert measure.values.shape == measure.weights.shape == (len(ids),), f"{key} has not one number per row"
        if not sum(measure.weights.sum() for measure in several) > 0:
            raise DataError("no row has anything to score", "give at least one with a completion that is not empty")
    columns = [np.stack([one.values, one.weights], axis=1) for several in runs.values() for one in several]
    columns_NK = np.concatenate(columns, axis=1).astype(np.float64)
    sums_K, sums_SK = columns_NK.sum(axis=0), _resampled_sums(columns_NK, samples, seed)
    random, drawn, place, found = np.random.default_rng([seed, 1]), {}, 0, {}
    for key, several in runs.items():
        mine, count = slice(place, place + 2 * len(several)), len(several)
        place = mine.stop
        if count not in drawn or not together:
            drawn[count] = (
                random.multinomial(count, [1 / count] * count, samples) if count > 1 else np.ones((samples, 1))
            )
        whole_2 = sums_K[mine].reshape(count, 2).sum(axis=0)
        whole_S2 = np.einsum("sr,srk->sk", drawn[count], sums_SK[:, mine].reshape(samples, count, 2))
        found[key] = Estimate(float(whole_2[0] / whole_2[1]), _ratio(whole_S2[:, 0], whole_S2[:, 1]))
    return found


def mean_interval(measure: Measured, level: float = LEVEL, samples: int = SAMPLES, seed: int = 0) -> Interval:
    return bootstrap({"measure": measure}, samples, seed)["measure"].interval(level)


def paired_difference(of: Estimate, against: Estimate, level: float = LEVEL) -> Interval:
    """`of` minus `against`, two estimates of one bootstrap."""
    return (of - against).interval(level)


def gap_closed(base: Estimate, steered: Estimate, tuned: Estimate, level: float = LEVEL) -> Gap:
    """(steered - base) / (tuned - base), unclipped; three estimates of one bootstrap."""
    whole = tuned - base
    return Gap(((steered - base) / whole).interval(level), whole.interval(level))


def _resampled_sums(columns_NK: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """(S, K): the sum of each column over N rows drawn with replacement, the same rows for every column."""
    rows = len(columns_NK)
    random = np.random.default_rng(seed)
    step = max(1, CHUNK // rows)
    sums = np.empty((samples, columns_NK.shape[1]))
    for start in range(0, samples, step):
        size = min(step, samples - start)
        drawn = random.integers(0, rows, size=(size, rows), dtype=np.int32)
        drawn += np.arange(size, dtype=np.int32)[:, None] * rows  # each resample counts into bins of its own
        counts = np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows)
        sums[start : start + size] = counts.astype(np.float64) @ columns_NK
    return sums


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return above / below
