"""Runs beside each other: the same systems, on the same rows where they share them, with paired intervals.

A run is a folder with `summary.json` and, beside it, `scores.jsonl` (every row's own numbers). Several runs of one
experiment, such as its seeds, are pooled: a row's numbers are added up over the runs, and whole rows are resampled, so
that three seeds on 200 rows are never mistaken for 600 rows. What further seeds would give, no interval over rows can
tell: the range over the runs is told beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proxytune.errors import DataError
from proxytune.evaluation.intervals import LEVEL, SAMPLES, Estimate, Interval, Measured, bootstrap
from proxytune.evaluation.summary import SCORES, SYSTEMS, better, spoken
from proxytune.files import read_json, read_jsonl

SUMMARY = "summary.json"
Rows = Mapping[str, tuple[float, float]]  # of each row id (value, weight)


@dataclass(frozen=True)
class Run:
    """What one run found. rows: for each system (steered at the chosen alpha) and measure, its rows."""

    path: Path
    summary: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Rows]]


@dataclass(frozen=True)
class Group:
    """Runs of one experiment under one name."""

    name: str
    runs: Sequence[Run]

    @property
    def alphas(self) -> list[float]:
        return sorted({run.summary["chosen"] for run in self.runs})

    @property
    def systems(self) -> list[str]:
        """Those that every run has."""
        return [system for system in SYSTEMS if all(system in run.rows for run in self.runs)]

    def rows(self, system: str, measure: str) -> dict[str, tuple[float, float]] | None:
        """A system's rows, those of equal id added up over the runs; None where a run lacks the measure."""
        found: dict[str, tuple[float, float]] = {}
        for run in self.runs:
            rows = run.rows.get(system, {}).get(measure)
            if rows is None:
                return None
            for id, (value, weight) in rows.items():
                before = found.get(id, (0.0, 0.0))
                found[id] = (before[0] + value, before[1] + weight)
        return found

    def values(self, system: str, measure: str) -> list[float]:
        """The measure in each run."""
        sums = [np.sum(list(run.rows[system][measure].values()), axis=0) for run in self.runs]
        return [float(value / weight) for value, weight in sums if weight]


def read(path: Path) -> Run:
    """The run in a folder, or of its `summary.json`. Raises DataError."""
    folder = path.parent if path.name == SUMMARY else path
    if not (folder / SUMMARY).is_file():
        raise DataError(f"there is no {SUMMARY} in {folder}", "name the folder of an evaluation")
    if not (folder / SCORES).is_file():
        raise DataError(f"there is no {SCORES} beside {folder / SUMMARY}", "run it again: what it measured was kept")
    summary = read_json(folder / SUMMARY)
    rows = {}
    for line in read_jsonl(folder / SCORES):
        if line["system"] != "steered" or line["alpha"] == summary["chosen"]:
            rows[line["system"]] = {
                name: dict(zip(line["ids"], zip(columns["values"], columns["weights"], strict=True), strict=True))
                for name, columns in line["measures"].items()
            }
    return Run(folder, summary, rows)


def compare(groups: Sequence[Group], level: float = LEVEL, samples: int = SAMPLES, seed: int = 0) -> dict[str, Any]:
    """Lines (one for each group, system and measure) and differences, each with intervals and, in words, a verdict.

    In a group steered is held against its base and its expert; steered of each further group against that of the first.
    Raises DataError where the groups measured other things.
    """
    told = {(run.summary["task"], run.summary["split"]) for group in groups for run in group.runs}
    if len(told) > 1:
        kinds = " and ".join(f"{task} ({split})" for task, split in sorted(told))
        raise DataError(f"these runs measured {kinds}", "compare runs of one task or benchmark")
    lines, differences = [], []
    for group in groups:
        for measure in _measures([group]):
            estimates = {}
            for system in group.systems:
                if rows := group.rows(system, measure):
                    estimates[system] = _measured(rows, list(rows))
            found = bootstrap({s: m for s, m in estimates.items() if m.weights.sum() > 0}, samples, seed)
            lines += [_line(group, system, measure, found[system].interval(level)) for system in found]
        for against in ("base", "expert"):
            pair = ((group, "steered"), (group, against))
            differences += [_difference(*pair, name, level, samples, seed) for name in _measures([group])]
    for group in groups[1:]:
        pair = ((group, "steered"), (groups[0], "steered"))
        differences += [_difference(*pair, name, level, samples, seed) for name in _measures([group, groups[0]])]
    differences = [one for one in differences if one]
    ((task, split),) = told
    words = [_verdict(one, level) for one in differences]
    return {"task": task, "split": split, "lines": lines, "differences": differences, "verdicts": words, "level": level}


def mcnemar(of: Sequence[float], against: Sequence[float]) -> float | None:
    """The exact two-sided p that two systems are right equally often (McNemar 1947); None unless all are 0 or 1.

    of, against: 1 where a row is right, in the same order. Only rows that one has right and the other wrong count.
    """
    if not {*of, *against} <= {0.0, 1.0}:
        return None
    won = sum(a > b for a, b in zip(of, against, strict=True))
    lost = sum(a < b for a, b in zip(of, against, strict=True))
    tail = sum(math.comb(won + lost, i) for i in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))


def _measures(groups: Sequence[Group]) -> list[str]:
    """Those that every steered system of these groups has."""
    names = [run.rows.get("steered", {}) for group in groups for run in group.runs]
    return [name for name in names[0] if all(name in other for other in names)]


def _measured(rows: Rows, ids: Sequence[str]) -> Measured:
    pair_N2 = np.array([rows[id] for id in ids], dtype=np.float64)
    return Measured(ids, pair_N2[:, 0], pair_N2[:, 1])


def _line(group: Group, system: str, measure: str, interval: Interval) -> dict[str, Any]:
    values = group.values(system, measure)
    return {
        "run": group.name,
        "system": system,
        "alphas": group.alphas if system == "steered" else [],
        "runs": len(group.runs),
        "rows": len(group.rows(system, measure) or ()),
        "measure": measure,
        "value": interval.value,
        "ci": [interval.low, interval.high],
        "range": [min(values), max(values)],
    }


def _difference(
    of: tuple[Group, str], against: tuple[Group, str], measure: str, level: float, samples: int, seed: int
) -> dict[str, Any]:
    """`of` minus `against`: on the rows that both have, else as two samples. Empty where one was not measured."""
    ours, theirs = of[0].rows(of[1], measure), against[0].rows(against[1], measure)
    if not ours or not theirs:
        return {}
    common = [id for id in ours if id in theirs]
    first, second = (_measured(rows, common or list(rows)) for rows in (ours, theirs))
    if not first.weights.sum() or not second.weights.sum():
        return {}
    if common:
        estimates: Mapping[str, Estimate] = bootstrap({"of": first, "against": second}, samples, seed)
    else:
        estimates = bootstrap({"of": first}, samples, seed) | bootstrap({"against": second}, samples, seed + 1)
    interval = (estimates["of"] - estimates["against"]).interval(level)
    single = len(of[0].runs) == len(against[0].runs) == 1
    return {
        "of": {"run": of[0].name, "system": of[1]},
        "against": {"run": against[0].name, "system": against[1]},
        "measure": measure,
        "paired_rows": len(common),
        "value": interval.value,
        "ci": [interval.low, interval.high],
        "excludes_zero": interval.excludes_zero,
        "mcnemar": mcnemar(list(first.values), list(second.values)) if common and single else None,
    }


def _verdict(one: Mapping[str, Any], level: float) -> str:
    """One sentence: only an interval that excludes 0 counts as better or worse."""
    of, against = (f"{side['system']} of {side['run']}" for side in (one["of"], one["against"]))
    if one["of"]["run"] == one["against"]["run"]:
        against = one["against"]["system"]
    won = one["value"] * better(one["measure"], one["measure"]) > 0
    outcome = "cannot be told from" if not one["excludes_zero"] else "beats" if won else "is worse than"
    rows = f"{one['paired_rows']} paired rows" if one["paired_rows"] else "no row in common"
    return f"{of} {outcome} {against} on {spoken(one['measure'])} ({100 * level:g}% interval, {rows})."
