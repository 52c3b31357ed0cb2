"""RealTimeQA (Kasai et al. 2023, arXiv 2207.13332): four choices a question, weekly JSONL files.

Liu et al. 2024 steer a model behind an API here, whose five best scores alone are known: questions of which no choice
is among them are dropped, and told as unparsed. The words of the question are those of TruthfulQA's multiple choice.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from proxytune.evaluation.benchmarks import truthfulqa_mc as mc
from proxytune.evaluation.benchmarks.benchmark import Benchmark, Columns, Decoding, Row, Rule, cut


def row(raw: Mapping[str, Any], place: int, rng: random.Random) -> Row:
    prompt = mc.asked(raw["question_sentence"].strip(), raw["choices"])
    return Row(str(raw.get("question_id", place)), prompt, reference(raw["answer"]), names=(raw["question_sentence"],))


def reference(answer: Any) -> str:
    """The right letter: the release gives a list with the choice's place as a text, `["1"]`."""
    if isinstance(answer, list):
        return mc.letter(int(answer[0]))
    return mc.letter(answer)


BENCHMARK = Benchmark(
    name="realtimeqa",
    summary="multiple choice on the week's news: accuracy over answered questions, and over all",
    hub=None,
    row=row,
    decoding=Decoding(1, mc.STOPS),
    trim=lambda output: cut(output, mc.STOPS),
    judge=Rule(mc.verdict),
    columns=Columns(
        ("output", "prediction", "text"), ("answer", "reference"), ("question_id", "id", "question_sentence")
    ),
    measure=mc.measure,
    reference=reference,
)
