"""Evaluate many alphas, draw the curve, and keep the best alpha with the expert."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proxytune.errors import SettingsError
from proxytune.experts.registry import Expert, Registry
from proxytune.files import hash_json, write_json
from proxytune.settings import Evaluate, Sweep
from proxytune.stages import divergence, evaluate
from proxytune.stages.evaluate import Found, Records
from proxytune.stages.shared import trio as trios
from proxytune.stages.shared.start import start


def run(settings: Sweep) -> Found:
    """Score all alphas in one pass of each model, then collect."""
    if settings.select == "metric" and not settings.generate:
        raise SettingsError("select=metric needs written replies", "set generate=true or select=loss")
    return collect(settings, settings.alphas, settings.select, settings.divergence_rows)


def collect(
    settings: Evaluate, alphas: Sequence[float], select: str = "loss", divergence_rows: int = divergence.ROWS
) -> Found:
    """One table, one curve and the best alpha from the points of these alphas; computes those that are missing.

    The best alpha is chosen on validation rows only: it goes into the expert's manifest and `<name>@best` names that
    version from then on. On test rows the curve is drawn and nothing is chosen.
    """
    from proxytune.analysis import curve_figures, curves, tables

    alphas = sorted(set(alphas))
    expert = trios.find(settings)
    settings = trios.pinned(settings, expert)
    work = evaluate.asked(settings, expert)
    with start(settings, "sweep", evaluate.tags_of(settings), alphas=alphas) as tracked:
        folder = sweep_folder(settings, expert)
        records = evaluate.measure(settings, expert, work, alphas)
        if settings.split == "validation":
            chosen = best(records, select)
        else:  # judged at the alpha that was there before, or the one nearest to it
            chosen = min(alphas, key=lambda alpha: abs(alpha - trios.alpha_of(settings, expert)))
        found = evaluate.summarise(settings, expert, records, chosen=chosen, folder=folder)
        chooses = select if settings.split == "validation" else None
        apart = divergence.measured(settings, expert, alphas, divergence_rows)
        how = {"samples": settings.bootstrap_samples, "seed": settings.seed}
        found.summary.update(curves.told(records, apart, chooses, **how))
        write_json(found.path, found.summary, checked=True)
        config = settings.model_dump(mode="json", exclude={"command"}) | {"alphas": alphas}
        write_json(folder / "config.json", config, checked=True)
        picture = folder / "curve.png"
        curve_figures.alpha_curve(found.summary, picture)
        table = tables.sweep if settings.split == "validation" else tables.evaluation
        tables.console().print(table(found.summary))
        if chooses:
            print(curves.best_line(found.summary["best"]))
        evaluate.mirror(tracked, found, expert)
        for curve in found.summary["curves"]:
            name = curve["measure"]
            points = [[point["alpha"], point["value"]] for point in curve["points"]]
            tracked.curve(f"alpha_{name}", ("alpha", name), points, f"{name} against alpha")
        tracked.image("alpha curve", picture)
        if settings.split == "validation":
            _keep(settings, expert, chosen, select, found.summary, folder)
            print(
                f"{expert.name}@best is {expert.reference} with alpha {chosen:g}, best by {select} on validation rows"
            )
        else:
            print("no alpha was chosen: that is done on validation rows (proxytune sweep, or split=validation)")
    print(f"curve: {picture}")
    print(found.path)
    return found


def sweep_folder(settings: Evaluate, expert: Expert) -> Path:
    """Where a sweep's table and curve lie: named by everything but its alphas, so a widened sweep finds its place.

    Of several experts the settings are `pinned`.
    """
    content = settings.model_dump(mode="json", include={"task", "data", "split", "decode", "generate", "family"})
    content |= {"expert": expert.reference, "base": settings.base_ref.model_dump()}
    if beside := settings.steering[1:]:
        content["held"] = [[other.expert, other.alpha] for other in beside]
    if settings.base is not None:
        content["served"] = settings.base.model_dump(include={"name", "url", "model", "top", "mode"})
    return settings.outputs / "sweeps" / f"{settings.task.name}-{settings.family.name}-{hash_json(content)[:12]}"


def best(records: Records, select: str) -> float:
    """The alpha with the lowest loss, or the highest metric; of equals the one nearest to 0, which changes least."""

    def cost(rows: list[dict[str, Any]]) -> float:
        if select == "loss":
            if any(row["loss"] is None for row in rows):
                raise SettingsError(
                    "select=loss, and the server's best scores do not tell the loss", "give select=metric"
                )
            return sum(row["loss"] for row in rows) / sum(row["tokens"] for row in rows)
        return -sum(next(iter(row["metrics"].values())) for row in rows)  # the first metric is the task's own

    steered = {alpha: rows for (_, alpha), rows in records.items() if alpha is not None}
    return min(steered, key=lambda alpha: (cost(steered[alpha]), abs(alpha)))


def _keep(settings: Evaluate, expert: Expert, alpha: float, select: str, summary: dict[str, Any], folder: Path) -> None:
    registry = Registry(settings.outputs / "registry")
    chosen = next(row for row in summary["rows"] if row["alpha"] == alpha and row["system"] == "steered")
    told = {"alpha": alpha, "by": select, "base": trios.base_name(settings), "loss": chosen["loss"], "n": chosen["n"]}
    curve = [[row["alpha"], row["loss"], row["metric"]] for row in summary["rows"] if row["system"] == "steered"]
    registry.update(expert, alpha=alpha, scores={"selection": told | {"curve": curve}})
    registry.tag(expert.reference, "best")
    write_json(folder / "best.json", told | {"expert": expert.reference})
