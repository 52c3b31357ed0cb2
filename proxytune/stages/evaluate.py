"""Measure base, expert alone, steered and (where there is one) the directly tuned base on held-out rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from proxytune.decoding.mixture import Mixture
from proxytune.evaluation import summary as summaries
from proxytune.evaluation.points import Measure, Named, Point, compute, keep, kept
from proxytune.evaluation.summary import SCORES, Scores
from proxytune.evaluation.system import System, of_trio
from proxytune.experts.registry import Expert, Registry
from proxytune.files import write_json, write_jsonl
from proxytune.models import prompts
from proxytune.models.loading import load_model, load_tokenizer
from proxytune.models.local import LocalSource
from proxytune.models.source import Term
from proxytune.settings import Evaluate, ModelRef
from proxytune.stages import trio as trios
from proxytune.stages.start import start, warn
from proxytune.tasks import catalog, sources
from proxytune.tracking import record

Records = dict[tuple[str, float | None], list[dict[str, Any]]]


@dataclass(frozen=True)
class Found:
    """Every system's row records, in the rows' order, with the summary made of them and where it was written."""

    records: Records
    summary: dict[str, Any]
    path: Path


def run(settings: Evaluate) -> Found:
    """Evaluate, print the table, write summary.json and print its path last."""
    from proxytune.analysis import figures, tables

    if settings.benchmark is not None:
        from proxytune.stages import benchmark

        return benchmark.run(settings)
    expert = trios.find(settings)
    alpha = trios.alpha_of(settings, expert)
    alphas = sorted({alpha, *settings.alphas})
    with start(settings, "evaluate", tags_of(settings), alpha=alpha) as tracked:
        found = summarise(settings, expert, measure(settings, expert, alphas), chosen=alpha, folder=tracked.folder)
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


def measure(settings: Evaluate, expert: Expert, alphas: Sequence[float]) -> Records:
    """Score every system, the steered one at each alpha; what was scored before is read, not computed again."""
    measured = _measure(settings, expert)
    return points(settings, expert, measured, alphas, partial(_compute, settings, measured))


def summarise(settings: Evaluate, expert: Expert, records: Records, *, chosen: float, folder: Path) -> Found:
    """The summary of records, judged at the chosen alpha, written into `folder`."""
    metric_name = catalog.get(settings.task.name).metric_name
    scores = [_scores(system, alpha, rows, metric_name) for (system, alpha), rows in records.items()]
    write_jsonl(folder / SCORES, [one.told() for one in scores])
    summary = summaries.build(
        settings.task.name,
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
    path = folder / "summary.json"
    write_json(path, summary)
    return Found(records, summary, path)


def _measure(settings: Evaluate, expert: Expert) -> Measure:
    task = catalog.get(settings.task.name)
    data = sources.load(settings.data, task, settings.family, settings.outputs / "cache")
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
    named: Named,
    alphas: Sequence[float],
    compute: Callable[[System, list[Point]], list[list[dict[str, Any]]]],
) -> Records:
    """Read or compute the points of all systems. Models are loaded only if something is missing.

    compute(system, its missing points): the records of each, all of them in one pass.
    """
    base = trios.base_identity(settings.base_ref).model_dump(include={"weights", "tokenizer"})
    small = expert.manifest.anti.model_dump(include={"weights", "tokenizer"}) | {
        "format": expert.manifest.prompt_format
    }
    own = {"anti": small, "expert": trios.weights_of(expert)}
    wanted = [Point("base", None, {"base": base}), Point("expert", None, own)]
    beside = [[trios.weights_of(other), alpha] for other, alpha in trios.held(settings)]
    whole = {"base": base, **own} | ({"held": beside} if beside else {})
    wanted += [Point("steered", alpha, whole) for alpha in alphas]
    found: Records = {}
    missing = []
    for point in wanted:
        rows = kept(settings.outputs, named, point)
        if rows is None:
            missing.append(point)
        found[point.system, point.alpha] = rows or []
    if missing:
        trio = trios.load(settings, expert)
        for system in of_trio(trio, trios.mixtures(trio)):
            mine = [point for point in missing if point.system == system.name]
            for point, rows in zip(mine, compute(system, mine) if mine else [], strict=True):
                keep(settings.outputs, named, point, rows)
                found[point.system, point.alpha] = rows
    tuned = trios.tuned_base(settings, expert, settings.tuned)
    if tuned is not None:
        point = Point("tuned", None, {"base": base, "tuned": trios.weights_of(tuned)})
        rows = kept(settings.outputs, named, point)
        if rows is None:
            (rows,) = compute(_tuned(settings, tuned), [point])
            keep(settings.outputs, named, point, rows)
        found["tuned", None] = rows
    return found


def _compute(settings: Evaluate, measured: Measure, system: System, points: list[Point]):
    """The records of one system's missing points, all alphas in one scoring pass."""
    asked = [system.encode(row["prompt"]) for row in measured.rows]
    replies = [system.encode_completion(row["prompt"], row["completion"]) for row in measured.rows]
    ended = replace(measured, limits=replace(measured.limits, end_ids=system.end_ids))
    alphas = [trios.alphas(settings, system.mixture, point.alpha or 0.0) for point in points]
    parts = [measured.part(settings.outputs, point) for point in points] if settings.generate else []
    return compute(ended, system.mixture, alphas, asked, replies, system.tokenizer, system.name, parts)


def _tuned(settings: Evaluate, tuned: Expert) -> System:
    """The directly tuned base: a single model with the format it was tuned with."""
    files = trios.files_of(tuned)
    own = ModelRef(model=str(tuned.folder))
    model = (
        load_model(settings.base_ref, settings.family.dtype, adapter=files.folder)
        if files.adapter
        else load_model(own, settings.family.dtype)
    )
    tokenizer, plain = load_tokenizer(own), load_tokenizer(settings.base_ref)
    vocabulary = trios.whole_vocabulary(tokenizer, model)
    end = prompts.end_of_turn(tokenizer) if files.prompt_format == "chat" else None
    return System(
        name="tuned",
        mixture=Mixture(Term(LocalSource(model, vocabulary.size), "tuned"), vocabulary),
        tokenizer=tokenizer,
        tokenizers={"tuned": tokenizer},
        formats={"tuned": files.prompt_format},
        end_ids=prompts.end_ids([tokenizer, plain], [model.generation_config]),
        end_id=end if end is not None else tokenizer.eos_token_id,
    )


def _scores(system: str, alpha: float | None, rows: list[dict[str, Any]], metric_name: str) -> Scores:
    written = all("metrics" in row for row in rows)
    return Scores(
        system=system,
        alpha=alpha,
        loss=np.array([row["loss"] for row in rows]),
        tokens=np.array([row["tokens"] for row in rows]),
        metric=np.array([row["metrics"][metric_name] for row in rows]) if written else None,
        metric_name=metric_name,
        ids=[row["id"] for row in rows],
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
    Registry(settings.outputs / "registry").update(
        expert, scores={settings.split: scores | {"base": settings.base_ref.model}}
    )
