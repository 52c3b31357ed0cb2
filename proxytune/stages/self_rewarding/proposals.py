"""The prompts of a self-rewarding round that a model proposes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from proxytune.decoding.request import Limits
from proxytune.errors import DataError
from proxytune.experts.self_rewarding.propose import Frame, Sieve, shown, stops
from proxytune.files import read_jsonl, write_jsonl
from proxytune.models.prompts import text_of
from proxytune.settings import ModelRef
from proxytune.stages.self_rewarding.loop import Loop, divided
from proxytune.stages.shared.alone import Author
from proxytune.stages.shared.kept import Kept
from proxytune.tasks.task import SPLITS, Row

TRIES = 4  # batches of proposals before a round does with fewer prompts
TOKENS = 256  # the longest proposal


def proposed(loop: Loop, number: int, folder: Path, author: Author, kept: Kept) -> list[Row]:
    """New prompts, without completions; every proposal, and why it was dropped, is in proposals.jsonl.

    author: the iterate, which proposes unless another model is named. Raises DataError where nothing new comes.
    """
    plan, rows = loop.plan, divided(loop)[0]
    frame = Frame.of(rows)
    before = [row for n in range(1, number) for row in read_jsonl(loop.work / f"round-{n}" / "prompts.jsonl")]
    known, own = ([text for row in some if (text := frame.inside(row))] for some in (rows, before))
    if not known:
        raise DataError("no train row is a single question, so none can be shown as an example", "give such rows")
    everything = [*before, *(row for split in SPLITS for row in loop.data.rows[split])]
    sieve = Sieve([frame.inside(row) or text_of(row["prompt"]) for row in everything], plan.similarity)
    if plan.proposer != "self":
        author = Author(ModelRef(model=plan.proposer), author.dtype)
    proposals: list[dict[str, Any]] = []
    taken: list[str] = []
    for attempt in range(TRIES):
        for text in _written(loop, number, attempt, known, own, author, kept):
            enough = len(taken) == plan.prompts_per_round
            fault = "enough" if enough else "long" if text is None else sieve.fault(text)
            proposals.append({"text": text, "dropped": fault})
            if text is not None and fault is None:
                taken.append(text)
        if len(taken) == plan.prompts_per_round:
            break
    write_jsonl(folder / "proposals.jsonl", proposals)
    if not taken:
        raise DataError(
            f"none of {len(proposals)} proposals is a new prompt",
            f"see {folder / 'proposals.jsonl'}: raise method.similarity, or name another method.proposer",
        )
    return [{"id": f"round-{number}-{place}", "prompt": frame.around(text)} for place, text in enumerate(taken)]


def _written(
    loop: Loop, number: int, attempt: int, known: list[str], own: list[str], author: Author, kept: Kept
) -> list[str | None]:
    """One batch of proposals; None is one that did not come to its end."""
    plan = loop.plan
    rng = random.Random(loop.seed_of(number, "shown", attempt))
    lists = [shown(known, own, plan.shots, rng) for _ in range(plan.prompts_per_round)]
    decode, limits = loop.decode(number, "proposals", attempt), Limits(TOKENS, stop=stops(known))
    replies = author.replies(lists, 1, decode, limits, kept, "proposals", plain=True)
    return [each[0].text.strip() if each and each[0].finish_reason != "length" else None for each in replies]
