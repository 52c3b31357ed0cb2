"""Rows that have more tokens than the trainer takes: counted, and cut, left out or refused, before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NoReturn

from proxytune.errors import DataError
from proxytune.tasks.task import Row

Policy = Literal["truncate", "drop", "fail"]
TOLD = 8  # row numbers that a message names


def fit(
    rows: Mapping[str, list[Row]], tokenizer, max_length: int | None, policy: Policy
) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """(rows that the trainer gets, how many of them it cuts and how many were left out).

    Counts are under `<split>_cut` and `<split>_dropped`, where there are any. A row whose prompt alone fills max_length
    has no reply left once it is cut, so it is left out with `truncate` too. DataError: with `fail`, naming the rows; or
    where no row is left to train on.
    """
    if max_length is None:
        return dict(rows), {}
    kept: dict[str, list[Row]] = {}
    counts: dict[str, int] = {}
    for split, some in rows.items():
        whole = [
            max(lengths) for lengths in zip(*(_lengths(some, key, tokenizer) for key in _replies(some)), strict=True)
        ]
        long = [place for place, tokens in enumerate(whole) if tokens > max_length]
        if long and policy == "fail":
            _refuse(split, some, whole, long, max_length)
        prompts = dict(zip(long, _lengths([some[place] for place in long], None, tokenizer), strict=True))
        gone = {place for place in long if policy == "drop" or prompts[place] >= max_length}
        kept[split] = [row for place, row in enumerate(some) if place not in gone]
        found = {f"{split}_cut": len(long) - len(gone), f"{split}_dropped": len(gone)}
        counts |= {name: count for name, count in found.items() if count}
        if split == "train" and some and not kept[split]:
            raise DataError(f"every train row has more than max_length={max_length} tokens", "raise method.max_length")
    return kept, counts


def told(counts: Mapping[str, int], max_length: int | None) -> list[str]:
    """What the user should know of it, a line each."""
    done = {"cut": "cut to", "dropped": "dropped: more than"}
    return [
        f"{count} {split} rows {done[what]} max_length={max_length} tokens"
        for name, count in counts.items()
        for split, _, what in [name.rpartition("_")]
    ]


def _replies(rows: Sequence[Row]) -> tuple[str, ...]:
    return ("chosen", "rejected") if rows and "chosen" in rows[0] else ("completion",)


def _lengths(rows: Sequence[Row], reply: str | None, tokenizer) -> list[int]:
    """Tokens of each row's prompt, and with a `reply` (its key) those of both, the end token counted."""
    if not rows:
        return []
    if isinstance(rows[0]["prompt"], str):
        texts = [row["prompt"] + (row[reply] if reply else "") for row in rows]
        end = 1 if reply else 0
        return [len(ids) + end for ids in tokenizer(texts, verbose=False).input_ids]
    turns = [row["prompt"] + (row[reply] if reply else []) for row in rows]
    texts = [tokenizer.apply_chat_template(one, add_generation_prompt=not reply, tokenize=False) for one in turns]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids]


def _refuse(split: str, rows: Sequence[Row], whole: Sequence[int], long: Sequence[int], max_length: int) -> NoReturn:
    first, others = long[0], long[1 : TOLD + 1]
    more = f"; so have rows {', '.join(str(place + 1) for place in others)}" if others else ""
    more += f" and {len(long) - 1 - TOLD} others" if len(long) > TOLD + 1 else ""
    raise DataError(
        f"{split} row {first + 1} (id {rows[first]['id']!r}) has {whole[first]:,} tokens, more than "
        f"max_length={max_length:,}{more}",
        "raise method.max_length, or method.too_long=truncate or drop",
    )
