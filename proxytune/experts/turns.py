"""Rows of messages as the chat template takes them, so that an expert is trained on what it will be asked."""

from __future__ import annotations

from collections.abc import Mapping

from proxytune.errors import DataError
from proxytune.models.prompts import taken, templated
from proxytune.tasks.task import Row


def as_taken(rows: Mapping[str, list[Row]], tokenizer) -> dict[str, list[Row]]:
    """The rows, where a system turn that the template refuses opens the user's, as in decoding. Texts stay as they are.

    DataError names the first row that the template refuses all the same.
    """
    read: dict[str, list[Row]] = {}
    for split, some in rows.items():
        read[split] = []
        for number, row in enumerate(some, 1):
            try:
                read[split].append(row if isinstance(row["prompt"], str) else _taken(row, tokenizer))
            except DataError as error:
                what = f"{split} row {number} (id {row['id']!r}): {error.what}"
                raise DataError(what, error.hint) from error.__cause__
    return read


def _taken(row: Row, tokenizer) -> Row:
    prompt, _ = taken(row["prompt"], tokenizer, tokenize=False, add_generation_prompt=True)
    for reply in row.keys() & {"completion", "chosen", "rejected"}:
        templated([*prompt, *row[reply]], tokenizer, tokenize=False)
    return {**row, "prompt": prompt}
