"""Points: the held-out rows of one system at one alpha, scored once and kept.

A point's file is named by a hash of everything its numbers depend on: the rows, the models' weights, alpha, how text is
decoded. So a repeated, killed or widened run computes only what is missing, and a stale number is never found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxytune.decoding.loop import Limits, Request, decode
from proxytune.decoding.mixture import Mixture
from proxytune.decoding.scoring import Given, losses
from proxytune.files import hash_json, read_jsonl, write_jsonl
from proxytune.models.prompts import text_of
from proxytune.settings import Decode
from proxytune.steering.choice import Choice
from proxytune.tasks.task import Row, Task
from proxytune.tracking.progress import track

VERSION = 1  # raise when the meaning of a point's numbers changes


@dataclass(frozen=True)
class Point:
    """One system at one alpha. models: weight and tokenizer hashes of everything it is made of."""

    system: str
    alpha: float | None
    models: Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """What is measured: a task's rows, whether replies are written and scored, and how they are decoded."""

    task: Task
    rows: Sequence[Row]
    fingerprint: str
    decode: Decode
    limits: Limits
    generate: bool
    dtype: str = "auto"
    score_batch_size: int = 32

    def key(self, point: Point) -> str:
        """The content name of a point. Batch sizes are left out: they change no number."""
        return hash_json(
            {
                "version": VERSION,
                "task": self.task.name,
                "metrics": sorted(self.task.metrics) if self.generate else None,
                "rows": self.fingerprint,
                "system": point.system,
                "alpha": point.alpha,
                "models": point.models,
                "dtype": self.dtype,
                "decode": self.decode.model_dump(exclude={"batch_size"}) if self.generate else None,
                "limits": [self.limits.max_new_tokens, sorted(self.limits.end_ids), list(self.limits.stop)],
            }
        )[:24]

    def path(self, outputs: Path, point: Point) -> Path:
        return outputs / "points" / f"{self.task.name}-{point.system}-{self.key(point)}.jsonl"


def kept(outputs: Path, measure: Measure, point: Point) -> list[dict[str, Any]] | None:
    """A point's rows if they were scored before, else None."""
    path = measure.path(outputs, point)
    return read_jsonl(path) if path.is_file() else None


def compute(
    measure: Measure,
    mixture: Mixture,
    alphas: Sequence[float],
    prompts: Sequence,
    completions: Sequence,
    tokenizer,
    label: str,
) -> Iterator[list[dict[str, Any]]]:
    """Score the rows under one mixture: for each alpha, as soon as it is done, the records of all rows in order.

    A record holds id, loss (summed nats of the reference reply with its end token), tokens (how many that is), and,
    where replies are written, text, finish_reason and every metric of the task.
    """
    each = [[alpha] * len(mixture.pairs) for alpha in alphas]
    given = [Given(p, c) for p, c in zip(prompts, completions, strict=True)]
    size = measure.score_batch_size
    batches = losses(mixture, given, each, batch_size=size)
    found = [row for batch in track(batches, f"{label}: loss", -(-len(given) // size)) for row in batch]
    for a, alpha in enumerate(alphas):
        records = [
            {"id": row["id"], "loss": found[i][a], "tokens": len(completions[i])} for i, row in enumerate(measure.rows)
        ]
        if measure.generate:
            name = f"{label}: replies" + (f", alpha {alpha:g}" if mixture.pairs else "")
            _write_replies(measure, mixture, alpha, prompts, records, tokenizer, name)
        yield records


def _write_replies(measure, mixture, alpha, prompts, records, tokenizer, label) -> None:
    choice = Choice(measure.decode.temperature, measure.decode.top_k, measure.decode.top_p)
    requests = [Request(p, (alpha,) * len(mixture.pairs), seed=measure.decode.seed + i) for i, p in enumerate(prompts)]
    replies = decode(mixture, requests, choice, measure.limits, tokenizer, batch_size=measure.decode.batch_size)
    for i, reply in track(replies, label, len(requests)):
        reference = text_of(measure.rows[i]["completion"])
        scores = {name: float(score(reference, reply.text)) for name, score in measure.task.metrics.items()}
        records[i] |= {"text": reply.text, "finish_reason": reply.finish_reason, "metrics": scores}


def keep(outputs: Path, measure: Measure, point: Point, records: list[dict[str, Any]]) -> None:
    write_jsonl(measure.path(outputs, point), records)
