"""Whole-number arithmetic told in plain sentences: what the embedded family reads before it ever meets a task.

The statements carry the sums that `tasks/math.py` asks for, in other words than the task's: no question, no answer
line, no calculator marks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

PEOPLE = (
    "Ada Ben Cora Dan Ella Finn Gita Hugo Iris Jack Kira Leo Mia Noah Olga Paul Rosa Sam Tara Uma Victor Zoe".split()
)
THINGS = (
    "apples beads books boxes buttons cakes cards coins cups eggs keys marbles nails nuts pears pens plates plums "
    "shells stamps stones tickets tiles toys"
).split()
HOLDERS = "bags baskets boxes cases crates drawers jars packs rows sacks shelves trays".split()


@dataclass(frozen=True)
class Range:
    """How large numbers get: a product's factors are in 2..first and 2..second, a sum's terms in 2..total, 2..step."""

    first: int
    second: int
    total: int
    step: int


WIDE = Range(first=99, second=12, total=999, step=99)
TABLES = Range(first=12, second=12, total=150, step=9)  # the multiplication tables: what the tasks ask for


def product(rng: random.Random, size: Range = TABLES) -> tuple[int, int]:
    """Two factors within the range, in either order."""
    pair = (rng.randint(2, size.first), rng.randint(2, size.second))
    return pair if rng.random() < 0.5 else pair[::-1]


def _statement(rng: random.Random, size: Range) -> str:
    who, things, holders = rng.choice(PEOPLE), rng.choice(THINGS), rng.choice(HOLDERS)
    kind = rng.choice(("product", "product", "product", "sum", "sum", "difference", "quotient"))
    if kind == "product":
        a, b = product(rng, size)
        c = a * b
        wordings = (
            f"{a} * {b} = {c}.",
            f"{a}*{b}={c}.",
            f"{a} times {b} is {c}.",
            f"{a} {holders} of {b} {things} hold {a}*{b} = {c} {things}.",
            f"{who} filled {a} {holders} with {b} {things} each, {c} {things} in all.",
        )
    elif kind == "sum":
        a, b = rng.randint(2, size.total), rng.randint(2, size.step)
        c = a + b
        wordings = (
            f"{a} + {b} = {c}.",
            f"{a}+{b}={c}.",
            f"{a} and {b} make {c}.",
            f"{who} had {a} {things}, found {b} more and then had {a}+{b} = {c} {things}.",
            f"{who} put {a} {things} to {b} others, {c} {things} in all.",
        )
    elif kind == "difference":
        b, c = rng.randint(2, size.step), rng.randint(1, size.total)
        a = b + c
        wordings = (
            f"{a} - {b} = {c}.",
            f"{a}-{b}={c}.",
            f"{b} from {a} leaves {c}.",
            f"{who} had {a} {things}, gave away {b} and kept {a}-{b} = {c} {things}.",
            f"Of {a} {things} {who} sold {b}, and {c} were left.",
        )
    else:
        b, c = product(rng, size)
        a = b * c
        wordings = (
            f"{a} / {b} = {c}.",
            f"{a}/{b}={c}.",
            f"{a} divided by {b} is {c}.",
            f"{a} {things} shared among {b} {holders} are {a}/{b} = {c} in each.",
            f"{who} laid {a} {things} into {b} {holders}, {c} in each.",
        )
    return rng.choice(wordings)


def paragraph(rng: random.Random, size: Range, statements: int = 8) -> str:
    """A paragraph of true statements about whole numbers."""
    return " ".join(_statement(rng, size) for _ in range(statements))
