"""What one evaluation or sweep found, as the content of `summary.json`: the same numbers that tables and pictures show.

    task, family, expert, split     what was measured
    rows                            one for each system and alpha: system, alpha, n, loss, metric, metric_name, loss_ci,
                                    metric_ci; loss in nats per token, metric in 0..1; a benchmark tells more
                                    (stages/benchmark.py)
    chosen                          the alpha that everything below is about
    differences                     steered minus base and minus expert, on the same resampled rows
    gap_closed                      (steered - base) / (tuned - base) for loss and metric; {} where nothing was tuned;
                                    unstable or backwards where base and tuned are alike, or tuned is the worse one
    verdict                         one sentence
    level                           of every interval
    rows_fingerprint                of questions and right answers: runs that share it measured the same rows
    command, commit                 how it was made
    notes                           with a base behind an API: certified tokens, calls, numbers that are left out

A number that does not exist is null, never NaN.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proxytune.evaluation.intervals import (
    LEVEL,
    SAMPLES,
    Estimate,
    Gap,
    Interval,
    Measured,
    bootstrap,
    gap_closed,
    paired_difference,
)
from proxytune.files import hash_json

SYSTEMS = ("base", "expert", "steered", "tuned")
MEASURES = ("loss", "metric")
# Metrics of which less is better; the latter are the harness's.
LOWER_IS_BETTER = ("toxic", "bits_per_byte", "log_byte_perplexity", "log_word_perplexity", "log_perplexity")

SCORES = "scores.jsonl"  # beside a summary.json: the rows' own numbers, one line for each system and alpha

ROWS = "rows"  # beside a summary.json, where replies were written: the folder of each system's own

Key = tuple[str, float | None, str]  # system, alpha, measure


@dataclass(frozen=True)
class Scores:
    """One system's scores on N rows. All systems of a summary have the same rows in the same order.

    alpha: of the steered system, else None. loss (N,): nats of the whole reference completion, or None where only
    replies were scored. tokens (N,): how many tokens that is. metric (N,): in 0..1, or None where nothing was
    generated. weights (N,): what a row counts in the metric, 0 where nothing could be parsed; None is 1 each. digests:
    of each row's question and right answer, None where nobody made them.
    """

    system: str
    alpha: float | None
    loss: np.ndarray | None
    tokens: np.ndarray | None
    metric: np.ndarray | None
    metric_name: str
    ids: list[str]
    weights: np.ndarray | None = None
    digests: list[str] | None = None

    def __post_init__(self) -> None:
        assert self.system in SYSTEMS, f"{self.system} is not a system"
        assert (self.alpha is not None) == (self.system == "steered"), "alpha is the steered system's, and only its"

    def measures(self) -> dict[str, Measured]:
        found = {}
        if self.loss is not None:
            found["loss"] = Measured(self.ids, np.asarray(self.loss), np.asarray(self.tokens))
        if self.metric is not None:
            weights = np.ones(len(self.ids)) if self.weights is None else np.asarray(self.weights)
            found["metric"] = Measured(self.ids, np.asarray(self.metric), weights)
        return found

    def told(self) -> dict[str, Any]:
        """For a file: every measure by its own name."""
        names = {"loss": "loss", "metric": self.metric_name}
        numbers = {
            names[name]: {"values": measured.values.tolist(), "weights": measured.weights.tolist()}
            for name, measured in self.measures().items()
        }
        return {
            "system": self.system,
            "alpha": self.alpha,
            "ids": self.ids,
            "digests": self.digests,
            "measures": numbers,
        }


def build(
    task: str,
    family: str,
    scores: list[Scores],
    *,
    expert: str,
    split: str,
    chosen: float | None = None,
    level: float = LEVEL,
    samples: int = SAMPLES,
    seed: int = 0,
    command: str = "",
    commit: str = "",
) -> dict[str, Any]:
    """chosen: the steered alpha to judge by; may be left out where only one was measured.

    Raises DataError where there are no rows.
    """
    scores = sorted(scores, key=lambda one: (SYSTEMS.index(one.system), one.alpha or 0.0))
    chosen = _chosen(scores, chosen)
    measures = {(one.system, one.alpha, name): m for one in scores for name, m in one.measures().items()}
    assert len({(one.system, one.alpha) for one in scores}) == len(scores), "a system was given twice at one alpha"
    estimates = bootstrap(measures, samples, seed)
    metric_name = scores[0].metric_name if scores else ""
    differences = [_difference(estimates, chosen, against, level) for against in ("base", "expert")]
    differences = [one for one in differences if one]
    return {
        "task": task,
        "family": family,
        "expert": expert,
        "split": split,
        "rows": [_row(one, estimates, level) for one in scores],
        "chosen": chosen,
        "differences": differences,
        "gap_closed": _gaps(estimates, chosen, metric_name, level),
        "verdict": verdict(differences, chosen, metric_name, level),
        "level": level,
        "rows_fingerprint": _fingerprint(scores),
        "command": command,
        "commit": commit,
    }


def verdict(differences: list[dict[str, Any]], alpha: float | None, metric_name: str, level: float = LEVEL) -> str:
    """One sentence on whether steering helped: only an interval that excludes 0 counts as better or worse."""
    told: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for one in differences:
        told.setdefault(_judgement(one, metric_name), []).append(one["against"])
    if not told or alpha is None:
        return "There is nothing to compare steering with."
    clauses = [
        " and ".join(f"{outcome} {and_join(against)} on {measures}" for outcome, measures in judgement)
        for judgement, against in told.items()
    ]
    beaten = [_outcome(one, name, metric_name) for one in differences for name in MEASURES if one["against"] == "base"]
    helped = "beats" in beaten
    opening = "" if helped else "does not help: it "
    return f"Steering at alpha {alpha:g} {opening}{'; it '.join(clauses)} ({100 * level:g}% paired intervals)."


def with_server(summary: dict[str, Any], records: Mapping[tuple[str, float | None], Sequence[Any]]) -> dict[str, Any]:
    """The summary with what there is to tell of a base behind an API.

    records: the rows' own, by (system, alpha). A row gets `certified`, the share of written tokens that are, and
    `calls_per_token`; `notes` says it in words, and which numbers the server's scores leave open.
    """
    rows, notes, open_ = [], [], []
    for row in summary["rows"]:
        its = records[row["system"], row["alpha"]]
        told = [one["served"] for one in its if "served" in one]
        label = row["system"] if row["alpha"] is None else f"{row['system']} at alpha {row['alpha']:g}"
        tokens, marked, calls = (sum(one[key] for one in told) for key in ("tokens", "marked", "calls"))
        if tokens:
            row |= {"certified": 1 - marked / tokens, "calls_per_token": calls / tokens}
            notes.append(
                f"{label}: {row['certified']:.1%} of {tokens:,} tokens certified, {calls / tokens:.2f} calls a token"
            )
        if any(one.get("loss", 0.0) is None for one in its):
            open_.append(label)
        rows.append(row)
    if open_:
        notes.append(f"no loss of {and_join(open_)}: the server's best scores leave open what all others come to")
    return summary | {"rows": rows, "notes": notes}


def rows_file(folder: Path, system: str, alpha: float | None) -> Path:
    """Where, beside a summary in `folder`, the rows of one system stand."""
    return folder / ROWS / f"{system if alpha is None else f'{system}-{alpha:g}'}.jsonl"


def and_join(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def better(measure: str, metric_name: str) -> int:
    """1 where more of a measure is better, else -1."""
    return -1 if measure == "loss" or metric_name in LOWER_IS_BETTER else 1


def spoken(metric_name: str) -> str:
    """`exact_match` as people say it."""
    return metric_name.replace("_", " ")


def too_long(records: Mapping[Any, Sequence[Mapping[str, Any]]]) -> set[int]:
    """The places of rows that are longer than a context of any system, told on standard error: they count for none."""
    found = {i for rows in records.values() for i, row in enumerate(rows) if row.get("too_long")}
    if found:
        print(f"proxytune: {len(found)} rows are left out: they are longer than a model's context", file=sys.stderr)
    return found


def digest(prompt: str, reference: Any) -> str:
    """Of a row: its question as it is put plainly, and what is right."""
    return hash_json([prompt, reference])[:16]


def _fingerprint(scores: list[Scores]) -> str | None:
    if not scores or scores[0].digests is None:
        return None
    return hash_json(sorted(zip(scores[0].ids, scores[0].digests, strict=True)))[:16]


def _chosen(scores: list[Scores], chosen: float | None) -> float | None:
    """The measured alpha that was asked for, to the last bit as it stands in the scores."""
    steered = [one.alpha for one in scores if one.system == "steered" and one.alpha is not None]
    if chosen is None:
        assert len(steered) <= 1, f"steered was measured at {steered}: say which alpha is chosen"
        return steered[0] if steered else None
    near = [alpha for alpha in steered if math.isclose(alpha, chosen, abs_tol=1e-9)]
    assert near, f"alpha {chosen} was chosen, but measured were {steered}"
    return near[0]


def _row(one: Scores, estimates: Mapping[Key, Estimate], level: float) -> dict[str, Any]:
    row: dict[str, Any] = {"system": one.system, "alpha": one.alpha, "n": len(one.ids), "metric_name": one.metric_name}
    for name in MEASURES:
        found = estimates.get((one.system, one.alpha, name))
        row |= _told(name, found.interval(level) if found else None)
    return row


def _difference(estimates: Mapping[Key, Estimate], alpha: float | None, against: str, level: float) -> dict[str, Any]:
    """Empty where one of the two was not measured."""
    found: dict[str, Any] = {}
    excludes: dict[str, bool] = {}
    for name in MEASURES:
        steered, other = estimates.get(("steered", alpha, name)), estimates.get((against, None, name))
        interval = paired_difference(steered, other, level) if steered and other else None
        found |= _told(name, interval)
        excludes[name] = bool(interval and interval.excludes_zero)
    if all(found[name] is None for name in MEASURES):
        return {}
    return {"of": "steered", "against": against, **found, "excludes_zero": excludes}


def _gaps(estimates: Mapping[Key, Estimate], alpha: float | None, metric_name: str, level: float) -> dict[str, Any]:
    gaps = {}
    for name in MEASURES:
        base, tuned = estimates.get(("base", None, name)), estimates.get(("tuned", None, name))
        steered = estimates.get(("steered", alpha, name))
        if base and steered and tuned:
            gaps[name] = told_gap(gap_closed(base, steered, tuned, level), better(name, metric_name))
    return gaps


def told_gap(gap: Gap, sign: int) -> dict[str, Any]:
    """sign: 1 where more is better, else -1. backwards: tuned is worse than base, so there is no gap to close."""
    backwards = not gap.unstable and gap.way.value * sign < 0
    return {
        "value": _number(gap.share.value),
        "ci": _bounds(gap.share),
        "unstable": gap.unstable,
        "backwards": backwards,
    }


def _judgement(difference: dict[str, Any], metric_name: str) -> tuple[tuple[str, str], ...]:
    """What steering did against one other system: pairs of an outcome and the measures that had it."""
    told: dict[str, list[str]] = {}
    for name in MEASURES:
        if difference[name] is not None:
            outcome = _outcome(difference, name, metric_name)
            told.setdefault(outcome, []).append("loss" if name == "loss" else spoken(metric_name))
    return tuple((outcome, and_join(names)) for outcome, names in told.items())


def _outcome(difference: dict[str, Any], name: str, metric_name: str) -> str:
    if not difference["excludes_zero"][name]:
        return "cannot be told from"
    return "beats" if difference[name] * better(name, metric_name) > 0 else "is worse than"


def _told(name: str, interval: Interval | None) -> dict[str, Any]:
    if interval is None:
        return {name: None, f"{name}_ci": None}
    return {name: _number(interval.value), f"{name}_ci": _bounds(interval)}


def _bounds(interval: Interval) -> list[float | None]:
    return [_number(interval.low), _number(interval.high)]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
