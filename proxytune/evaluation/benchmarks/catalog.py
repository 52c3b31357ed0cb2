"""The benchmarks by name. A benchmark's module is imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module

from proxytune.errors import SettingsError, did_you_mean
from proxytune.evaluation.benchmarks.benchmark import Benchmark

BENCHMARKS = {
    "alpaca_farm": "proxytune.evaluation.benchmarks.alpaca_farm",
    "ds1000": "proxytune.evaluation.benchmarks.ds1000",
    "gsm8k": "proxytune.evaluation.benchmarks.gsm8k",
    "humaneval": "proxytune.evaluation.benchmarks.humaneval",
    "realtimeqa": "proxytune.evaluation.benchmarks.realtimeqa",
    "toxigen": "proxytune.evaluation.benchmarks.toxigen",
    "triviaqa": "proxytune.evaluation.benchmarks.triviaqa",
    "truthfulqa_mc": "proxytune.evaluation.benchmarks.truthfulqa_mc",
    "truthfulqa_open": "proxytune.evaluation.benchmarks.truthfulqa_open",
}
WEIGHED = ("heldout_loss", "mmlu", "truthfulqa_likelihood")  # those of `weighed.py`


def names() -> list[str]:
    return sorted(BENCHMARKS)


def get(name: str) -> Benchmark:
    """The benchmark of that name, which has outputs; SettingsError where there is none."""
    if name in WEIGHED:
        raise SettingsError(
            f"{name} goes by likelihoods and has no outputs", f"use proxytune evaluate benchmark={name}"
        )
    if name not in BENCHMARKS:
        raise SettingsError(f"there is no benchmark {name!r}", did_you_mean(name, BENCHMARKS))
    return import_module(BENCHMARKS[name]).BENCHMARK
