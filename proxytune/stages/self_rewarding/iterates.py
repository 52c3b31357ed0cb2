"""What became of a model from iterate to iterate: the task's metric on held-out rows, with paired intervals."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from proxytune.evaluation import points
from proxytune.evaluation.intervals import Measured, bootstrap
from proxytune.evaluation.points import Measure, Point
from proxytune.experts.registry import Expert
from proxytune.files import hash_json, write_json
from proxytune.settings import Decode
from proxytune.stages import evaluate
from proxytune.stages.self_rewarding.loop import Loop
from proxytune.stages.shared.room import in_smaller_batches
from proxytune.stages.shared.start import start
from proxytune.stages.shared.trio import weights_of
from proxytune.tasks.task import Row


def told(loop: Loop, made: Sequence[Expert], yields: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Measure every iterate, write summary.json, and print the table."""
    rows = loop.data.rows["test"][: loop.plan.held_out]
    records = [_measured(loop, expert, rows) for expert in made] if rows else [[] for _ in made]
    summary = {
        "task": loop.task.name,
        "metric": loop.task.metric_name,
        "rows": len(rows),
        "iterates": _compared(loop, made, records),
        "yields": list(yields),
    }
    path = loop.work / "summary.json"
    with start(loop.settings, "self_rewarding", ["held-out"]) as tracked:
        write_json(path, summary)
        for one in summary["iterates"]:
            name = one["expert"].partition("@")[0].rpartition("-")[2]
            tracked.summary({f"{name}/{key}": one[key] for key in ("metric", "loss")})
        uses = [expert.reference for expert in made]
        tracked.artifact(f"{loop.name}-rounds", "result", path, {"rows": len(rows)}, uses=uses)
    _show(summary)
    print(path)
    return summary


def _measured(loop: Loop, expert: Expert, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Greedy replies and losses of one iterate by itself, kept as a point is."""
    measure = Measure(
        task=loop.task,
        rows=rows,
        fingerprint=hash_json(rows),
        decode=Decode(batch_size=loop.plan.batch_size),
        limits=loop.limits(),
        generate=True,
        dtype=loop.settings.family.dtype,
    )
    models = {"anti": expert.manifest.anti.model_dump(include={"weights", "tokenizer"}), "expert": weights_of(expert)}
    point, outputs = Point("alone", None, models), loop.settings.outputs
    if (known := points.kept(outputs, measure, point)) is not None:
        return known
    system, parts = loop.author(expert).system, [measure.part(outputs, point)]
    (found,) = in_smaller_batches(
        lambda most: evaluate.computed(measure.at_most(most), system, [()], parts), measure.at_once
    )
    points.keep(outputs, measure, point, found)
    return found


def _compared(loop: Loop, made: Sequence[Expert], records: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each iterate's mean metric and loss per token, and what the metric gained on the one before and on the first."""
    if not records[0]:
        empty = {"metric": None, "ci": None, "loss": None, "gained": None, "gained_in_all": None}
        return [{"expert": expert.reference, **empty} for expert in made]
    name = loop.task.metric_name
    ids = [record["id"] for record in records[0]]
    read = np.array([not record.get("too_long") for record in records[0]], dtype=float)
    estimates = bootstrap(
        {n: Measured(ids, np.array([r["metrics"][name] for r in each]), read) for n, each in enumerate(records)},
        seed=loop.settings.seed,
    )
    found = []
    for n, (expert, each) in enumerate(zip(made, records, strict=True)):
        own = estimates[n].interval()
        found.append(
            {
                "expert": expert.reference,
                "metric": own.value,
                "ci": [own.low, own.high],
                "loss": sum(r["loss"] for r in each) / sum(r["tokens"] for r in each),
                "gained": _difference(estimates[n], estimates[n - 1]) if n else None,
                "gained_in_all": _difference(estimates[n], estimates[0]) if n else None,
            }
        )
    return found


def _difference(of, against) -> dict[str, Any]:
    interval = (of - against).interval()
    return {"value": interval.value, "ci": [interval.low, interval.high], "told_apart": interval.excludes_zero}


def _show(summary: Mapping[str, Any]) -> None:
    from rich.text import Text

    from proxytune.analysis import tables

    table = tables.tight()
    for name in ("iterate", "pairs", f"{summary['metric']} [95%]", "on the one before [95%]", "loss"):
        table.add_column(name, justify="left" if name == "iterate" else "right")
    pairs = ["", *(str(one["pairs"]) for one in summary["yields"])]
    for one, count in zip(summary["iterates"], pairs, strict=True):
        gained = one["gained"]
        cells = ("-", "-", "-") if one["metric"] is None else (
            tables.with_interval(one["metric"], one["ci"], ".3f"),
            tables.with_interval(gained["value"], gained["ci"], "+.3f") if gained else "",
            f"{one['loss']:.3f}",
        )  # fmt: skip
        table.add_row(*map(Text, (one["expert"], count, *cells)))
    tables.console(sys.stderr).print(table)
    whole = summary["iterates"][-1]["gained_in_all"]
    if whole is not None:
        sign = "rose" if whole["value"] > 0 else "fell"
        fact = f"{sign} by {abs(whole['value']):.3f}" if whole["told_apart"] else "did not change beyond chance"
        print(f"proxytune: over all rounds {summary['metric']} on {summary['rows']} test rows {fact}", file=sys.stderr)
