"""Measure base, expert alone, steered and (where there is one) the directly tuned base on held-out rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from proxytune.errors import DataError
from proxytune.evaluation import summary as summaries
from proxytune.evaluation.points import Measure, Placed, Point, compute, keep, kept
from proxytune.evaluation.summary import SCORES, Scores
from proxytune.evaluation.system import System, of_trio
from proxytune.experts.registry import Expert, Registry
from proxytune.files import write_checked, write_json
from proxytune.settings import Evaluate
from proxytune.stages.shared import alone
from proxytune.stages.shared import trio as trios
from proxytune.stages.shared.room import in_smaller_batches
from proxytune.stages.shared.served import INEXACT, reach, spent
from proxytune.stages.shared.start import dataset, start, warn
from proxytune.tasks import catalog
from proxytune.tracking import record

Records = dict[tuple[str, float | None], list[dict[str, Any]]]
Alphas = Sequence[Sequence[float]]
Work = TypeVar("Work", bound=Placed)


@dataclass(frozen=True)
class Found:
    """Every system's row records, in the rows' order, with the summary made of them and where it was written."""

    records: Records
    summary: dict[str, Any]
    path: Path


def run(settings: Evaluate) -> Found:
    """Evaluate, print the table, write summary.json and print its path last."""
    from proxytune.analysis import figures, tables

    if settings.benchmark is not None or settings.harness:
        from proxytune.stages import benchmark

        return benchmark.run(settings)
    expert = trios.find(settings)
    settings = trios.pinned(settings, expert)
    alpha = trios.alpha_of(settings, expert)
    alphas = sorted({alpha, *settings.alphas})
    work = asked(settings, expert)
    with start(settings, "evaluate", tags_of(settings), alpha=alpha) as tracked:
        records = measure(settings, expert, work, alphas)
        found = summarise(settings, expert, records, chosen=alpha, folder=tracked.folder)
        picture = tracked.folder / "comparison.png"
        figures.comparison(found.summary, picture)
        tables.console().print(tables.evaluation(found.summary))
        mirror(tracked, found, expert)
        tracked.image("comparison", picture)
        _remember(settings, expert, found.summary)
    print(found.path)
    return found


def tags_of(settings: Evaluate) -> list[str]:
    return [settings.expert.replace("@", "-")]


def measure(settings: Evaluate, expert: Expert, work: Measure, alphas: Sequence[float]) -> Records:
    """Score every system, the steered one at each alpha; what was scored before is read, not computed again."""
    return points(settings, expert, work, alphas, computed)


def summarise(settings: Evaluate, expert: Expert, records: Records, *, chosen: float, folder: Path) -> Found:
    """The summary of records, judged at the chosen alpha, written into `folder`."""
    metric_name = catalog.get(settings.task.name).metric_name
    left_out = summaries.too_long(records)
    scores = [_scores(system, alpha, rows, metric_name, left_out) for (system, alpha), rows in records.items()]
    write_checked(folder / SCORES, [one.told() for one in scores])
    for (system, alpha), rows in records.items():
        if rows and "text" in rows[0]:
            write_checked(summaries.rows_file(folder, system, alpha), rows)
    summary = built(settings, expert, settings.task.name, scores, records, chosen)
    path = folder / "summary.json"
    write_json(path, summary, checked=True)
    return Found(records, summary, path)


def built(
    settings: Evaluate, expert: Expert, task: str, scores: list[Scores], records: Records, chosen: float
) -> dict[str, Any]:
    """The summary of scores, as the settings ask for it, with what a server's answers left open."""
    summary = summaries.build(
        task,
        settings.family.name,
        scores,
        expert=expert.reference,
        split=settings.split,
        chosen=chosen,
        samples=settings.bootstrap_samples,
        seed=settings.seed,
        command=settings.command,
        commit=record.code_version()["commit"] or "",
    )
    if settings.base is None:
        return summary
    summary = summaries.with_server(summary, records)
    inexact = [INEXACT] if settings.base.mode == "bias" else []
    return summary | {"notes": [*inexact, *summary["notes"]]}


def asked(settings: Evaluate, expert: Expert) -> Measure:
    """The task's held-out rows, ready to be measured on. Raises DataError before any model is loaded."""
    task = catalog.get(settings.task.name)
    data = dataset(settings)
    warn(data)
    rows = data.held(settings.split)
    if data.rows["train"] and data.fingerprints["train"] != expert.manifest.data.fingerprint:
        print(f"proxytune: {expert.reference} was trained on other rows than this data's train split", file=sys.stderr)
    return Measure(
        task=task,
        rows=rows,
        fingerprint=data.fingerprints[settings.split],
        decode=settings.decode,
        limits=trios.limits(settings, task),
        generate=settings.generate,
        dtype=settings.family.dtype,
        score_batch_size=settings.score_batch_size,
    )


def points(
    settings: Evaluate,
    expert: Expert,
    measure: Work,
    alphas: Sequence[float],
    compute: Callable[[Work, System, Alphas, Sequence[Path]], list[list[dict[str, Any]]]],
) -> Records:
    """Read or compute the points of all systems. Models are loaded only if something is missing.

    compute(measure, system, alphas of its missing points, their parts): the records of each, all of them in one pass.
    Where memory runs out it is asked again, with a measure of fewer rows at once. DataError where no row fits into all
    of the models: there is nothing to tell then.
    """

    def found_of(system: System, points: Sequence[Point], entries: Alphas) -> list[list[dict[str, Any]]]:
        parts = [measure.part(settings.outputs, point) for point in points]
        most = system.served.at_once(measure.at_once) if system.served else measure.at_once
        return in_smaller_batches(lambda rows: compute(measure.at_most(rows), system, entries, parts), most)

    beside, tuned = trios.held(settings), trios.tuned_base(settings, expert, settings.tuned)
    served = reach(settings, trios.load(settings, expert, beside)) if settings.base else None
    whole = trios.identity(settings, expert, beside, served)
    wanted = [Point("base", None, {"base": whole["base"]})]
    wanted += [Point("expert", None, {role: whole[role] for role in ("anti", "expert")})]
    wanted += [Point("steered", alpha, whole) for alpha in alphas]
    found: Records = {(point.system, point.alpha): kept(settings.outputs, measure, point) or [] for point in wanted}
    missing = [point for point in wanted if not found[point.system, point.alpha]]
    if missing:
        trio = trios.load(settings, expert, beside)
        try:
            for system in of_trio(trio, trios.mixtures(trio), served):
                mine = [point for point in missing if point.system in system.points]
                entries = [system.alphas(point.system, point.alpha, [other for _, other in beside]) for point in mine]
                for point, rows in zip(mine, found_of(system, mine, entries) if mine else [], strict=True):
                    keep(settings.outputs, measure, point, rows)
                    found[point.system, point.alpha] = rows
        finally:
            if served:
                print(f"proxytune: {served.base.settings.url}: {spent(served)}", file=sys.stderr)
    if tuned is not None:
        point = Point("tuned", None, {"base": whole["base"], "tuned": trios.weights_of(tuned)})
        rows = kept(settings.outputs, measure, point)
        if rows is None:
            Registry(settings.outputs / "registry").verify(tuned)
            (rows,) = found_of(alone.load("tuned", settings.base_ref, settings.family.dtype, tuned), [point], [()])
            keep(settings.outputs, measure, point, rows)
        found["tuned", None] = rows
    if all(any(row.get("too_long") for row in of_systems) for of_systems in zip(*found.values(), strict=True)):
        what = f"all of the {len(found['base', None])} rows are longer than a model's context"
        raise DataError(what, "give shorter ones")
    return found


def computed(measured: Measure, system: System, alphas: Alphas, parts: Sequence[Path]) -> list[list[dict[str, Any]]]:
    """The records of one system's missing points, all alphas in one scoring pass."""
    prompts = [system.encode(row["prompt"]) for row in measured.rows]
    replies = [system.encode_completion(row["prompt"], row["completion"]) for row in measured.rows]
    ended = replace(measured, limits=replace(measured.limits, end_ids=system.end_ids))
    return compute(ended, system, alphas, prompts, replies, parts)


def _scores(system: str, alpha: float | None, rows: list[dict], metric_name: str, left_out: set[int]) -> Scores:
    """left_out: the places of rows that count for no system."""
    kept = np.array([i not in left_out for i in range(len(rows))], dtype=float)
    digests = [row["row"] for row in rows if "row" in row]
    written, weighed = all("metrics" in row for row in rows), all(row["loss"] is not None for row in rows)
    return Scores(
        system=system,
        alpha=alpha,
        loss=kept * [row["loss"] for row in rows] if weighed else None,
        tokens=kept * [row["tokens"] for row in rows],
        metric=kept * [row["metrics"][metric_name] for row in rows] if written else None,
        metric_name=metric_name,
        ids=[row["id"] for row in rows],
        weights=kept,
        digests=digests if len(digests) == len(rows) else None,
    )


def mirror(tracked, found: Found, expert: Expert) -> None:
    """Tables, numbers and lineage of an evaluation to the record and its mirror."""
    rows = found.summary["rows"]
    columns = ["system", "alpha", "n", "loss", "metric", "metric_name"]
    tracked.table("evaluation", columns, [[row[column] for column in columns] for row in rows])
    for row in rows:
        name = row["system"] if row["alpha"] is None else f"{row['system']}/alpha_{row['alpha']:g}".replace(".", "_")
        tracked.summary({f"{name}/loss": row["loss"], f"{name}/{row['metric_name']}": row["metric"]})
    systems = [key for key, records in found.records.items() if records and "text" in records[0]]
    if systems:
        shown = range(min(50, len(found.records[systems[0]])))
        head = ["id", *(system if alpha is None else f"{system} {alpha:g}" for system, alpha in systems)]
        tracked.table("generations", head, [
            [found.records[systems[0]][i]["id"], *(found.records[key][i]["text"] for key in systems)] for i in shown
        ])  # fmt: skip
    tracked.use(expert.reference, "model", {"folder": str(expert.folder)})
    tracked.artifact(
        f"{expert.name}-{found.summary['split']}-summary", "result", found.path, {}, uses=[expert.reference]
    )


def _remember(settings: Evaluate, expert: Expert, summary: dict[str, Any]) -> None:
    """Keep with the expert what it did on held-out rows for the base it was measured with."""
    rows = [row for row in summary["rows"] if row["system"] == "steered"]
    steered = next(row for row in rows if row["alpha"] == summary["chosen"])
    scores = {key: steered[key] for key in ("alpha", "n", "loss")} | {steered["metric_name"]: steered["metric"]}
    columns = ("system", "alpha", "n", "loss", "loss_ci", "metric", "metric_name", "metric_ci")
    table = [{column: row[column] for column in columns} for row in summary["rows"]]
    told = scores | {"base": trios.base_name(settings), "table": table}
    Registry(settings.outputs / "registry").update(expert, scores={settings.split: told})
