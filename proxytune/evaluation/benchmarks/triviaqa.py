"""TriviaQA (Joshi et al. 2017, arXiv 1705.03551), closed book, on the 11,313 development questions.

Two rules are told. `accuracy` is Liu et al.'s: the output, stripped and lower-cased, is one of the aliases.
`exact_match` is the official evaluation's, which also ignores punctuation, articles and spacing.

The paper stops at the last token of a blank line, which for Llama's tokenizer is a line break: that is the stop here.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping, Sequence
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

STOPS = ("\n",)
# Quotes that are no ASCII punctuation count as such; an underscore is punctuation already.
_SPACED = {ord(mark): " " for mark in string.punctuation + "\u2018\u2019\u00b4`"}
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def row(raw: Mapping[str, Any], place: int, rng: random.Random) -> Row:
    """Of the hub's and the authors' rows, and of the official file's."""
    question = raw["question"] if "question" in raw else raw["Question"]
    name = str(raw.get("question_id") or raw.get("QuestionId") or place)
    answers = next(raw[key] for key in ("answers", "answer", "Answer") if key in raw)
    asked = f"Question: {question}"
    return Row(name, Prompt(f"{asked}\nAnswer:", user(asked), "Answer:"), reference(answers), names=(question,))


def reference(answers: Any) -> tuple[str, ...]:
    """All accepted answers: of a list, a single text, or an answer object of the hub's or the official file."""
    if isinstance(answers, str):
        return (answers,)
    if isinstance(answers, Mapping):
        keys = ("Value", "Aliases", "NormalizedAliases", "HumanAnswers", "value", "aliases", "normalized_aliases")
        parts = [answers[key] for key in keys if answers.get(key)]
        answers = [text for part in parts for text in ([part] if isinstance(part, str) else part)]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("there are no answers")
    return tuple(answers)


def verdict(reference: Sequence[str], output: str) -> Verdict:
    told = output.strip()
    plain = told.lower() in {answer.strip().lower() for answer in reference}
    normal = normalised(told) in {normalised(answer) for answer in reference}
    return Verdict({"accuracy": float(plain), "exact_match": float(normal)}, parsed=bool(told))


def normalised(text: str) -> str:
    """The official normalisation: lower case, punctuation to spaces, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_SPACED)).split())


BENCHMARK = Benchmark(
    name="triviaqa",
    summary="trivia from memory: the answer is one of the aliases",
    hub=Hub("mandarjoshi/trivia_qa", "validation", "unfiltered.nocontext"),
    row=row,
    decoding=Decoding(20, STOPS),
    trim=lambda output: cut(output, STOPS).strip(),
    judge=Rule(verdict),
    columns=Columns(
        ("output", "prediction", "text"),
        ("answers", "answer", "Answer", "reference"),
        ("question_id", "QuestionId", "id", "question"),
    ),
    reference=reference,
)
