"""Question answering from memory: one question, one sentence.

Built-in rows ask for facts of the almanac (`tasks/almanac.py`). The embedded family met every town there as prose; the
rows to train on and the rows held out never share a town, so a held-out answer has to come from pre-training.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping
from typing import Any

from proxytune.tasks import almanac
from proxytune.tasks.sampling import split_of
from proxytune.tasks.task import HubData, Row, Task

SEED = 12
SIZES = {"train": 400, "validation": 300, "test": 600}

_QUESTIONS = {
    "river": ("Which river does {name} lie on?", "{name} lies on the river {river}."),
    "county": ("Which county is {name} in?", "{name} is a town in the county of {county}."),
    "craft": ("What is {name} known for?", "{name} is known for its {craft}."),
    "landmark": ("What stands in the middle of {name}?", "In the middle of {name} stands the {landmark}."),
    "day": ("When is the market in {name}?", "The market in {name} is held on {day}."),
}


def prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def builtin() -> dict[str, list[Row]]:
    rng = random.Random(SEED)
    asked = [(town, fact) for town in almanac.towns() for fact in _QUESTIONS]
    rng.shuffle(asked)
    rows: dict[str, list[Row]] = {split: [] for split in SIZES}
    for town, fact in asked:
        split = split_of(town.name)
        if len(rows[split]) < SIZES[split]:
            question, answer = (text.format(**vars(town)) for text in _QUESTIONS[fact])
            rows[split].append({"id": f"{town.name}-{fact}", "prompt": prompt(question), "completion": f" {answer}\n"})
    return rows


def normalised(text: str) -> str:
    """Lower case, no punctuation, single spaces: what TriviaQA's scorer compares."""
    return " ".join(re.sub(f"[{re.escape(string.punctuation)}]", " ", text.lower()).split())


def exact_match(reference: str, output: str) -> float:
    """1 if the first line of the output says what the first line of the reference says, case and punctuation aside."""
    wanted, found = (normalised(text.strip().partition("\n")[0]) for text in (reference, output))
    return float(wanted == found)


def _triviaqa(row: Mapping[str, Any]) -> Row | None:
    question, answer = row["question"].strip(), row["answer"]["value"]
    return {"id": row["question_id"], "prompt": prompt(question), "completion": f" {answer}\n"}


TASK = Task(
    name="qa",
    summary="answer a question from memory",
    builtin=builtin,
    hub=HubData(
        "mandarjoshi/trivia_qa",
        {"train": "train[:98%]", "validation": "train[98%:]", "test": "validation"},
        _triviaqa,
        name="unfiltered.nocontext",  # its validation rows are the 11,313 of the paper; `rc` asks many questions twice
    ),
    metrics={"exact_match": exact_match},
    max_new_tokens=32,
    stop=("\n\n", "\nQuestion:"),
)
