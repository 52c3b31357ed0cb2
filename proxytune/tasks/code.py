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
    """Real functions; one in several splits, by body or prompt, is kept in the first of test, validation, train."""
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
    """1 if the output is Python and defines just the functions of the reference, by name and arguments.

    Other statements beside them are allowed only where the reference has some. A reference that is not Python asks for
    the same text.
    """
    wanted, found = _outline(reference), _outline(output)
    if wanted is None or found is None:
        return float(reference.strip() == output.strip())
    return float(wanted[0] == found[0] and (wanted[1] or not found[1]))


def _outline(source: str) -> tuple[list[str], bool] | None:
    """(names and arguments of the functions at top level, whether there is anything else), or None if not Python."""
    tree = stdlib.parse(source.strip())
    if tree is None:
        return None
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [f"{node.name} {ast.dump(node.args)}" for node in functions], len(functions) < len(tree.body)


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
    max_new_tokens=128,
)
