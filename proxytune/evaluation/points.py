"""Points: the held-out rows of one system at one alpha, scored once and kept.

A point's file is named by a hash of everything its numbers depend on: the rows, the models' weights, alpha, how text is
decoded. So a repeated, killed or widened run computes only what is missing, and a stale number is never found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

from proxytune.decoding.remote import CertifiedReply
from proxytune.decoding.remote_scoring import Weigher
from proxytune.decoding.request import Limits, Reply, Request, sampling, variant
from proxytune.decoding.scoring import Given, fits, losses
from proxytune.evaluation import batches
from proxytune.evaluation.summary import digest
from proxytune.evaluation.system import System
from proxytune.files import Journal, finish, hash_json, part_of, read_finished
from proxytune.models.prompts import plain_text, text_of
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
    """content: all that a measure's numbers depend on, but for the models."""

    @property
    def name(self) -> str: ...

    @property
    def content(self) -> Mapping[str, Any]: ...


class Placed(Protocol):
    """What says where the points of a measure lie (see `Filed`), and how many rows it has under way at once.

    at_most: the same with fewer.
    """

    @property
    def at_once(self) -> int: ...

    def at_most(self, rows: int) -> Self: ...

    def path(self, outputs: Path, point: Point) -> Path: ...

    def part(self, outputs: Path, point: Point) -> Path: ...


class Filed:
    """A measure whose points have a file each."""

    def key(self: Named, point: Point) -> str:
        """The content name of a point."""
        whole = {**self.content, "system": point.system, "alpha": point.alpha, "models": point.models}
        return hash_json(whole)[:24]

    def path(self: Named, outputs: Path, point: Point) -> Path:
        return outputs / "points" / f"{self.name}-{point.system}-{Filed.key(self, point)}.jsonl"

    def part(self: Named, outputs: Path, point: Point) -> Path:
        """Where what is done of a point is kept while it is computed."""
        return part_of(Filed.path(self, outputs, point))


@dataclass(frozen=True)
class Measure(Filed):
    """What is measured: a task's rows, whether replies are written and scored, and how they are decoded."""

    task: Task
    rows: Sequence[Row]
    fingerprint: str
    decode: Decode
    limits: Limits
    generate: bool
    dtype: str = "auto"
    score_batch_size: int = 32

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def at_once(self) -> int:
        return max(self.decode.batch_size, self.score_batch_size)

    def at_most(self, rows: int) -> Measure:
        less = min(rows, self.score_batch_size)
        return replace(self, decode=self.decode.at_most(rows), score_batch_size=less)

    @property
    def content(self) -> dict[str, Any]:
        """Batch sizes are left out: they change no number."""
        return {
            "version": VERSION,
            "task": self.task.name,
            "metrics": sorted(self.task.metrics) if self.generate else None,
            "rows": self.fingerprint,
            "dtype": self.dtype,
            "decode": self.decode.content() if self.generate else None,
            "limits": [self.limits.max_new_tokens, list(self.limits.stop)],
        }


def kept(outputs: Path, measure: Placed, point: Point) -> list[dict[str, Any]] | None:
    """A point's rows if they were scored before, else None."""
    return read_finished(measure.path(outputs, point))


def compute(
    measure: Measure,
    system: System,
    alphas: Sequence[Sequence[float]],
    prompts: Sequence,
    completions: Sequence,
    parts: Sequence[Path] = (),
) -> list[list[dict[str, Any]]]:
    """Score the rows under one system: for each entry of alphas the records of all rows in order, in one pass.

    alphas: for each a number for every pair of the mixture. parts: for each a file in which its losses and replies
    are kept as they are made; those that a killed run left there are not made again.

    A record holds id, row (its digest), loss (summed nats of the reference reply with its end token), tokens (how many
    that is), and, where replies are written, text, finish_reason and every metric of the task. A row that is longer
    than a model's context has no tokens, an empty text, and `too_long`. With a base behind an API the loss is
    None where the server's scores do not tell it, and `served` has a reply's tokens, those that are marked, and calls.
    """
    journals = [Journal(path) for path in parts]
    given = [Given(p, c) for p, c in zip(prompts, completions, strict=True)]
    fitting = [i for i, one in enumerate(given) if fits(system.mixture, one.prompts, one.completion)]
    weigh = _served_losses if system.served else _losses
    found = dict(zip(fitting, weigh(measure, system, [given[i] for i in fitting], alphas, journals), strict=True))
    records = [
        [
            {"id": row["id"], "row": digest(plain_text(row["prompt"]), text_of(row["completion"]))}
            | ({"loss": found[i][a], "tokens": len(completions[i])} if i in found else _too_long(measure))
            for i, row in enumerate(measure.rows)
        ]
        for a in range(len(alphas))
    ]
    if measure.generate:
        _write_replies(measure, system, alphas, prompts, records, journals)
    return records


def _too_long(measure: Measure) -> dict[str, Any]:
    unread: dict[str, Any] = {"loss": 0.0, "tokens": 0, "too_long": True}
    if measure.generate:
        unread |= {"text": "", "finish_reason": "too long", "metrics": dict.fromkeys(measure.task.metrics, 0.0)}
    return unread


def _losses(measure: Measure, system: System, given, alphas, journals) -> Sequence[Sequence[float | None]]:
    """Nats of each row under each entry of alphas."""

    def weigh(rows: Sequence[Given]) -> list[list[float]]:
        (found,) = losses(system.mixture, rows, alphas, batch_size=len(rows))
        return found

    found = batches.scored(weigh, given, measure.score_batch_size, journals)
    return list(track(found, f"{system.name}: loss", len(given)))


def _served_losses(measure: Measure, system: System, given, alphas, journals) -> Sequence[Sequence[float | None]]:
    """Each row costs calls, and is kept as it is done."""
    assert system.served is not None
    known = [{row["row"]: row["loss"] for row in journal.rows if "loss" in row} for journal in journals]
    left = [i for i in range(len(given)) if not all(i in its for its in known)]
    weigher = Weigher(system.served, system.mixture, measure.score_batch_size)
    weights = weigher.losses([given[i] for i in left], alphas)
    for place, weight in track(weights, f"{system.name}: loss", len(left)):
        for a, journal in enumerate(journals):
            known[a][left[place]] = loss = None if weight.nats is None else weight.nats[a]
            journal.append({"row": left[place], "loss": loss})
    return [[its[i] for its in known] for i in range(len(given))]


def _write_replies(measure: Measure, system: System, alphas, prompts, records, journals) -> None:
    """The replies of all alphas together: they share the reading of the prompts, and the forwards."""
    for a, journal in enumerate(journals):
        for row in journal.rows:
            if "reply" in row:
                records[a][row["row"]] |= row["reply"]
    places = [(i, a) for i in range(len(prompts)) for a in range(len(alphas)) if "text" not in records[a][i]]
    requests = [
        Request(prompts[i], measure.limits, tuple(alphas[a]), sampling(measure.decode, i), variant(measure.decode))
        for i, a in places
    ]
    replies = system.engine(measure.decode).run(requests)
    for number, reply in track(replies, f"{system.name}: replies", len(requests)):
        i, a = places[number]
        reference = text_of(measure.rows[i]["completion"])
        scores = {name: float(score(reference, reply.text)) for name, score in measure.task.metrics.items()}
        said = {"text": reply.text, "token_ids": reply.token_ids, "finish_reason": reply.finish_reason}
        found = {**said, "metrics": scores, **certificate(reply)}
        records[a][i] |= found
        if journals:
            journals[a].append({"row": i, "reply": found})


def certificate(reply: Reply) -> dict[str, Any]:
    """What a record tells of a reply with a base behind an API; nothing with any other."""
    if not isinstance(reply, CertifiedReply):
        return {}
    marked = len(reply.certified) - sum(reply.certified)
    return {"served": {"tokens": len(reply.certified), "marked": marked, "calls": reply.calls}}


def certificates(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several replies to one row tell together."""
    told = [record["served"] for record in records if "served" in record]
    return {"served": {key: sum(one[key] for one in told) for key in told[0]}} if told else {}


def keep(outputs: Path, measure: Placed, point: Point, records: list[dict[str, Any]]) -> None:
    finish(measure.path(outputs, point), records)
