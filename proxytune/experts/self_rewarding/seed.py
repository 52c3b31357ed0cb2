"""Rows that a seed learns judging from: scored replies, put as the question a judge is asked and what it should say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from proxytune.errors import DataError
from proxytune.models.prompts import text_of
from proxytune.tasks import preferences
from proxytune.tasks.rows import check_whole
from proxytune.tasks.task import Row

# Of replies whose worth is known without a judge: (points, why).
GOOD = (5, "The reply answers the whole instruction and has nothing beside the point.")
CUT = (2, "The reply is about the instruction, but much of the answer is missing.")
OTHER = (0, "The reply is not about the instruction.")

Scored = tuple[str, str, float, str]  # instruction, response, points, why


def made_of(rows: Sequence[Row]) -> list[Scored]:
    """One of each row, in turn: its own reply, half of that, and the reply of another row."""
    others = {row["id"]: text_of(row["rejected"]) for row in preferences.made_of(rows)}
    found = []
    for place, row in enumerate(rows):
        reply = text_of(row["completion"])
        words = reply.split()
        kinds = [(reply, GOOD), (" ".join(words[: len(words) // 2]), CUT), (others.get(row["id"], ""), OTHER)]
        response, (points, why) = kinds[place % len(kinds)]
        if response.strip():
            found.append((text_of(row["prompt"]), response, float(points), why))
    return found


def read(raw: Any, most: float) -> Scored:
    """A scored reply from a file; DataError says what is wrong with it."""
    if not isinstance(raw, Mapping):
        raise DataError(f"a row must be an object, not {type(raw).__name__}")
    check_whole(raw, "the row")
    for key in ("instruction", "response", "score"):
        if raw.get(key) in (None, ""):
            raise DataError(f"there is no {key}", "rows to learn judging from have instruction, response and score")
    try:
        points = float(raw["score"])
    except (TypeError, ValueError):
        points = math.nan
    if not 0 <= points <= most:
        raise DataError(f"the score is {raw['score']!r}, and points go from 0 to {most:g}")
    return str(raw["instruction"]), str(raw["response"]), points, str(raw.get("reason") or "")


def rows(
    scored: Iterable[Scored],
    chat: bool,
    question: Callable[[str, str], str],
    verdict: Callable[[str, float], str],
) -> list[Row]:
    """Rows to tune on, in the form of the task's own."""
    found = []
    for number, (instruction, response, points, why) in enumerate(scored):
        asked, said = question(instruction, response), verdict(why, points)
        row = (
            {"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": said}]}
            if chat
            else {"prompt": asked, "completion": said + "\n"}
        )
        found.append({"id": f"judge-{number}", **row})
    return found
