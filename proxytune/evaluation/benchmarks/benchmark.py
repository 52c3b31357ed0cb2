"""What a benchmark is: its rows, how to ask, where to stop, what of an output counts, and how that is scored.

To add one, write a module beside this one that ends in `BENCHMARK = Benchmark(...)`, give it a line in `catalog.py`,
and copy a file of `conf/benchmark/` under its name. Nothing else knows the benchmarks by name.

Every measure is a ratio of two sums over rows (as in `evaluation/intervals.py`), so a row's contribution to it is a
pair (value, weight): an accuracy over parsed answers has weight 0 where nothing could be parsed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from proxytune import settings

Measures = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Prompt:
    """A question as each model is asked it.

    plain: what base and anti read (and an expert without a chat format). turns: what a chat expert reads in its chat
    format. opening: the words with which a chat expert's reply is already begun, such as "Answer:"; they are in `plain`
    too.
    """

    plain: str
    turns: tuple[Mapping[str, str], ...]
    opening: str = ""


@dataclass(frozen=True)
class Row:
    """One question. names: what else it may be called in a file of predictions; groups: `{"library": "Pandas"}`."""

    id: str
    prompt: Prompt
    reference: Any
    groups: Mapping[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decoding:
    """How the paper decodes this benchmark; temperature 0 is greedy. banned: texts whose tokens are never chosen."""

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    banned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What was judged of one output: scores in 0..1. parsed: an answer could be read in it (or a judgement of it)."""

    values: Mapping[str, float]
    parsed: bool = True


@dataclass(frozen=True)
class Rule:
    """Judged by comparison: `verdict(reference, output)`."""

    verdict: Callable[[Any, str], Verdict]


@dataclass(frozen=True)
class Program:
    """Judged by running `compose(reference, output)`, maybe in parts: passed if it comes to its end. Bytes and seconds.

    preload: modules worth importing once for all programs, where the interpreter has them.
    """

    compose: Callable[[Any, str], str | tuple[str, ...]]
    cpu_seconds: int
    memory: int
    disk: int
    processes: int
    preload: tuple[str, ...] = ()


@dataclass(frozen=True)
class Classifier:
    """Judged by released models, run here: a value each. models: its name on the hub, by the value's name.

    asks: the text that a model reads, by (the value's name, question, output). positive: the answer that counts as 1,
    a label's index of a classifier, or the next word that a judge writes.
    """

    models: Mapping[str, str]
    asks: Callable[[str, str, str], str]
    positive: int | str


@dataclass(frozen=True)
class Preference:
    """Judged by a language model behind an API that sees the output beside the reference's, in both orders."""

    model: str


@dataclass(frozen=True)
class Columns:
    """What released files call things. Of output, reference and id the first name that is there is taken.

    An id may be several columns. verdict: the columns, all of them, in which judgements made elsewhere are written.
    """

    output: tuple[str, ...]
    reference: tuple[str, ...] = ()
    id: tuple[str | tuple[str, ...], ...] = ("id",)
    verdict: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hub:
    """Where the public rows lie on the hub, under `datasets` names. file: one data file of a set without a loader."""

    path: str
    split: str
    name: str | None = None
    file: str | None = None


def all_rows(verdicts: Sequence[Verdict]) -> Measures:
    """The mean of each value over all outputs; what could not be parsed has its value too, usually 0."""
    names = {name for verdict in verdicts for name in verdict.values}
    return {name: (sum(v.values.get(name, 0.0) for v in verdicts), float(len(verdicts))) for name in sorted(names)}


def parsed_rows(verdicts: Sequence[Verdict]) -> Measures:
    """The mean of each value over the outputs that were parsed, or judged."""
    return all_rows([verdict for verdict in verdicts if verdict.parsed])


def no_groups(raw: Mapping[str, Any]) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Benchmark:
    """A named benchmark.

    row(raw, place, random): one public row made into ours; called in the rows' order, so that what is drawn for one is
    the same in every run of a seed. choose: which of the rows are asked, where not all are.
    trim: what of a raw output counts. judge: how an output is judged. recorded(values): the verdict that a file tells
    in `columns.verdict`. measure(verdicts of one row): its share in each measure; the first is the benchmark's own.
    reference, groups: as in a Row, read from a row of predictions instead. counts: whole numbers told besides.
    """

    name: str
    summary: str
    hub: Hub | None
    row: Callable[[Mapping[str, Any], int, random.Random], Row]
    decoding: Decoding
    trim: Callable[[str], str]
    judge: Rule | Program | Classifier | Preference
    columns: Columns
    measure: Callable[[Sequence[Verdict]], Measures] = all_rows
    reference: Callable[[Any], Any] = str
    groups: Callable[[Mapping[str, Any]], dict[str, str]] = no_groups
    recorded: Callable[[Sequence[Any]], Verdict] | None = None
    counts: Callable[[Sequence[Verdict]], dict[str, int]] | None = None
    choose: Callable[[list[Row], random.Random], list[Row]] | None = None


def decoding(benchmark: Benchmark, chosen: settings.Benchmark) -> Decoding:
    """How to decode: the benchmark's own way, with what the user overrides."""
    asked = {name: getattr(chosen, name) for name in ("max_new_tokens", "temperature", "top_p", "samples")}
    asked["stop"] = None if chosen.stop is None else tuple(chosen.stop)
    return replace(benchmark.decoding, **{name: value for name, value in asked.items() if value is not None})


def cut(output: str, stops: Sequence[str]) -> str:
    """The output before the first stop that stands in it."""
    places = [place for stop in stops if (place := output.find(stop)) >= 0]
    return output[: min(places)] if places else output


def user(text: str, system: str = "") -> tuple[Mapping[str, str], ...]:
    """A question as chat turns."""
    turn = {"role": "user", "content": text}
    return ({"role": "system", "content": system}, turn) if system else (turn,)
