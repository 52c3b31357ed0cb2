"""HumanEval (Chen et al. 2021, arXiv 2107.03374): a function completed from its head, right if its tests pass.

pass@k is the unbiased estimator of the paper's section 2.1: with c of n samples right, 1 - C(n-c, k) / C(n, k). Liu et
al. 2024 report pass@10 of 20 samples, with the texts "pass" and "..." banned.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from proxytune.evaluation.benchmarks.benchmark import (
    Benchmark,
    Columns,
    Decoding,
    Hub,
    Measures,
    Program,
    Prompt,
    Row,
    Verdict,
    cut,
    user,
)

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
BANNED = ("pass", "...")
KS = (1, 10, 100)
MEGABYTE = 1 << 20
OUTCOMES = {"true": 1.0, "passed": 1.0, "1": 1.0, "false": 0.0, "failed": 0.0, "timed out": 0.0, "0": 0.0}


def row(raw: Mapping[str, Any], place: int, rng: random.Random) -> Row:
    reference = {key: raw[key] for key in ("prompt", "test", "entry_point")}
    return Row(raw["task_id"], Prompt(raw["prompt"], user(raw["prompt"])), reference, names=(str(place),))


def clean(output: str) -> str:
    """The paper's cleaning: no lines that begin with assert or print, and nothing blank at the end."""
    kept = [line for line in output.split("\n") if not line.strip().startswith(("assert", "print"))]
    return "\n".join(kept).rstrip()


def compose(reference: Mapping[str, str], output: str) -> tuple[str, str]:
    """The release's program in two parts: head and completion; tests, and the call of the tests."""
    return f"{reference['prompt']}{output}\n\n", f"{reference['test']}\ncheck({reference['entry_point']})"


def estimate(n: int, c: int, k: int) -> float:
    """pass@k of one problem with c of n samples right; NaN with fewer than k samples."""
    if n < k:
        return math.nan
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def measure(verdicts: Sequence[Verdict]) -> Measures:
    """pass@1, pass@10, pass@100, as far as every problem has so many samples."""
    right = round(sum(verdict.values.get("passed", 0.0) for verdict in verdicts))
    return {f"pass@{k}": (estimate(len(verdicts), right, k), 1.0) for k in KS}


def recorded(values: Sequence[Any]) -> Verdict:
    """Of the release's `passed`, or its `result` ("passed", "timed out", "failed: why")."""
    told = str(values[0]).partition(":")[0].strip().lower().removesuffix(".0")
    if told not in OUTCOMES:
        raise ValueError(f"{values[0]!r} is no verdict")
    return Verdict({"passed": OUTCOMES[told]})


BENCHMARK = Benchmark(
    name="humaneval",
    summary="Python functions from their heads: pass@k by their tests",
    hub=Hub("openai/openai_humaneval", "test"),
    row=row,
    decoding=Decoding(512, STOPS, temperature=0.8, top_p=0.95, samples=20, banned=BANNED),
    trim=lambda output: clean(cut(output, STOPS)),
    judge=Program(compose, cpu_seconds=3, memory=1024 * MEGABYTE, disk=32 * MEGABYTE, processes=16),
    columns=Columns(("completion", "output", "text"), (), ("task_id", "id"), verdict=("passed",)),
    measure=measure,
    recorded=recorded,
)
