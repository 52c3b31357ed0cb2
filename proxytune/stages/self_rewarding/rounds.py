"""One round of self-rewarding training: prompts, answers, judgements, pairs; each step leaves a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from proxytune.errors import DataError
from proxytune.experts.registry import Expert
from proxytune.experts.self_rewarding import pairs
from proxytune.experts.self_rewarding.pairs import Judged
from proxytune.files import hash_json, read_json, write_checked, write_json
from proxytune.stages.self_rewarding import rewards
from proxytune.stages.self_rewarding.loop import Loop, divided, once
from proxytune.stages.self_rewarding.proposals import proposed
from proxytune.stages.shared.alone import Author
from proxytune.stages.shared.kept import Kept
from proxytune.stages.shared.start import start
from proxytune.tasks.task import Row


def play(loop: Loop, number: int, iterate: Expert) -> dict[str, Any]:
    """Write the preferences that the next iterate is tuned on; returns what came of prompts, replies and judgements."""
    folder = loop.work / f"round-{number}"
    path, chosen = folder / "yield.json", folder / "pairs.jsonl"
    if not (path.is_file() and chosen.is_file()):
        with start(loop.settings, "self_rewarding", [f"round-{number}"]) as tracked:
            found = _preferences(loop, number, folder, loop.author(iterate))
            tracked.summary({f"round/{key}": value for key, value in found.items()})
            tracked.artifact(f"{loop.name}-preferences-m{number}", "dataset", chosen, found, uses=[iterate.reference])
        write_json(path, found, checked=True)
    found = read_json(path)
    told = f"{found['pairs']} pairs of {found['prompts']} prompts "
    told += f"({found['ties']} ties, {found['alike']} with all answers alike, {found['unpaired']} unpaired)"
    told += f"; {found['unparsed']} of {found['judgements']} judgements unparsed"
    print(f"proxytune: round {number}: {told}", file=sys.stderr)
    if found["pairs"] < 2:
        raise DataError(f"round {number} made {told}", f"see {folder}: more or other prompts, or another judge")
    return found


def _preferences(loop: Loop, number: int, folder: Path, author: Author) -> dict[str, Any]:
    plan = loop.plan
    kept = [loop.kept(number, label) for label in ("proposals", "answers", "judgements")]
    steps = [folder / f"{step}.jsonl" for step in ("prompts", "answers", "judgements")]
    rows = once(steps[0], lambda: _prompts(loop, number, folder, author, kept[0]), steps[1:])
    kept[0].journal.remove()
    answers = once(steps[1], lambda: _answers(loop, number, rows, author, kept[1]), steps[2:])
    kept[1].journal.remove()
    replies = [[reply["text"] for reply in answer["replies"]] for answer in answers]

    def judge() -> Iterable[Any]:
        if plan.judge.by == "task":
            found = rewards.by_task(loop.task, rows, replies)
        else:
            seed = loop.seed_of(number, "judgements")
            found = rewards.by_model(plan, rows, replies, author, seed, kept[2], folder / "judge")
        return [{"id": row["id"], "replies": each} for row, each in zip(rows, found, strict=True)]

    judgements = once(steps[2], judge)
    kept[2].journal.remove()
    judged = [
        [
            Judged(reply["text"], tuple(judgement["scores"]), reply["finish_reason"] != "length")
            for reply, judgement in zip(answer["replies"], its["replies"], strict=True)
        ]
        for answer, its in zip(answers, judgements, strict=True)
    ]
    made, counts = pairs.make([(row["id"], row["prompt"]) for row in rows], judged)
    write_checked(folder / "pairs.jsonl", made)
    means = [reply.mean for each in judged for reply in each if reply.mean is not None]
    return {**counts, "mean_score": sum(means) / len(means) if means else None}


def _answers(loop: Loop, number: int, rows: list[Row], author: Author, kept: Kept) -> list[dict[str, Any]]:
    decode, asked = loop.decode(number, "answers"), [row["prompt"] for row in rows]
    written = author.replies(asked, loop.plan.answers, decode, loop.limits(), kept, "answers")
    return [
        {"id": row["id"], "replies": [{"text": one.text, "finish_reason": one.finish_reason} for one in each]}
        for row, each in zip(rows, written, strict=True)
    ]


def _prompts(loop: Loop, number: int, folder: Path, author: Author, kept: Kept) -> list[Row]:
    """A round's rows; those of proposed prompts have no completion."""
    plan = loop.plan
    if plan.prompts == "propose":
        return proposed(loop, number, folder, author, kept)
    rows = sorted(divided(loop)[1], key=lambda row: hash_json([loop.settings.seed, number, row["id"]]))
    return rows[: plan.prompts_per_round]
