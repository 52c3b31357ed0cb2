"""Code: write a documented Python function from its signature and purpose.

Built-in rows are real functions of Python's standard library (`tasks/stdlib.py`), split by module.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any

from proxytune.tasks import stdlib
from proxytune.tasks.task import HubData, Row, Task


def prompt(signature: str, purpose: str) -> str:
    return f"### Task\nWrite the Python function `{signature}`.\n{purpose}\n\n### Solution\n"


def builtin() -> dict[str, list[Row]]:
    """Real functions; one that stands in several splits, by body or by prompt, is kept in the first of test, validation, train."""
    rows: dict[str, list[Row]] = {"test": [], "validation": [], "train": []}
    seen: set[str] = set()
    functions = stdlib.functions()
    for split, kept in rows.items():
        mine: set[str] = set()
        for function in functions:
            if stdlib.split_of(function.module) != split:
                continue
            keys = {stdlib.body_key(function.source), prompt(function.signature, function.purpose)}
            if keys & seen:
                continue
            mine |= keys
            kept.append(
                {
                    "id": f"{function.module}.{function.name}:{len(kept)}",
                    "prompt": prompt(function.signature, function.purpose),
                    "completion": function.source + "\n",
                }
            )
        seen |= mine
    return rows


def edit_similarity(reference: str, output: str) -> float:
    """2 * matching characters / all characters (Ratcliff and Obershelp), spaces at the ends ignored."""
    return SequenceMatcher(None, reference.strip(), output.strip(), autojunk=False).ratio()


def valid_function(reference: str, output: str) -> float:
    """1 if the output is Python, exactly one function, with the reference's name and arguments."""
    try:
        wanted, found = ast.parse(reference.strip()), ast.parse(output.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0
    if len(found.body) != 1 or not isinstance(found.body[0], ast.FunctionDef):
        return 0.0
    asked = wanted.body[0]
    return float(found.body[0].name == asked.name and ast.dump(found.body[0].args) == ast.dump(asked.args))


def _mbpp(row: Mapping[str, Any]) -> Row | None:
    code = row["code"].replace("\r\n", "\n").strip()
    return {
        "id": str(row["task_id"]),
        "prompt": f"### Task\n{row['text'].strip()}\n\n### Solution\n",
        "completion": code + "\n",
    }


TASK = Task(
    name="code",
    summary="write a documented Python function",
    builtin=builtin,
    hub=HubData("google-research-datasets/mbpp", {s: s for s in ("train", "validation", "test")}, _mbpp, name="full"),
    metrics={"edit_similarity": edit_similarity, "valid_function": valid_function},
    max_new_tokens=160,
)
