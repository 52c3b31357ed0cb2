"""DS-1000 (Lai et al. 2023, arXiv 2211.11501): snippets for seven data-science libraries, in completion mode, from the
public release's `ds1000.jsonl.gz`.

Each problem brings a context with its own tests; the libraries it was written for are older than today's (numpy 1.21,
pandas 1.3, ...). `benchmark.python` names an interpreter that has them: without it many right answers fail.

The paper's runs differ in two ways: no output may begin with the end of the solution, and code that models wrapped into
fences or tags counts as it stands (`outputs=trimmed` scores files in that way).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from proxytune.evaluation.benchmarks.benchmark import Benchmark, Columns, Decoding, Hub, Program, Prompt, Row, cut, user
from proxytune.evaluation.benchmarks.humaneval import BANNED, MEGABYTE, clean, measure, recorded

STOPS = ("\n</code>", "\n# SOLUTION END", "\nEND SOLUTION")


def row(raw: Mapping[str, Any], place: int, rng: random.Random) -> Row:
    about = raw["metadata"]
    library, number = str(about["library"]), str(about.get("problem_id", place))
    prompt = raw["prompt"] if raw["prompt"].endswith("\n") else raw["prompt"] + "\n"
    groups = {"library": library, "perturbation": str(about.get("perturbation_type", "Origin"))}
    named = (number, f"{library}/{about['library_problem_id']}") if "library_problem_id" in about else (number,)
    return Row(named[-1], Prompt(prompt, user(prompt)), raw["code_context"], groups, names=named)


def groups(raw: Mapping[str, Any]) -> dict[str, str]:
    library = raw.get("lib") or raw.get("library")
    return {"library": str(library)} if library else {}


def trim(output: str) -> str:
    """Up to the end of the solution, without the fences and tags in which models like to put it."""
    code = output.split("</code>")[0].replace("```python", "").split("```")[0]
    return clean(cut(code, STOPS).replace("<code>", ""))


def compose(reference: str, output: str) -> str:
    """The test program as the release composes it: the context runs the snippet, and looks into it where it can."""
    looks = "test_string(code)\n" if "test_string(" in reference else "\n"
    return f"{reference}\ncode = {output!r}\ntest_execution(code)\n{looks}"


BENCHMARK = Benchmark(
    name="ds1000",
    summary="data-science snippets by library: pass@k by their tests",
    hub=Hub("xlangai/DS-1000", "test"),
    row=row,
    decoding=Decoding(512, STOPS, temperature=0.8, top_p=0.95, samples=20, banned=BANNED),
    trim=trim,
    judge=Program(
        compose,
        cpu_seconds=120,
        memory=8192 * MEGABYTE,
        disk=256 * MEGABYTE,
        processes=128,
        preload=("numpy", "pandas", "scipy", "matplotlib"),
    ),
    columns=Columns(("output", "completion", "code", "text"), (), (("lib", "problem_id"), "id"), verdict=("passed",)),
    measure=measure,
    groups=groups,
    recorded=recorded,
)
