"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168), zero-shot as in Liu et al. 2024: an output's last number."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping
from typing import Any

from proxytune.evaluation.benchmarks.benchmark import (
    Benchmark,
    Columns,
    Decoding,
    Hub,
    Prompt,
    Row,
    Rule,
    Verdict,
    cut,
    user,
)
from proxytune.tasks.math import final_number

INSTRUCTION = "Answer the following question."
STOPS = (INSTRUCTION[:-1], "Question:", "Comment:")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def row(raw: Mapping[str, Any], place: int, rng: random.Random) -> Row:
    question = raw["question"].strip()
    asked = f"{INSTRUCTION}\n\nQuestion: {question}"
    prompt = Prompt(f"{asked}\nAnswer:", user(asked), "Answer:")
    return Row(f"test-{place}", prompt, reference(raw["answer"]), names=(str(place), raw["question"]))


def reference(answer: Any) -> str:
    """The number after `####`, or the whole text where there is no such mark; commas between digits removed."""
    text = str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)
    number = re.sub(r"(\d),(\d)", r"\1\2", text.split("####")[1] if "####" in text else text).strip()
    try:
        float(number.strip("$%"))
    except ValueError:
        raise ValueError(f"{number!r} is no number") from None
    return number


def verdict(reference: str, output: str) -> Verdict:
    """Exact match of the last number, case and punctuation ignored on both sides: "-5" is "5", and "18.0" is "180"."""
    found = final_number(output)
    told = output if found is None else found
    return Verdict({"exact_match": float(_plain(told) == _plain(reference))}, parsed=found is not None)


def _plain(text: str) -> str:
    return text.lower().translate(_PUNCTUATION)


BENCHMARK = Benchmark(
    name="gsm8k",
    summary="grade-school word problems: exact match of the final number",
    hub=Hub("openai/gsm8k", "test", "main"),
    row=row,
    decoding=Decoding(512, STOPS),
    trim=lambda output: cut(output, STOPS),
    judge=Rule(verdict),
    columns=Columns(("model_output", "output", "text"), ("answer", "reference"), ("id", "question")),
    reference=reference,
)
