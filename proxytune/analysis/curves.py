"""What a sweep says of alpha: a curve for every measure, and how sure its best alpha is.

curves   one for each measure: `measure`, `better` (1 more, -1 less, 0 neither), `points` (alpha, value, ci), and
         `levels`: the value of each system that has no alpha
best     `alpha`, what it is best `by`, its interval `ci`, and `shares`: how often each alpha was best on rows drawn
         anew (the bootstrap of the arg-best)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from proxytune.evaluation.intervals import LEVEL, SAMPLES, Measured, bootstrap
from proxytune.evaluation.summary import better, spoken

DIVERGENCES = {"kl_base": "KL of steered from base", "kl_expert": "KL of steered from expert"}
Key = tuple[str, float | None]  # system, alpha
Rows = Sequence[Mapping[str, Any]]


def told(
    records: Mapping[Key, Rows],
    divergences: Mapping[float, Rows],
    select: str | None,
    *,
    level: float = LEVEL,
    samples: int = SAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """records: of every system and alpha its rows (evaluation/points.py). divergences: by alpha rows with `kl_base`,
    `kl_expert` and `tokens`. select: `loss` or `metric`; None chooses nothing."""
    measures = _measures(records)
    curves = [_curve(name, own, level, samples, seed) for name, own in measures.items()]
    for name in DIVERGENCES if divergences else ():
        its: dict[Key, Measured] = {("steered", alpha): _summed(rows, name) for alpha, rows in divergences.items()}
        curves.append(_curve(name, its, level, samples, seed))
    if select is None:
        return {"curves": curves}
    name = "loss" if select == "loss" else next(name for name in measures if name != "loss")
    steered = {alpha: one for (_, alpha), one in measures[name].items() if alpha is not None}
    return {"curves": curves, "best": {"by": name} | best(steered, direction(name), level, samples, seed)}


def best(
    steered: Mapping[float, Measured], sign: int, level: float = LEVEL, samples: int = SAMPLES, seed: int = 0
) -> dict[str, Any]:
    """The best alpha by a measure of which more (sign 1) or less (-1) is better; of equals the one nearest to 0."""
    alphas = sorted(steered, key=abs)
    estimates = bootstrap({alpha: steered[alpha] for alpha in alphas}, samples, seed)
    draws_SA = np.stack([estimates[alpha].draws for alpha in alphas], axis=1)
    drawn = np.array(alphas)[np.argmax(sign * draws_SA, axis=1)]
    values = [sign * estimates[alpha].value for alpha in alphas]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return {
        "alpha": float(alphas[int(np.argmax(values))]),
        "ci": [float(low), float(high)],
        "level": level,
        "shares": [{"alpha": float(alpha), "share": float((drawn == alpha).mean())} for alpha in sorted(alphas)],
    }


def curves_of(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A summary's curves; of one that has none, such as a benchmark's, those that its rows make."""
    if "curves" in summary:
        return summary["curves"]
    found: dict[str, dict[Key, Mapping[str, Any]]] = {}
    for row in summary["rows"]:
        for name, one in row_measures(row).items():
            found.setdefault(name, {})[row["system"], row["alpha"]] = one
    return [_as_curve(name, its) for name, its in found.items()]


def row_measures(row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Every measure of a summary's row as value and ci."""
    own = {"loss": "loss", "metric": row["metric_name"]}
    told = {own[k]: {"value": row[k], "ci": row[f"{k}_ci"]} for k in own if row[k] is not None}
    return told | row.get("measures", {})


def direction(name: str) -> int:
    """1 where more of a measure is better, -1 where less is, 0 where neither."""
    return 0 if name in DIVERGENCES else better("loss" if name == "loss" else "metric", name)


def title(name: str) -> str:
    """A measure as people say it."""
    return "loss, nats per token" if name == "loss" else DIVERGENCES.get(name) or spoken(name)


def best_line(found: Mapping[str, Any]) -> str:
    """How sure the best alpha is, in one sentence."""
    often = sorted((one for one in found["shares"] if one["share"] >= 0.005), key=lambda one: -one["share"])
    shares = ", ".join(f"{one['alpha']:g} in {one['share']:.0%}" for one in often)
    low, high = found["ci"]
    return (
        f"Best alpha by {spoken(found['by'])}: {found['alpha']:g} [{low:g}, {high:g}]; "
        f"on rows drawn anew the best is {shares}."
    )


def _measures(records: Mapping[Key, Rows]) -> dict[str, dict[Key, Measured]]:
    """By measure the rows of every system and alpha: the loss, then the task's metrics in their order.

    A loss that a base behind an API does not tell has no curve.
    """
    weighed = all(row["loss"] is not None for rows in records.values() for row in rows)
    losses = {key: _summed(rows, "loss") for key, rows in records.items()} if weighed else {}
    found: dict[str, dict[Key, Measured]] = {"loss": losses} if losses else {}
    for key, rows in records.items():
        for name in rows[0].get("metrics", ()):
            values = np.array([row["metrics"][name] for row in rows])
            found.setdefault(name, {})[key] = Measured([row["id"] for row in rows], values, np.ones(len(rows)))
    return found


def _summed(rows: Rows, name: str) -> Measured:
    ids = [row["id"] for row in rows]
    return Measured(ids, np.array([row[name] for row in rows]), np.array([float(row["tokens"]) for row in rows]))


def _curve(name: str, measures: Mapping[Key, Measured], level: float, samples: int, seed: int) -> dict[str, Any]:
    intervals = {key: one.interval(level) for key, one in bootstrap(measures, samples, seed).items()}
    return _as_curve(name, {key: {"value": i.value, "ci": [i.low, i.high]} for key, i in intervals.items()})


def _as_curve(name: str, its: Mapping[Key, Mapping[str, Any]]) -> dict[str, Any]:
    points = [
        {"alpha": alpha, "value": one["value"], "ci": one["ci"]} for (_, alpha), one in its.items() if alpha is not None
    ]
    return {
        "measure": name,
        "better": direction(name),
        "points": sorted(points, key=lambda point: point["alpha"]),
        "levels": {system: one["value"] for (system, alpha), one in its.items() if alpha is None},
    }
