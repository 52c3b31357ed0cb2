"""Preference rows: a prompt, the reply that was chosen, and the one that was rejected.

    {"id": str, "prompt": str, "chosen": str, "rejected": str}
    {"id": str, "prompt": [messages], "chosen": [{"role": "assistant", "content"}], "rejected": [...]}

They come in four forms: these two, two whole dialogues that part at the last reply (as messages, or as one text with
`Human:` and `Assistant:` turns, as in hh-rlhf), and `conversations` beside the two replies (as in LLaMA-Factory).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from proxytune.errors import DataError
from proxytune.models.prompts import text_of
from proxytune.tasks import rows as forms
from proxytune.tasks.task import Row

NEEDED = "preference rows need prompt, chosen and rejected, or two dialogues chosen and rejected"
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

_TURN = re.compile(r"\n\n(Human|Assistant):")


def read(raw: Any) -> Row:
    """A preference row in one of the two forms above. DataError says what is wrong, not where."""
    if not isinstance(raw, Mapping):
        raise DataError(f"a row must be an object, not {type(raw).__name__}")
    for key in ("chosen", "rejected"):
        if key not in raw:
            raise DataError(f"there is no {key} reply (its keys: {', '.join(map(str, raw)) or 'none'})", NEEDED)
    prompt, chosen, rejected = _parts(raw)
    kept = [_completed(raw.get("id"), prompt, reply, name) for name, reply in _named(chosen, rejected)]
    if kept[0]["completion"] == kept[1]["completion"]:
        raise DataError("the chosen and the rejected reply are the same")
    first = {key: value for key, value in kept[0].items() if key != "completion"}
    return {**first, "chosen": kept[0]["completion"], "rejected": kept[1]["completion"]}


def as_completion(row: Row) -> Row:
    """The row to learn or measure the chosen reply by."""
    named = {"id": row["id"]} if "id" in row else {}
    return {**named, "prompt": row["prompt"], "completion": row["chosen"]}


def made_of(rows: Sequence[Row]) -> list[Row]:
    """Preference rows out of a task's own: the row's reply is chosen, that of another row is rejected.

    Which other one follows from the rows' content, not from chance.
    """
    order = sorted(rows, key=lambda row: hashlib.sha256(f"{text_of(row['prompt'])}{row['id']}".encode()).hexdigest())
    made = {}
    for place, row in enumerate(order):
        others = (order[(place + step) % len(order)]["completion"] for step in range(1, len(order)))
        other = next((reply for reply in others if reply != row["completion"]), None)
        if other is not None:
            made[row["id"]] = {
                "id": row["id"],
                "prompt": row["prompt"],
                "chosen": row["completion"],
                "rejected": other,
            }
    return [made[row["id"]] for row in rows if row["id"] in made]


def _named(chosen: Any, rejected: Any) -> tuple[tuple[str, Any], tuple[str, Any]]:
    return ("chosen", chosen), ("rejected", rejected)


def _completed(identity: Any, prompt: Any, reply: Any, name: str) -> Row:
    try:
        return forms.checked({"id": identity, "prompt": prompt, "completion": reply})
    except DataError as error:
        raise DataError(error.what.replace("completion", f"{name} reply"), error.hint) from error


def _parts(raw: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected) as texts or as lists of messages."""
    chosen, rejected = raw["chosen"], raw["rejected"]
    if "conversations" in raw:
        turns = raw["conversations"]
        if not isinstance(turns, list):
            raise DataError(f"conversations is not a list but {type(turns).__name__}")
        return [_said(turn) for turn in turns], [_said(chosen)], [_said(rejected)]
    if "prompt" in raw:
        return raw["prompt"], chosen, rejected
    if isinstance(chosen, str) and isinstance(rejected, str):
        chosen, rejected = _dialogue(chosen, "chosen"), _dialogue(rejected, "rejected")
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise DataError("without a prompt, chosen and rejected must be two dialogues", NEEDED)
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    if len(chosen) - same != 1 or len(rejected) - same != 1:
        raise DataError("the two dialogues part before the last reply", NEEDED)
    return chosen[:same], chosen[same:], rejected[same:]


def _said(turn: Any) -> dict[str, Any]:
    """A turn of `from` and `value` as a message."""
    if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
        raise DataError("a turn of the conversation has no from or no value")
    role = SPEAKERS.get(str(turn["from"]))
    if role is None:
        raise DataError(f"a turn is from {turn['from']!r}", f"known: {', '.join(SPEAKERS)}")
    return {"role": role, "content": turn["value"]}


def _dialogue(text: str, name: str) -> list[dict[str, str]]:
    """A text of Human and Assistant turns as messages."""
    start, *parts = _TURN.split(text if text.startswith("\n\n") else "\n\n" + text)
    if start.strip() or not parts:
        raise DataError(f"the {name} text is no dialogue of Human: and Assistant: turns", NEEDED)
    return [
        {"role": SPEAKERS[speaker.lower()], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]
