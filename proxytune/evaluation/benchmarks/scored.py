"""What a benchmark made of one system's rows, and the line of it in a file."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from proxytune.evaluation.benchmarks.benchmark import Measures
from proxytune.evaluation.summary import Scores


@dataclass(frozen=True)
class Scored:
    """One entry a row, in the rows' order. measures: of each row its share (value, weight) in each measure.

    counts: told beside the measures (unparsed, ...). records: what a reader may want to see of each row. digests: of
    each row, as in `Scores`.
    """

    ids: Sequence[str]
    measures: Sequence[Measures]
    groups: Sequence[Mapping[str, str]]
    counts: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    digests: Sequence[str] = ()

    def without(self, places: Container[int]) -> Scored:
        """The same, with rows at these places that weigh nothing."""
        return replace(self, measures=[{} if i in places else its for i, its in enumerate(self.measures)])

    @property
    def names(self) -> list[str]:
        """The measures that every row has; the first is the benchmark's own."""
        found = dict.fromkeys(name for row in self.measures for name in row)
        return [name for name in found if not any(math.isnan(row.get(name, (0.0, 0.0))[0]) for row in self.measures)]

    def columns(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(values, weights) of a measure, each (N,)."""
        pair_N2 = np.array([row.get(name, (0.0, 0.0)) for row in self.measures], dtype=np.float64)
        return pair_N2[:, 0], pair_N2[:, 1]

    def scores(self, system: str, alpha: float | None) -> Scores:
        """For the summary: the loss where there is one, else the first measure that has a weight, as the metric."""
        ids, digests = list(self.ids), list(self.digests) or None
        if "loss" in self.names:
            return Scores(system, alpha, *self.columns("loss"), None, "", ids, digests=digests)
        name = self.names[0]
        values, weights = self.columns(name)
        if not weights.sum():
            return Scores(system, alpha, None, None, None, name, ids, digests=digests)
        return Scores(system, alpha, None, None, values, name, ids, weights, digests)

    def told(self, system: str, alpha: float | None) -> dict[str, Any]:
        """As a line of `scores.jsonl`."""
        columns = {name: self.columns(name) for name in self.names}
        measures = {name: {"values": v.tolist(), "weights": w.tolist()} for name, (v, w) in columns.items()}
        told = {"system": system, "alpha": alpha, "ids": list(self.ids), "digests": list(self.digests) or None}
        return told | {"measures": measures}
