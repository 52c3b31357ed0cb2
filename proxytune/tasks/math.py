"""Math word problems in GSM8K's format: steps with calculator marks, the answer after `####`.

Built-in rows are made here, at sums that a tiny model has met as plain prose (`tasks/arithmetic_prose.py`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from proxytune.tasks.arithmetic_prose import HOLDERS, PEOPLE, TABLES, THINGS, product
from proxytune.tasks.sampling import split_of
from proxytune.tasks.task import HubData, Row, Task

SEED = 11
SIZES = {"train": 600, "validation": 300, "test": 600}
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")


def prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def builtin() -> dict[str, list[Row]]:
    """Products, some with a second step. Which split a row belongs to is decided by its two factors."""
    rng = random.Random(SEED)
    rows: dict[str, list[Row]] = {split: [] for split in SIZES}
    seen: set[str] = set()
    while any(len(rows[split]) < size for split, size in SIZES.items()):
        question, answer, factors = _problem(rng)
        split = split_of(f"{min(factors)}x{max(factors)}")
        if len(rows[split]) < SIZES[split] and question not in seen:
            seen.add(question)
            name = f"math-{split}-{len(rows[split])}"
            rows[split].append({"id": name, "prompt": prompt(question), "completion": f" {answer}\n"})
    return rows


def _problem(rng: random.Random) -> tuple[str, str, tuple[int, int]]:
    who, things, holders = rng.choice(PEOPLE), rng.choice(THINGS), rng.choice(HOLDERS)
    a, b = product(rng)
    made = a * b
    step = f"There are {a}*{b} = <<{a}*{b}={made}>>{made} {things}."
    if rng.random() < 0.6:
        question = f"{who} has {a} {holders} with {b} {things} in each. How many {things} does {who} have in all?"
        return question, f"{step}\n#### {made}", (a, b)
    more = rng.randint(2, TABLES.step)
    total = made + more
    question = (
        f"{who} has {a} {holders} with {b} {things} in each and finds {more} more {things}. "
        f"How many {things} does {who} have then?"
    )
    steps = f"{step}\nThen {who} has {made}+{more} = <<{made}+{more}={total}>>{total} {things}."
    return question, f"{steps}\n#### {total}", (a, b)


def final_number(text: str) -> str | None:
    """The last number of a text, commas between digits removed (the paper's rule for GSM8K), or None."""
    found = _NUMBER.findall(re.sub(r"(\d),(\d)", r"\1\2", text))
    return found[-1] if found else None


def exact_match(reference: str, output: str) -> float:
    """1 if the last number of the output is the reference's last one, which in GSM8K is the one after `####`.

    The rule drops the sign of whole numbers, on both sides. A reference without a number asks for the same words.
    """
    wanted, found = final_number(reference), final_number(output)
    if wanted is None:
        return float(reference.split() == output.split())
    return float(found is not None and float(found) == float(wanted))


def _gsm8k(row: Mapping[str, Any]) -> Row | None:
    return {"prompt": prompt(row["question"].strip()), "completion": f" {row['answer'].strip()}\n"}


TASK = Task(
    name="math",
    summary="GSM8K-style word problems, calculator marks kept",
    builtin=builtin,
    hub=HubData(
        "openai/gsm8k", {"train": "train[:95%]", "validation": "train[95%:]", "test": "test"}, _gsm8k, name="main"
    ),
    metrics={"exact_match": exact_match},
    max_new_tokens=96,
    stop=("\nQuestion:",),
)
