"""Who scores replies in self-rewarding training: the task's metric, the model itself, or another one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from proxytune.decoding.request import Limits
from proxytune.errors import ModelError
from proxytune.evaluation import judges
from proxytune.evaluation.rubric import Rubric, score
from proxytune.models.prompts import text_of
from proxytune.settings import Decode, Judge, ModelRef
from proxytune.settings.self_rewarding import SelfRewarding
from proxytune.stages.shared.alone import Author
from proxytune.stages.shared.kept import Kept
from proxytune.tasks.task import Row, Task
from proxytune.tracking.progress import track

Judgement = dict[str, Any]  # {"said": [each judgement's text], "scores": [its points, or None]}


def by_task(task: Task, rows: Sequence[Row], replies: Sequence[Sequence[str]]) -> list[list[Judgement]]:
    """The task's own metric, 0..1, against each row's reply."""
    metric = task.metrics[task.metric_name]
    return [
        [{"said": [], "scores": [float(metric(text_of(row["completion"]), text))]} for text in texts]
        for row, texts in zip(rows, replies, strict=True)
    ]


def by_model(
    plan: SelfRewarding,
    rows: Sequence[Row],
    replies: Sequence[Sequence[str]],
    iterate: Author,
    seed: int,
    kept: Kept,
    folder: Path,
) -> list[list[Judgement]]:
    """Points by the rubric, several judgements of each reply. folder: where a server's answers are kept."""
    rubric = Rubric(plan.judge.template)
    questions = [
        rubric.question(text_of(row["prompt"]), text)
        for row, texts in zip(rows, replies, strict=True)
        for text in texts
    ]
    if plan.judge.url is not None:
        said = _by_server(plan, questions, folder)
    else:
        own = plan.judge.by == "self"
        author = iterate if own else Author(ModelRef(model=plan.judge.by), iterate.dtype)
        decode = Decode(
            temperature=plan.judge.temperature, top_p=plan.judge.top_p, seed=seed, batch_size=plan.batch_size
        )
        limits = Limits(plan.judge.max_new_tokens)
        written = author.replies(questions, plan.judge.samples, decode, limits, kept, "judgements")
        said = [[reply.text for reply in each] for each in written]
    judged = iter({"said": each, "scores": [score(text) for text in each] or [None]} for each in said)
    return [[next(judged) for _ in texts] for texts in replies]


def _by_server(plan: SelfRewarding, questions: Sequence[str], folder: Path) -> list[list[str]]:
    """What a model behind an API says; an answer that cannot be had is an empty text, which is no judgement."""
    chosen = plan.judge
    server = Judge(
        url=chosen.url,
        key=chosen.key,
        concurrency=chosen.concurrency,
        timeout=chosen.timeout,
        retries=chosen.retries,
        kept=folder,
    )
    asking = {"temperature": chosen.temperature, "top_p": chosen.top_p, "max_tokens": chosen.max_new_tokens}
    judge = judges.Judge(chosen.by, server, asking)
    asked = [(question, sample) for question in questions for sample in range(chosen.samples)]
    pool = ThreadPoolExecutor(chosen.concurrency)
    try:
        answers = pool.map(lambda one: judge.said(*one) or "", asked)
        said = list(track(answers, f"judged by {chosen.by}", len(asked)))
    finally:
        pool.shutdown(cancel_futures=True)
    if (failures := judge.cost["failures"]) > len(asked) / 2:
        what = f"{chosen.url} left {failures} of {len(asked)} questions unanswered"
        raise ModelError(what, "see whether it runs, and give the same command again: its answers are kept")
    return [said[at : at + chosen.samples] for at in range(0, len(said), chosen.samples)]
