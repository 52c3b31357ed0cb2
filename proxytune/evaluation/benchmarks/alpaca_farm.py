"""AlpacaFarm's evaluation set (Dubois et al. 2023, arXiv 2305.14387): how often a judge prefers the output to that of
text-davinci-003, on 805 instructions. A draw counts half.

A preference is written as by alpaca_eval: 1 for the reference, 2 for the output, 1.5 or 0 for a draw, or any number
from 1 to 2. What is none of that was not judged, and is left out of the win rate, which is a share in 0..1 here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from proxytune.evaluation.benchmarks.benchmark import (
    Benchmark,
    Columns,
    Decoding,
    Hub,
    Preference,
    Prompt,
    Row,
    Verdict,
    cut,
    parsed_rows,
    user,
)

STOPS = ("\n\nComment:",)
DRAW = 1.5


def row(raw: Mapping[str, Any], place: int, rng: random.Random) -> Row:
    asked = raw["instruction"]
    groups = {"dataset": str(raw["dataset"])} if "dataset" in raw else {}
    return Row(str(place), Prompt(asked, user(asked)), reference(raw), groups, names=(asked,))


def reference(raw: Any) -> dict[str, str]:
    """The instruction and the reference's own output."""
    return {"instruction": str(raw["instruction"]), "output": str(raw["output"])}


def of_preference(preference: float) -> Verdict:
    """The verdict of a preference in 1..2."""
    won = (DRAW if preference == 0 else preference) - 1
    return Verdict({"win_rate": won}) if 0 <= won <= 1 else Verdict({}, parsed=False)


def recorded(values: Sequence[Any]) -> Verdict:
    return of_preference(float(values[0]))


def counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    won = [verdict.values["win_rate"] for verdict in verdicts if verdict.parsed]
    return {
        "n_wins": sum(value > 0.5 for value in won),
        "n_wins_base": sum(value < 0.5 for value in won),
        "n_draws": sum(value == 0.5 for value in won),
        "n_total": len(won),
    }


BENCHMARK = Benchmark(
    name="alpaca_farm",
    summary="open instructions: win rate against text-davinci-003, draws count half",
    hub=Hub("tatsu-lab/alpaca_eval", "train", file="alpaca_eval.json"),
    row=row,
    decoding=Decoding(2048, STOPS),
    trim=lambda output: cut(output, STOPS).strip(),
    judge=Preference("gpt-4-0314"),
    columns=Columns(("output_2", "output", "text"), (), ("id", "instruction"), verdict=("preference",)),
    measure=parsed_rows,
    groups=lambda raw: {"dataset": str(raw["dataset"])} if "dataset" in raw else {},
    recorded=recorded,
    counts=counts,
)
