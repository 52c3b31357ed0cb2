"""How much of an evaluation's processor time the models' forwards take: GSM8K's questions, put to the embedded family.

    python -m tests.evaluation.forward_share ../shared/data/gsm8k/test.jsonl 500 128

The file, how many of its rows, tokens a reply at most. One thread; all is counted from when the models are loaded to
when the numbers stand. The expert is the small model with its weights shaken by 2%, so nothing has to be trained first.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from proxytune.decoding.mixture import Mixture
from proxytune.evaluation.benchmarks import catalog, rows
from proxytune.evaluation.benchmarks.report import summed
from proxytune.evaluation.benchmarks.written import Written
from proxytune.evaluation.system import System
from proxytune.models.linear import quicken
from proxytune.models.loading import load_model, load_tokenizer
from proxytune.models.local import LocalSource
from proxytune.models.prompts import Format
from proxytune.models.source import Term
from proxytune.settings import Benchmark, Decode, ModelRef
from proxytune.stages.shared.trio import whole_vocabulary

ROLES = ("base", "expert", "anti")
INSIDE = [0.0]  # seconds in forwards so far


def timed(model):
    forward = model.forward

    def counted(*given, **named):
        started = time.thread_time()
        found = forward(*given, **named)
        INSIDE[0] += time.thread_time() - started
        return found

    model.forward = counted
    return model


def shaken(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 0.02 * torch.randn_like(weight))
    return model


def mixtures(tokenizer) -> dict[str, Mixture]:
    base, expert, anti = (
        load_model(ModelRef(model=f"embedded:{name}"), "float32") for name in ("base", "small", "small")
    )
    vocabulary = whole_vocabulary(tokenizer, base)
    models = zip((base, shaken(expert), anti), ROLES, strict=True)
    terms = {role: Term(LocalSource(timed(quicken(model)), vocabulary.size), role) for model, role in models}
    return {
        "base": Mixture(terms["base"], vocabulary),
        "expert": Mixture(terms["expert"], vocabulary),
        "steered": Mixture(terms["base"], vocabulary, ((terms["expert"], terms["anti"]),)),
    }


def main(path: Path, count: int, tokens: int) -> None:
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(ModelRef(model="embedded:base"))
    formats: dict[str, Format] = dict.fromkeys(ROLES, "plain")
    own = (tokenizer, dict.fromkeys(ROLES, tokenizer), formats)
    systems = [
        System(name, mixture, *own, frozenset({tokenizer.eos_token_id}), tokenizer.eos_token_id)
        for name, mixture in mixtures(tokenizer).items()
    ]
    chosen = Benchmark(name="gsm8k", rows=path, max_new_tokens=tokens)
    whole = time.thread_time()
    work = Written(catalog.get("gsm8k"), chosen, rows.load(catalog.get("gsm8k"), path)[:count], Decode(), "float32")
    with tempfile.TemporaryDirectory() as folder:
        for system in systems:
            began, before = time.thread_time(), INSIDE[0]
            (records,) = work.compute(system, [(1.0,) * len(system.mixture.pairs)], [Path(folder) / system.name])
            scored = work.score(records, Path(folder) / "verdicts")
            summed(scored.measures, scored.groups)
            spent = time.thread_time() - began
            print(f"{system.name}: {spent:.1f} s, {(INSIDE[0] - before) / spent:.1%} in forwards", flush=True)
    whole = time.thread_time() - whole
    print(f"all: {whole:.1f} s, {INSIDE[0] / whole:.1%} in forwards")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
