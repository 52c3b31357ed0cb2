"""Points: the held-out rows of one system at one alpha, scored once and kept.

A point's file is named by a hash of everything its numbers depend on: the rows, the models' weights, alpha, how text is
decoded. So a repeated, killed or widened run computes only what is missing, and a stale number is never found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from proxytune.decoding.engine import build
from proxytune.decoding.mixture import Mixture
from proxytune.decoding.request import Limits, Request, sampling, variant
from proxytune.decoding.scoring import Given, losses
from proxytune.files import Journal, hash_json, read_jsonl, write_jsonl
from proxytune.models.prompts import text_of
from proxytune.settings import Decode
from proxytune.tasks.task import Row, Task
from proxytune.tracking.progress import track

VERSION = 1  # raise when the meaning of a point's numbers changes


@dataclass(frozen=True)
class Point:
    """One system at one alpha. models: weight and tokenizer hashes of everything it is made of."""

    system: str
    alpha: float | None
    models: Mapping[str, Any]


class Named(Protocol):
    """What points are measures of, which gives each its file."""

    def path(self, outputs: Path, point: Point) -> Path: ...

    def part(self, outputs: Path, point: Point) -> Path:
        """Where a point's replies are kept while it is computed."""
        ...


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
                "decode": self.decode.content() if self.generate else None,
                "limits": [self.limits.max_new_tokens, list(self.limits.stop)],
            }
        )[:24]

    def path(self, outputs: Path, point: Point) -> Path:
        return outputs / "points" / f"{self.task.name}-{point.system}-{self.key(point)}.jsonl"

    def part(self, outputs: Path, point: Point) -> Path:
        """Where a point's replies are kept while it is computed."""
        return self.path(outputs, point).with_suffix(".part")


def kept(outputs: Path, named: Named, point: Point) -> list[dict[str, Any]] | None:
    """A point's rows if they were scored before, else None."""
    path = named.path(outputs, point)
    return read_jsonl(path) if path.is_file() else None


def compute(
    measure: Measure,
    mixture: Mixture,
    alphas: Sequence[Sequence[float]],
    prompts: Sequence,
    completions: Sequence,
    tokenizer,
    label: str,
    parts: Sequence[Path] = (),
) -> list[list[dict[str, Any]]]:
    """Score the rows under one mixture: for each alpha the records of all rows in order. One pass for all alphas.

    alphas: for each a number for every pair of the mixture. parts: for each a file in which its replies are kept as
    they are written; those that a killed run left there are not written again.

    A record holds id, loss (summed nats of the reference reply with its end token), tokens (how many that is), and,
    where replies are written, text, finish_reason and every metric of the task.
    """
    given = [Given(p, c) for p, c in zip(prompts, completions, strict=True)]
    size = measure.score_batch_size
    batches = losses(mixture, given, alphas, batch_size=size)
    found = [row for batch in track(batches, f"{label}: loss", -(-len(given) // size)) for row in batch]
    records = [
        [{"id": row["id"], "loss": found[i][a], "tokens": len(completions[i])} for i, row in enumerate(measure.rows)]
        for a in range(len(alphas))
    ]
    if measure.generate:
        journals = [Journal(path) for path in parts]
        _write_replies(measure, mixture, alphas, prompts, records, tokenizer, f"{label}: replies", journals)
    return records


def _write_replies(measure, mixture, alphas, prompts, records, tokenizer, label, journals) -> None:
    """The replies of all alphas together: they share the reading of the prompts, and the forwards."""
    for a, journal in enumerate(journals):
        for row in journal.rows:
            records[a][row["row"]] |= row["reply"]
    places = [(i, a) for i in range(len(prompts)) for a in range(len(alphas)) if "text" not in records[a][i]]
    requests = [
        Request(prompts[i], measure.limits, tuple(alphas[a]), sampling(measure.decode, i), variant(measure.decode))
        for i, a in places
    ]
    replies = build(mixture, tokenizer, measure.decode).run(requests)
    for number, reply in track(replies, label, len(requests)):
        i, a = places[number]
        reference = text_of(measure.rows[i]["completion"])
        scores = {name: float(score(reference, reply.text)) for name, score in measure.task.metrics.items()}
        records[a][i] |= (found := {"text": reply.text, "finish_reason": reply.finish_reason, "metrics": scores})
        if journals:
            journals[a].append({"row": i, "reply": found})


def keep(outputs: Path, named: Named, point: Point, records: list[dict[str, Any]]) -> None:
    write_jsonl(named.path(outputs, point), records)
    named.part(outputs, point).unlink(missing_ok=True)
