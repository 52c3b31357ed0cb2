"""Measure base, expert alone, steered and tuned base by a benchmark, or by a task of the lm-evaluation-harness.

`evaluate` with a benchmark or with the harness ends up here; each task of the harness is a run of its own.

Beside what every `summary.json` holds, a row here tells `measures` (each with value, ci and over), the benchmark's
counts (`unparsed`, ...) and `by_<kind>`; a difference tells McNemar's exact p where every row is right or wrong. Each
row's outputs and verdicts stand in `rows/` beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proxytune.errors import DataError, SettingsError
from proxytune.evaluation import summary as summaries
from proxytune.evaluation.benchmarks import catalog as benchmarks
from proxytune.evaluation.benchmarks import harnessed, verdicts, weighed
from proxytune.evaluation.benchmarks import rows as files
from proxytune.evaluation.benchmarks.benchmark import Prompt, user
from proxytune.evaluation.benchmarks.harnessed import Harnessed
from proxytune.evaluation.benchmarks.report import summed
from proxytune.evaluation.benchmarks.scored import Scored
from proxytune.evaluation.benchmarks.weighed import Question, Weighed
from proxytune.evaluation.benchmarks.written import Written
from proxytune.evaluation.compare import mcnemar
from proxytune.evaluation.system import System
from proxytune.experts.registry import Expert, Registry
from proxytune.files import write_checked, write_json
from proxytune.models.prompts import plain_text, text_of
from proxytune.settings import Evaluate
from proxytune.stages import evaluate
from proxytune.stages.evaluate import Alphas, Found, Records
from proxytune.stages.shared import trio as trios
from proxytune.stages.shared.start import dataset, start, warn
from proxytune.tasks import catalog
from proxytune.tasks import rows as forms

Key = tuple[str, float | None]
Work = Written | Weighed | Harnessed


def run(settings: Evaluate) -> Found:
    """Measure, print the tables, write summary.json and print its path last."""
    from proxytune.analysis import figures, tables

    *others, _ = settings.harness or [""]
    for name in others:
        run(settings.model_copy(update={"harness": [name]}))
    expert = trios.find(settings)
    settings = trios.pinned(settings, expert)
    alpha = trios.alpha_of(settings, expert)
    work = asked(settings)
    with start(settings, "evaluate", [*evaluate.tags_of(settings), work.name], alpha=alpha) as tracked:
        records = evaluate.points(settings, expert, work, sorted({alpha, *settings.alphas}), _computed)
        found = _summarise(settings, expert, work, records, alpha, tracked.folder)
        tables.console().print(tables.evaluation(found.summary))
        if any(len(row["measures"]) > 1 or "unparsed" in row for row in found.summary["rows"]):
            tables.console().print(tables.measures(found.summary))
        if found.summary["differences"]:
            picture = tracked.folder / "comparison.png"
            figures.comparison(found.summary, picture)
            tracked.image("comparison", picture)
        evaluate.mirror(tracked, found, expert)
        if work.name != "heldout_loss":  # that is of whatever rows were given
            _remember(settings, expert, found.summary)
    print(found.path)
    return found


def asked(settings: Evaluate) -> Work:
    """The benchmark's questions, ready to be put. Raises DataError or SettingsError before any model is loaded."""
    chosen, dtype = settings.benchmark, settings.family.dtype
    if settings.harness:
        if settings.base is not None:
            what = "harness= takes no base behind an API: its tasks are scored here, token by token"
            raise SettingsError(what, "leave base= out, or give benchmark= instead")
        return harnessed.load(settings.harness[-1], settings.lm_eval, settings.decode, settings.score_batch_size, dtype)
    assert chosen is not None
    if chosen.name in weighed.KINDS:
        return Weighed(chosen.name, weighed.load(chosen), dtype, settings.score_batch_size)
    if chosen.name == "heldout_loss":
        return Weighed(chosen.name, _replies(settings)[: chosen.limit], dtype, settings.score_batch_size, ended=True)
    benchmark = benchmarks.get(chosen.name)
    verdicts.refuse_code(benchmark, chosen)
    rows = files.load(benchmark, chosen.rows, chosen.revision, chosen.seed)[: chosen.limit]
    if settings.base is not None and chosen.name == "realtimeqa":  # as the paper asks a model behind an API
        return Weighed(chosen.name, [weighed.lettered(row) for row in rows], dtype, settings.score_batch_size)
    return Written(benchmark, chosen, rows, settings.decode, dtype)


def _replies(settings: Evaluate) -> list[Question]:
    """Held-out replies: of a file with prompts and completions (HumanEval's solutions too), else the task's own."""
    chosen, task = settings.benchmark, catalog.get(settings.task.name)
    if chosen is None or chosen.rows is None:
        data = dataset(settings)
        warn(data)
        held = data.held(settings.split)
    else:
        held = []
        for where, raw in files.read(chosen.rows):
            try:
                solved = isinstance(raw, Mapping) and "canonical_solution" in raw
                row = forms.read({**raw, "completion": raw["canonical_solution"]} if solved else raw, task)
                held.append({"id": str(len(held)), **row})
            except DataError as error:
                raise DataError(f"{chosen.rows}, {where}: {error.what}", error.hint) from error
        if not held:
            raise DataError(f"{chosen.rows} holds no rows")
    return [
        Question(
            row["id"],
            Prompt(plain_text(row["prompt"]), user(row["prompt"]) if isinstance(row["prompt"], str) else row["prompt"]),
            (text_of(row["completion"]),),
        )
        for row in held
    ]


def _computed(work: Work, system: System, alphas: Alphas, parts: Sequence[Path]) -> list[list[dict[str, Any]]]:
    return work.compute(system, alphas, parts)


def _summarise(settings: Evaluate, expert: Expert, work: Work, records: Records, alpha: float, folder: Path) -> Found:
    outputs = settings.outputs / "points"
    scored = {key: work.score(rows, outputs / f"{work.name}-{key[0]}.jsonl") for key, rows in records.items()}
    left_out = summaries.too_long(records)
    scored = {key: one.without(left_out) for key, one in scored.items()}
    _keep_rows(scored, folder)
    scores = [one.scores(*key) for key, one in scored.items()]
    summary = evaluate.built(settings, expert, work.name, scores, records, alpha)
    summary["rows"] = [
        row | _detail(scored[row["system"], row["alpha"]], settings.bootstrap_samples, settings.seed)
        for row in summary["rows"]
    ]
    for one in summary["differences"]:
        pair = (scored["steered", summary["chosen"]], scored[one["against"], None])
        one["mcnemar"] = mcnemar(*(list(system.columns(system.names[0])[0]) for system in pair))
    path = folder / "summary.json"
    write_json(path, summary, checked=True)
    too_long = max(one.counts.get("too_long", 0) for one in scored.values())
    if too_long:
        print(f"proxytune: {too_long} outputs are empty: their prompts do not fit into a model", file=sys.stderr)
    return Found(records, summary, path)


def _detail(scored: Scored, samples: int, seed: int) -> dict[str, Any]:
    """All measures of one system with their intervals, its counts, and the same by group."""
    found, groups = summed(scored.measures, scored.groups, samples, seed)
    measures = {
        name: {"value": found[name], "ci": interval, "over": found["over"][name]}
        for name, interval in found["intervals"].items()
    }
    return {**scored.counts, "measures": measures, **groups}


def _keep_rows(scored: Mapping[Key, Scored], folder: Path) -> None:
    write_checked(folder / summaries.SCORES, [one.told(*key) for key, one in scored.items()])
    for (system, alpha), one in scored.items():
        write_checked(summaries.rows_file(folder, system, alpha), one.records)


def _remember(settings: Evaluate, expert: Expert, summary: Mapping[str, Any]) -> None:
    """Keep with the expert what the benchmark said of it for this base."""
    rows: Sequence[Mapping[str, Any]] = summary["rows"]
    steered = next(row for row in rows if row["system"] == "steered" and row["alpha"] == summary["chosen"])
    told = {name: one["value"] for name, one in steered["measures"].items()}
    told |= {"alpha": steered["alpha"], "n": steered["n"], "base": trios.base_name(settings)}
    Registry(settings.outputs / "registry").update(expert, scores={summary["task"]: told})
