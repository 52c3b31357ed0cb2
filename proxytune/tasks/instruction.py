"""Instruction following: messages in, a helpful reply out, in the model's chat format.

Built-in rows ask a mixture of things in a dialogue: a portrait of a town, a sum, a list.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from proxytune.tasks import almanac
from proxytune.tasks.arithmetic_prose import product
from proxytune.tasks.qa import normalised
from proxytune.tasks.sampling import split_of
from proxytune.tasks.task import HubData, Row, Task

SEED = 13
SIZES = {"train": 600, "validation": 300, "test": 600}


def builtin() -> dict[str, list[Row]]:
    rng = random.Random(SEED)
    rows: dict[str, list[Row]] = {split: [] for split in SIZES}
    seen: set[str] = set()
    while any(len(rows[split]) < size for split, size in SIZES.items()):
        key, instruction, reply = rng.choice((_portrait, _sum, _market_days))(rng)
        split = split_of(key)
        if len(rows[split]) < SIZES[split] and instruction not in seen:
            seen.add(instruction)
            rows[split].append({"id": f"instruction-{split}-{len(rows[split])}", **_messages(instruction, reply)})
    return rows


def _messages(instruction: str, reply: str) -> Row:
    return {
        "prompt": [{"role": "user", "content": instruction}],
        "completion": [{"role": "assistant", "content": reply}],
    }


def _portrait(rng: random.Random) -> tuple[str, str, str]:
    town = rng.choice(almanac.towns())
    ask = rng.choice(("Tell me about {}.", "Describe the town of {}.", "What should I know about {}?"))
    reply = (
        f"{town.name} is a town in the county of {town.county}. {town.name} lies on the river {town.river}. "
        f"{town.name} is known for its {town.craft}."
    )
    return town.name, ask.format(town.name), reply


def _sum(rng: random.Random) -> tuple[str, str, str]:
    a, b = product(rng)
    ask = rng.choice(("What is {} times {}?", "Multiply {} by {}.", "Please work out {} times {}."))
    return f"{min(a, b)}x{max(a, b)}", ask.format(a, b), f"{a} times {b} is {a * b}."


def _market_days(rng: random.Random) -> tuple[str, str, str]:
    one = rng.choice(almanac.towns())
    other = one
    while other == one or split_of(other.name) != split_of(one.name):
        other = rng.choice(almanac.towns())
    ask = f"List the market days of {one.name} and {other.name}."
    return one.name, ask, "\n".join(f"- The market in {town.name} is held on {town.day}." for town in (one, other))


def rouge_l(reference: str, output: str) -> float:
    """ROUGE-L F1 over words (Lin 2004): the longest common subsequence against both lengths."""
    wanted, found = normalised(reference).split(), normalised(output).split()
    if not wanted:
        return float(not found)
    row = [0] * (len(found) + 1)
    for word in wanted:
        diagonal = 0
        for i, other in enumerate(found, 1):
            diagonal, row[i] = row[i], diagonal + 1 if word == other else max(row[i], row[i - 1])
    common = row[-1]
    return 2 * common / (len(wanted) + len(found))


def exact_match(reference: str, output: str) -> float:
    """1 if the whole reply says what the reference says, case and punctuation aside."""
    return float(normalised(reference) == normalised(output))


def _tulu(row: Mapping[str, Any]) -> Row | None:
    turns = row["messages"]
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        return None
    return {"id": row.get("id"), "prompt": list(turns[:-1]), "completion": [turns[-1]]}


TASK = Task(
    name="instruction",
    summary="follow an instruction in a dialogue",
    builtin=builtin,
    hub=HubData(
        "allenai/tulu-3-sft-mixture",
        {"train": "train[2000:12000]", "validation": "train[1000:2000]", "test": "train[0:1000]"},
        _tulu,
        streamed=True,
    ),
    metrics={"rouge_l": rouge_l, "exact_match": exact_match},
    max_new_tokens=64,
    preferences=HubData(
        "trl-lib/ultrafeedback_binarized",
        {"train": "train[1000:11000]", "validation": "train[:1000]", "test": "test"},
        dict,
    ),
)
