"""Whole-number arithmetic told in plain sentences: what the embedded family reads before it ever meets a task.

The statements carry the sums that `tasks/math.py` asks for, in other words than the task's: no question, no answer
line, no calculator marks.
"""

from __future__ import annotations

import random

PEOPLE = "Ada Ben Cora Dan Ella Finn Gita Hugo Iris Jack Kira Leo Mia Noah Olga Paul Rosa Sam Tara Uma Victor Zoe".split()
THINGS = "apples beads books boxes buttons cakes cards coins cups eggs keys marbles nails nuts pears pens plates plums shells stamps stones tickets tiles toys".split()
HOLDERS = "bags baskets boxes cases crates drawers jars packs rows sacks shelves trays".split()

MAX_FACTOR = 12  # one factor of a product lies in 2..MAX_FACTOR, the other in 2..99
MAX_SUM = 999  # sums have a first term up to here and a second one in 2..99


def product(rng: random.Random) -> tuple[int, int]:
    """Two factors, in either order: 2..99 and 2..MAX_FACTOR."""
    pair = (rng.randint(2, 99), rng.randint(2, MAX_FACTOR))
    return pair if rng.random() < 0.5 else pair[::-1]


def _statement(rng: random.Random) -> str:
    who, things, holders = rng.choice(PEOPLE), rng.choice(THINGS), rng.choice(HOLDERS)
    kind = rng.choice(("product", "product", "product", "sum", "sum", "difference", "quotient"))
    if kind == "product":
        a, b = product(rng)
        c = a * b
        wordings = (
            f"{a} * {b} = {c}.",
            f"{a}*{b}={c}.",
            f"{a} times {b} is {c}.",
            f"{a} {holders} of {b} {things} hold {a}*{b} = {c} {things}.",
            f"{who} filled {a} {holders} with {b} {things} each, {c} {things} in all.",
        )
    elif kind == "sum":
        a, b = rng.randint(2, MAX_SUM), rng.randint(2, 99)
        c = a + b
        wordings = (
            f"{a} + {b} = {c}.",
            f"{a}+{b}={c}.",
            f"{a} and {b} make {c}.",
            f"{who} had {a} {things}, found {b} more and then had {a}+{b} = {c} {things}.",
            f"{who} put {a} {things} to {b} others, {c} {things} in all.",
        )
    elif kind == "difference":
        b, c = rng.randint(2, 99), rng.randint(1, MAX_SUM)
        a = b + c
        wordings = (
            f"{a} - {b} = {c}.",
            f"{a}-{b}={c}.",
            f"{b} from {a} leaves {c}.",
            f"{who} had {a} {things}, gave away {b} and kept {a}-{b} = {c} {things}.",
            f"Of {a} {things} {who} sold {b}, and {c} were left.",
        )
    else:
        b, c = product(rng)
        a = b * c
        wordings = (
            f"{a} / {b} = {c}.",
            f"{a}/{b}={c}.",
            f"{a} divided by {b} is {c}.",
            f"{a} {things} shared among {b} {holders} are {a}/{b} = {c} in each.",
            f"{who} laid {a} {things} into {b} {holders}, {c} in each.",
        )
    return rng.choice(wordings)


def paragraph(rng: random.Random, statements: int = 8) -> str:
    """A paragraph of true statements about whole numbers."""
    return " ".join(_statement(rng) for _ in range(statements))
