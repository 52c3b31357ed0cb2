"""Preferences out of judged replies: for each prompt the best one against the worst (Yuan et al. 2024, section 2.4).

What cannot be told apart makes no pair: equal means are a tie, and a reply that nobody judged is no bad reply. A reply
that was cut at its longest is never the chosen one, for that would teach to stop in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from proxytune.models.prompts import Turns

OUTCOMES = ("pairs", "ties", "alike", "unpaired")  # what becomes of a prompt; their counts add up to all prompts


@dataclass(frozen=True)
class Judged:
    """One reply. scores: of each judgement, None where that could not be read. whole: it was not cut."""

    text: str
    scores: tuple[float | None, ...]
    whole: bool = True

    @property
    def mean(self) -> float | None:
        read = [score for score in self.scores if score is not None]
        return sum(read) / len(read) if read else None


def merged(replies: Sequence[Judged]) -> list[Judged]:
    """Equal replies as one, with the judgements of all of them; empty ones are left out."""
    found: dict[str, Judged] = {}
    for reply in replies:
        key = reply.text.strip()
        if key:
            known = found.get(key)
            whole = reply.whole or bool(known and known.whole)
            found[key] = Judged(reply.text, (known.scores if known else ()) + reply.scores, whole)
    return list(found.values())


def best_and_worst(replies: Sequence[Judged]) -> tuple[Judged, Judged] | str:
    """(chosen, rejected), else why there is no pair.

    `alike`: all replies say the same; `ties`: their means are equal; `unpaired`: fewer than two were judged, or all are
    cut.
    """
    different = merged(replies)
    if len(different) == 1:
        return "alike"
    judged = [reply for reply in different if reply.mean is not None]
    whole = [reply for reply in judged if reply.whole]
    if len(judged) < 2 or not whole:
        return "unpaired"
    chosen, rejected = max(whole, key=_mean), min(judged, key=_mean)
    return (chosen, rejected) if _mean(chosen) > _mean(rejected) else "ties"


def _mean(reply: Judged) -> float:
    assert reply.mean is not None
    return reply.mean


def make(
    prompts: Sequence[tuple[str, Turns]], replies: Sequence[Sequence[Judged]]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(preference rows, counts of what became of prompts, replies and judgements). prompts: each with its id."""
    rows = []
    counts = dict.fromkeys(("prompts", *OUTCOMES, "replies", "empty", "cut", "unjudged", "judgements", "unparsed"), 0)
    for (name, prompt), answers in zip(prompts, replies, strict=True):
        found = best_and_worst(answers)
        counts["prompts"] += 1
        counts["pairs" if isinstance(found, tuple) else found] += 1
        for answer in answers:
            counts["replies"] += 1
            counts["empty"] += not answer.text.strip()
            counts["cut"] += not answer.whole
            counts["unjudged"] += answer.mean is None
            counts["judgements"] += len(answer.scores)
            counts["unparsed"] += answer.scores.count(None)
        if isinstance(found, tuple):
            chosen, rejected = found
            scores = {"chosen_score": chosen.mean, "rejected_score": rejected.mean}
            rows.append({"id": name, "prompt": prompt, **_sides(prompt, chosen, rejected), **scores})
    return rows, counts


def _sides(prompt: Turns, chosen: Judged, rejected: Judged) -> dict[str, Any]:
    """Both replies in the form of the prompt (tasks/preferences.py).

    In a chat without white space at the ends: a first line break would become one token with the template's own.
    """
    sides = {"chosen": chosen.text, "rejected": rejected.text}
    if isinstance(prompt, str):
        return sides
    return {key: [{"role": "assistant", "content": text.strip()}] for key, text in sides.items()}
