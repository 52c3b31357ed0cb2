"""One row from outside, in any form that TRL reads, made into a `Row` or refused with what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from proxytune.errors import DataError
from proxytune.tasks.task import Row, Task

ROLES = ("system", "user", "assistant", "tool")


def read(raw: Any, task: Task) -> Row:
    """A row with `prompt` and `completion`, one with `messages`, or one in the form of the task's public set.

    The row's `id` is left out where `raw` has none. DataError says what is wrong, not where: the caller knows.
    """
    if not isinstance(raw, Mapping):
        raise DataError(f"a row must be an object, not {type(raw).__name__}")
    if "prompt" in raw:
        if "completion" not in raw:
            raise DataError("there is a prompt but no completion")
        return checked(raw)
    if "messages" in raw:
        messages = raw["messages"]
        if not isinstance(messages, list) or len(messages) < 2:
            raise DataError("messages must be a list of at least two turns, the last one the assistant's")
        return checked({"id": raw.get("id"), "prompt": messages[:-1], "completion": messages[-1:]})
    try:
        row = task.hub.to_row(raw)
    except (KeyError, TypeError, AttributeError):
        row = None
    if row is None:
        keys = ", ".join(map(str, raw)) or "none"
        raise DataError(
            f"there is neither a prompt nor messages (its keys: {keys})",
            f"rows need prompt and completion, or messages, or the form of {task.hub.path}",
        )
    return checked(row)


def checked(row: Mapping[str, Any]) -> Row:
    """The row with what belongs to it and nothing else; DataError if it cannot be trained on."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):
        prompt, completion = _messages(prompt, "prompt"), _messages(completion, "completion")
        if any(turn["role"] != "assistant" for turn in completion):
            raise DataError("the last turn is not the assistant's")
    else:
        check_text(prompt, "prompt")
        check_text(completion, "completion")
        if prompt.endswith((" ", "\t")):
            raise DataError("the prompt ends in a space, which belongs to the next word", "move it to the completion")
    identity = row.get("id")
    check_whole(identity, "the id")
    named = {} if identity in (None, "") else {"id": str(identity)}
    return {**named, "prompt": prompt, "completion": completion}


def same_form(first: Row, row: Row) -> None:
    """DataError where one row is texts and the other messages: a trainer takes one kind."""
    if isinstance(first["prompt"], str) != isinstance(row["prompt"], str):
        kinds = ("a text", "messages") if isinstance(first["prompt"], str) else ("messages", "a text")
        raise DataError(
            f"its prompt is {kinds[1]}, and that of the first row is {kinds[0]}: some rows are texts and some are "
            "messages",
            "give all to train on in one form",
        )


def _messages(turns: Any, what: str) -> list[dict[str, str]]:
    if not isinstance(turns, list):
        raise DataError(f"one part is a list of messages, but the {what} is {type(turns).__name__}")
    if not turns:
        raise DataError(f"the {what} is empty")
    kept = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            raise DataError(f"a message of the {what} has no role or no content")
        if turn["role"] not in ROLES:
            raise DataError(f"a message has the role {turn['role']!r}", f"roles: {', '.join(ROLES)}")
        check_text(turn["content"], f"content of a message of the {what}")
        kept.append({"role": turn["role"], "content": turn["content"]})
    return kept


def check_text(value: Any, what: str) -> None:
    """DataError where a value is no text that can be learned from."""
    if not isinstance(value, str):
        raise DataError(f"the {what} is not a string but {type(value).__name__}")
    if not value.strip():
        raise DataError(f"the {what} is empty")
    check_whole(value, f"the {what}")


def check_whole(value: Any, what: str, hint: str = "") -> None:
    """DataError where a text, or any in a row, cannot be written down: JSON, and bytes that are not UTF-8, make half
    characters."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} holds half a character (a lone surrogate)", hint) from None
