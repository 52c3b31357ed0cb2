"""Does expert - anti help this base here: losses on a few validation rows, and if not, which usual reason it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from proxytune.decoding.mixture import Mixture
from proxytune.decoding.scoring import Given, losses
from proxytune.errors import DataError, TrioError
from proxytune.evaluation.intervals import Estimate, Measured, bootstrap, paired_difference
from proxytune.experts.registry import Expert
from proxytune.settings import Doctor
from proxytune.stages.shared import trio as trios
from proxytune.stages.shared.start import dataset

BATCH = 8  # rows in a forward


def told(settings: Doctor, expert: Expert) -> Iterator[str]:
    """The losses, the best alpha with its interval, and what to make of it. TrioError where steering does not help."""
    nats, ids, counts = measured(settings, expert)
    estimates = bootstrap(
        {name: Measured(ids, each, counts) for name, each in nats.items()}, settings.bootstrap_samples, settings.seed
    )
    alphas = [name for name in estimates if isinstance(name, float)]
    best = min(alphas, key=lambda alpha: estimates[alpha].value)
    yield f"nats a token on {len(ids)} validation rows: " + ", ".join(
        f"{name} {estimates[name].value:.4f}" for name in ("base", "expert", "anti")
    )
    yield "steered: " + ", ".join(f"alpha {alpha:g} {estimates[alpha].value:.4f}" for alpha in alphas)
    change = paired_difference(estimates[best], estimates["base"])
    interval = f"{change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"
    told = f"at alpha {best:g} steering changes the base's loss by {interval}"
    if change.value >= 0:
        why, hint = reason(estimates, alphas)
        raise TrioError(f"{told}: it does not help here; {why}", hint)
    yield told + (": it helps" if change.high < 0 else ": more rows must tell whether it helps, rows=200")
    yield "this alpha was chosen on these very rows: proxytune sweep chooses, proxytune evaluate confirms"
    yield from advice(estimates, alphas, best)


def measured(settings: Doctor, expert: Expert) -> tuple[dict[str | float, np.ndarray], list[str], np.ndarray]:
    """Nats of each row by system or alpha, the rows' ids, their tokens. DataError where no row fits the contexts."""
    rows = dataset(settings).held("validation")[: settings.rows]
    beside = trios.held(settings)
    trio = trios.load(settings, expert, beside)
    systems = trios.mixtures(trio)
    told = trios.given(trio, systems["steered"], rows)
    if not told:
        what = f"all of the first {len(rows)} validation rows are longer than a model's context"
        raise DataError(what, "give shorter ones, or rows=200")
    given = [one for _, one in told]
    alphas = sorted({*settings.alphas, trios.alpha_of(settings, expert)} - {0.0}) or [1.0]
    steered = np.array(_nats(systems["steered"], given, [trios.alphas(systems["steered"], a, beside) for a in alphas]))
    found: dict[str | float, np.ndarray] = {"base": _alone(systems["base"], given)}
    found |= {"expert": _alone(systems["expert"], given)}
    found |= {"anti": _alone(Mixture(trio.pairs[0][1], trio.vocabulary), given)}
    found |= {alpha: steered[:, place] for place, alpha in enumerate(alphas)}
    return found, [row["id"] for row, _ in told], np.array([len(one.completion) for one in given])


def _alone(mixture: Mixture, given: list[Given]) -> np.ndarray:
    return np.array(_nats(mixture, given, [()]))[:, 0]


def _nats(mixture: Mixture, given: list[Given], alphas: list[Any]) -> list[list[float]]:
    return [row for batch in losses(mixture, given, alphas, batch_size=BATCH) for row in batch]


def reason(of: Mapping[Any, Estimate], alphas: list[float]) -> tuple[str, str]:
    """Which usual reason a steering without effect has, and what to do."""
    base, expert, anti = (of[name].value for name in ("base", "expert", "anti"))
    if abs(expert - anti) < 1e-6:
        return (
            "expert and anti score alike, as if the adapter were not there",
            "tune the expert again: proxytune expert",
        )
    if expert > anti:
        return (
            "the expert is worse on these rows than the model it was tuned from",
            "give rows of its own task (task=, data=), or tune it longer",
        )
    if base > anti:
        return (
            "the base is worse on these rows than the untuned small model, so it has nothing to add",
            "use the expert alone, or a stronger base",
        )
    if base < expert:
        return (
            "the base is better than the expert already, and the expert learnt nothing that it lacks",
            f"try alphas below {min(alphas):g}, or an expert that was tuned on what the base does badly",
        )
    return (
        "the expert's change does not fit this base",
        f"try alphas below {min(alphas):g}; see whether the prompts above are right",
    )


def advice(of: Mapping[Any, Estimate], alphas: list[float], best: float) -> Iterator[str]:
    """What a steering that helps still leaves to say."""
    against = paired_difference(of[best], of["expert"])
    if against.low > 0:
        yield "the expert alone is better than the steered base: the base knows too little of this"
    if best == max(alphas) and len(alphas) > 1:
        yield f"the largest alpha was the best: try larger ones, alphas=[{best:g},{2 * best:g}]"
