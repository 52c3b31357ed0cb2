"""What a self-rewarding loop begins with, shared by all of its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxytune.decoding.request import Limits
from proxytune.errors import DataError
from proxytune.experts.registry import Expert
from proxytune.experts.self_rewarding import seed
from proxytune.files import hash_json, read_jsonl, write_checked
from proxytune.settings import Decode, ModelRef
from proxytune.settings import Expert as Settings
from proxytune.settings.self_rewarding import SelfRewarding
from proxytune.stages.shared.alone import Author
from proxytune.stages.shared.kept import Kept
from proxytune.tasks import sources
from proxytune.tasks.task import Row, Task


@dataclass(frozen=True)
class Loop:
    """All that a loop begins with. scored: replies to learn judging from, where they are given.

    work: its folder, named by what decides its outcome.
    """

    settings: Settings
    plan: SelfRewarding
    task: Task
    data: sources.Dataset
    scored: list[seed.Scored] | None
    name: str
    work: Path

    def seed_of(self, *what: Any) -> int:
        return int(hash_json([self.settings.seed, *what])[:8], 16) >> 1

    def kept(self, *what: Any) -> Kept:
        return Kept(self.settings.outputs, [self.work.name, *what])

    def author(self, expert: Expert) -> Author:
        anti = expert.manifest.anti
        return Author(ModelRef(model=anti.model, revision=anti.revision), self.settings.family.dtype, expert)

    def decode(self, *what: Any) -> Decode:
        """How proposals and answers are written."""
        plan = self.plan
        seed = self.seed_of(*what)
        return Decode(temperature=plan.temperature, top_p=plan.top_p, seed=seed, batch_size=plan.batch_size)

    def limits(self) -> Limits:
        """Of an answer."""
        chosen = self.settings.task
        stop = chosen.stop if chosen.stop is not None else self.task.stop
        return Limits(chosen.max_new_tokens or self.task.max_new_tokens, stop=tuple(stop))


def once(path: Path, make: Callable[[], Iterable[Any]], then: Sequence[Path] = ()) -> list[Any]:
    """The rows of a file, made if it is not there. StorageError names a file that is not what was made.

    then: files that are made of these rows, and anew where these are.
    """
    if not path.is_file():
        for stale in then:
            stale.unlink(missing_ok=True)
        write_checked(path, list(make()))
    return read_jsonl(path)


def divided(loop: Loop) -> tuple[list[Row], list[Row]]:
    """(rows that the seed learns from, rows whose prompts are left for the rounds)."""
    rows, plan = loop.data.rows["train"], loop.plan
    if plan.prompts == "propose":
        return rows[: plan.seed_rows], []
    count = plan.seed_rows or len(rows) // 2
    if not 0 < count < len(rows):
        raise DataError(
            f"the seed takes {count} of {len(rows)} train rows, and their rest is what the rounds ask",
            "set method.seed_rows to fewer, or give more rows",
        )
    return rows[:count], rows[count:]
