"""What verdicts come to: each measure of a benchmark with its interval and counts, overall and by group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from proxytune.evaluation.benchmarks.benchmark import Benchmark, Measures, Verdict
from proxytune.evaluation.intervals import LEVEL, SAMPLES, Measured, bootstrap

Key = tuple[str, str, str]  # measure, kind of group, group; the latter two empty overall


@dataclass(frozen=True)
class Value:
    """A measure's value and interval, both None where it has no weight; over: that weight, a count of rows mostly."""

    value: float | None
    interval: list[float] | None
    over: float


def report(
    benchmark: Benchmark,
    verdicts: Sequence[Sequence[Verdict]],
    groups: Sequence[Mapping[str, str]],
    samples: int = SAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """One JSON object: n (rows), outputs, unparsed, each measure by its name; their intervals, and what they are over.

    verdicts: of each row, one a sample; groups: of each row. `by_<kind>` holds n and the measures of each group. A
    measure that is not defined for every row (pass@10 of five samples) is left out; one without any weight is null.
    """
    values, by_group = summed([benchmark.measure(row) for row in verdicts], groups, samples, seed)
    flat = [verdict for row in verdicts for verdict in row]
    found: dict[str, Any] = {
        "benchmark": benchmark.name,
        "n": len(verdicts),
        "outputs": len(flat),
        "unparsed": sum(not verdict.parsed for verdict in flat),
        **(benchmark.counts(flat) if benchmark.counts else {}),
        **values,
        "level": LEVEL,
    }
    return found | by_group


def summed(
    measured: Sequence[Measures], groups: Sequence[Mapping[str, str]], samples: int = SAMPLES, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What rows come to: the measures with `intervals` and `over`; and the same of each group, under `by_<kind>`."""
    values = _values(measured, groups, samples, seed)
    found = {}
    for kind in dict.fromkeys(kind for group in groups for kind in group):
        found[f"by_{kind}"] = {
            name: {"n": count} | _told({m: value for (m, *its), value in values.items() if its == [kind, name]})
            for name, count in Counter(group[kind] for group in groups if kind in group).items()
        }
    return _told({measure: value for (measure, kind, _), value in values.items() if not kind}), found


def _told(values: Mapping[str, Value]) -> dict[str, Any]:
    return {
        **{measure: value.value for measure, value in values.items()},
        "intervals": {measure: value.interval for measure, value in values.items()},
        "over": {measure: value.over for measure, value in values.items()},
    }


def _values(
    measured: Sequence[Measures], groups: Sequence[Mapping[str, str]], samples: int, seed: int
) -> dict[Key, Value]:
    """Every measure overall and in every group, all from the same resampled rows."""
    insides = {("", ""): np.ones(len(measured))} | {
        (kind, name): np.array([float(group.get(kind) == name) for group in groups])
        for group in groups
        for kind, name in group.items()
    }
    ids = [str(place) for place in range(len(measured))]
    asked: dict[Key, Measured] = {}
    for name in dict.fromkeys(name for row in measured for name in row):
        pair_N2 = np.array([row.get(name, (0.0, 0.0)) for row in measured])
        if not np.isnan(pair_N2).any():
            for its, inside_N in insides.items():
                asked[name, *its] = Measured(ids, pair_N2[:, 0] * inside_N, pair_N2[:, 1] * inside_N)
    weights = {key: float(one.weights.sum()) for key, one in asked.items()}
    estimates = bootstrap({key: one for key, one in asked.items() if weights[key] > 0}, samples, seed)
    found = {key: Value(None, None, 0.0) for key in asked}
    for key, estimate in estimates.items():
        interval = estimate.interval()
        value = float(np.ascontiguousarray(asked[key].values).sum() / weights[key])  # as numpy's mean, to the last bit
        found[key] = Value(value, [interval.low, interval.high], weights[key])
    return found
