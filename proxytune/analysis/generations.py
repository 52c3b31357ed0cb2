"""The generations of a report: every system's reply to every prompt, and of the steered ones what each token was worth
to the three models. Made small, for they are the bulk of the page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BUDGET = 4_200_000  # characters of all rows: with these a page stays under 5 MB


@dataclass
class Generations:
    """What is asked and written, by row ids.

    systems: of each by its key the name that people read. texts and scores: by system, then id; a score is a metric's
    value by its name. tokens: records of analysis/tokens.py of the system `heated`. better: 1 where more of the metric
    is better, else -1.
    """

    systems: Mapping[str, str]
    questions: Mapping[str, tuple[str, str]]  # prompt, reference
    texts: Mapping[str, Mapping[str, str]]
    scores: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    tokens: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    heated: str = "steered"
    better: int = 1


def packed(generations: Generations, most: int, budget: int = BUDGET) -> tuple[dict[str, Any], int]:
    """The data that page/report.js reads, and how many of its rows tell of tokens.

    most: rows at most, the first ones. Where the budget is spent further rows come without their tokens, then not.
    """
    words: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    told, spent = 0, 0
    ids = list(dict.fromkeys(id for texts in generations.texts.values() for id in texts))
    for id in ids[:most]:
        row = _row(generations, id)
        size = len(json.dumps(row))
        if spent + size > budget:
            break
        spent += size
        record = generations.tokens.get(id)
        if record and record["ids"]:
            before = dict(words)
            numbers = [number for place in range(len(record["ids"])) for number in _token(record, place, words)]
            size = len(json.dumps(numbers)) + sum(len(word) + 3 for word in list(words)[len(before) :])
            if spent + size <= budget:
                row["tokens"], told, spent = numbers, told + 1, spent + size
            else:
                words = before
        rows.append(row)
    systems = [{"key": key, "name": name} for key, name in generations.systems.items() if generations.texts.get(key)]
    return {
        "systems": systems,
        "heated": generations.heated,
        "better": generations.better,
        "words": list(words),
        "rows": rows,
    }, told


def _row(generations: Generations, id: str) -> dict[str, Any]:
    prompt, reference = generations.questions.get(id, ("", ""))
    return {
        "id": id,
        "prompt": prompt,
        "reference": reference,
        "texts": {key: texts[id] for key, texts in generations.texts.items() if id in texts},
        "scores": {key: its[id] for key, its in generations.scores.items() if id in its},
    }


def _token(record: Mapping[str, Any], place: int, words: dict[str, int]) -> Sequence[int]:
    """Ten numbers of a token: its text; its probability by base, expert, anti and steered, in thousandths; its rank by
    base and steered; the text and probability of what the base likes best; whether that is not what steered likes."""

    def word(text: str) -> int:
        return words.setdefault(text, len(words))

    logprobs, ranks, top = record["logprobs"], record["ranks"], record["top"]
    liked = top["base"][place][0]
    return (
        word(record["pieces"][place]),
        *(thousandths(logprobs[role][place]) for role in ("base", "expert", "anti", "steered")),
        ranks["base"][place],
        ranks["steered"][place],
        word(record["words"][str(liked)]),
        thousandths(record["top_logprobs"]["base"][place][0]),
        int(liked != top["steered"][place][0]),
    )


def thousandths(logprob: float) -> int:
    return round(1000 * math.exp(logprob))
