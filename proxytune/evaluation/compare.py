"""Runs beside each other: the same systems, on the same rows where they share them, with paired intervals.

A run is a folder with `summary.json` and, beside it, `scores.jsonl` (every row's own numbers). Rows are matched by id,
and by a digest of their question and right answer: a row is never held against another of the same name.

Several runs of one experiment, such as its seeds, are pooled: sums over rows and runs. Intervals resample rows and runs
(`intervals.pooled`), so three seeds on 200 rows are never mistaken for 600 rows. Two or three runs show little of what
further ones would give: the range over the runs is told beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proxytune.errors import DataError
from proxytune.evaluation.intervals import LEVEL, SAMPLES, Estimate, Interval, Measured, gap_closed, pooled
from proxytune.evaluation.summary import SCORES, SYSTEMS, better, spoken, told_gap
from proxytune.files import read_json, read_jsonl

SUMMARY = "summary.json"
Rows = Mapping[str, tuple[float, float]]  # of each row id (value, weight)


@dataclass(frozen=True)
class Run:
    """What one run found. rows: of each system (steered at the chosen alpha) and measure; digests: of each row.

    unparsed: of each system how many outputs could not be read, where the benchmark tells that.
    """

    path: Path
    summary: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Rows]]
    digests: Mapping[str, str]
    unparsed: Mapping[str, int]


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

    def ids(self, system: str, measure: str) -> list[str]:
        """The rows that any of the runs has; none where a run lacks the measure."""
        each = [run.rows.get(system, {}).get(measure) for run in self.runs]
        return [] if None in each else list(dict.fromkeys(id for rows in each for id in rows or ()))

    def measured(self, system: str, measure: str, ids: Sequence[str]) -> list[Measured]:
        """One for each run, on these rows; a row that a run does not have weighs nothing in it."""
        found = []
        for run in self.runs:
            pair_N2 = np.array([run.rows[system][measure].get(id, (0.0, 0.0)) for id in ids], dtype=np.float64)
            found.append(Measured(ids, pair_N2[:, 0], pair_N2[:, 1]))
        return found

    def unparsed(self, system: str) -> int | None:
        """In all runs together."""
        told = [run.unparsed.get(system) for run in self.runs]
        return None if None in told else sum(count or 0 for count in told)

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
    rows, digests = {}, {}
    for line in read_jsonl(folder / SCORES):
        if line.get("digests"):
            digests |= dict(zip(line["ids"], line["digests"], strict=True))
        if line["system"] != "steered" or line["alpha"] == summary["chosen"]:
            rows[line["system"]] = {
                name: dict(zip(line["ids"], zip(columns["values"], columns["weights"], strict=True), strict=True))
                for name, columns in line["measures"].items()
            }
    shown = [row for row in summary["rows"] if row["alpha"] in (None, summary["chosen"])]
    unparsed = {row["system"]: row["unparsed"] for row in shown if "unparsed" in row}
    return Run(folder, summary, rows, digests, unparsed)


def compare(groups: Sequence[Group], level: float = LEVEL, samples: int = SAMPLES, seed: int = 0) -> dict[str, Any]:
    """Lines (one for each group, system and measure), differences and the gaps closed, all with intervals; of each
    difference, in words, a verdict.

    In a group steered is held against its base and its expert; steered of each further group against that of the first.
    Raises DataError where the groups measured other things.
    """
    told = {(run.summary["task"], run.summary["split"]) for group in groups for run in group.runs}
    if len(told) > 1:
        kinds = " and ".join(f"{task} ({split})" for task, split in sorted(told))
        raise DataError(f"these runs measured {kinds}", "compare runs of one task or benchmark")
    refuse_other_rows([run for group in groups for run in group.runs])
    lines, differences = [], []
    for group in groups:
        for measure in _measures([group]):
            for system in group.systems:
                measured = group.measured(system, measure, group.ids(system, measure))
                if sum(one.weights.sum() for one in measured) > 0:
                    found = pooled({system: measured}, samples, seed)[system].interval(level)
                    lines.append(_line(group, system, measure, found))
        for against in ("base", "expert"):
            pair = ((group, "steered"), (group, against))
            differences += [_difference(*pair, name, level, samples, seed) for name in _measures([group])]
    for group in groups[1:]:
        pair = ((group, "steered"), (groups[0], "steered"))
        differences += [_difference(*pair, name, level, samples, seed) for name in _measures([group, groups[0]])]
    differences = [one for one in differences if one]
    ((task, split),) = told
    gaps = [_gap(group, measure, level, samples, seed) for group in groups for measure in _measures([group])]
    return {
        "task": task,
        "split": split,
        "lines": lines,
        "differences": differences,
        "verdicts": [_verdict(one, level) for one in differences],
        "gaps_closed": [one for one in gaps if one],
        "level": level,
    }


def refuse_other_rows(runs: Sequence[Run]) -> None:
    """DataError naming two runs that have unlike rows under one id."""
    first: dict[str, Run] = {}
    for run in runs:
        for id, digest in run.digests.items():
            other = first.setdefault(id, run)
            if other.digests[id] != digest:
                raise DataError(
                    f"row {id!r} of {run.path} is another than that of {other.path}",
                    "compare runs of the same rows: the same file, seed and way of asking",
                )


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


def _line(group: Group, system: str, measure: str, interval: Interval) -> dict[str, Any]:
    values = group.values(system, measure)
    return {
        "run": group.name,
        "system": system,
        "alphas": group.alphas if system == "steered" else [],
        "runs": len(group.runs),
        "rows": len(group.ids(system, measure)),
        "unparsed": group.unparsed(system),
        "measure": measure,
        "value": interval.value,
        "ci": [interval.low, interval.high],
        "range": [min(values), max(values)],
    }


def _difference(
    of: tuple[Group, str], against: tuple[Group, str], measure: str, level: float, samples: int, seed: int
) -> dict[str, Any]:
    """`of` minus `against`: on the rows that both have, else as two samples. Empty where one was not measured."""
    ours, theirs = (group.ids(system, measure) for group, system in (of, against))
    if not ours or not theirs:
        return {}
    known = set(theirs)
    common = [id for id in ours if id in known]
    first, second = (
        group.measured(system, measure, common or ids) for (group, system), ids in ((of, ours), (against, theirs))
    )
    if not all(sum(one.weights.sum() for one in each) > 0 for each in (first, second)):
        return {}
    if common:  # a group's own systems were measured in the same runs
        estimates: Mapping[str, Estimate] = pooled(
            {"of": first, "against": second}, samples, seed, together=of[0] is against[0]
        )
    else:
        estimates = pooled({"of": first}, samples, seed) | pooled({"against": second}, samples, seed + 1)
    interval = (estimates["of"] - estimates["against"]).interval(level)
    single = len(first) == len(second) == 1
    return {
        "of": {"run": of[0].name, "system": of[1]},
        "against": {"run": against[0].name, "system": against[1]},
        "measure": measure,
        "paired_rows": len(common),
        "value": interval.value,
        "ci": [interval.low, interval.high],
        "excludes_zero": interval.excludes_zero,
        "mcnemar": mcnemar(list(first[0].values), list(second[0].values)) if common and single else None,
    }


def _gap(group: Group, measure: str, level: float, samples: int, seed: int) -> dict[str, Any]:
    """How much of the way from base to tuned a group went. Empty where one of them was not measured."""
    systems = ("base", "steered", "tuned")
    ids = group.ids("steered", measure)
    if not ids or not all(group.ids(system, measure) for system in systems):
        return {}
    measured = {system: group.measured(system, measure, ids) for system in systems}
    if not all(sum(one.weights.sum() for one in each) > 0 for each in measured.values()):
        return {}
    found = pooled(measured, samples, seed)
    gap = gap_closed(found["base"], found["steered"], found["tuned"], level)
    return {"run": group.name, "measure": measure, **told_gap(gap, better(measure, measure))}


def _verdict(one: Mapping[str, Any], level: float) -> str:
    """One sentence: only an interval that excludes 0 counts as better or worse."""
    of, against = (f"{side['system']} of {side['run']}" for side in (one["of"], one["against"]))
    if one["of"]["run"] == one["against"]["run"]:
        against = one["against"]["system"]
    won = one["value"] * better(one["measure"], one["measure"]) > 0
    outcome = "cannot be told from" if not one["excludes_zero"] else "beats" if won else "is worse than"
    rows = f"{one['paired_rows']} paired rows" if one["paired_rows"] else "no row in common"
    return f"{of} {outcome} {against} on {spoken(one['measure'])} ({100 * level:g}% interval, {rows})."
