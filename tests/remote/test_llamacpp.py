"""llama.cpp's own server with the embedded base: 100 prompts over HTTP against the loop with the base in this process.

Needs the packages xllamacpp and gguf, which are no part of the project's environment.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from proxytune.decoding.engine import Engine
from proxytune.decoding.remote import RemoteEngine
from proxytune.files import resource
from proxytune.models.dialects import dialect
from proxytune.models.loading import load_tokenizer
from proxytune.models.probe import Abilities, probe
from proxytune.models.remote import RemoteBase
from proxytune.settings import Remote
from proxytune.steering.choice import Sampling
from tests.remote.embedded import BASE, SIZE, asked, holds, mixture
from tests.remote.tiny_gguf import convert, served

pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install xllamacpp gguf")
pytest.importorskip("gguf", reason="gguf is not installed: pip install xllamacpp gguf")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    path = convert(resource("data") / "tiny" / "base", tmp_path_factory.mktemp("gguf") / "base.gguf")
    with served(path) as address:
        yield address


def remote(url: str, top: int) -> RemoteBase:
    return RemoteBase(Remote(name="llamacpp", url=url, model="tiny", top=top, in_flight=8), dialect("llamacpp"))


# Shares of certified tokens at k = 20 of 2,048, each over a third of the prompts. Asking for more certifies the rest.
SHARES = {Sampling(): 0.95, Sampling(0.8): 0.3, Sampling(0.8, top_p=0.9): 0.4}


def test_of_20_scores_every_certified_token_is_the_local_loop_s(url):
    requests, mix = asked(100, tuple(SHARES)), mixture()
    tokenizer = load_tokenizer(BASE)
    local = dict(Engine(mix, tokenizer, batch_size=100).run(requests))
    engine = RemoteEngine(remote(url, 20), Abilities(20), mix.pairs, mix.vocabulary, tokenizer)
    found, certain = dict(engine.run(requests)), {choice: [] for choice in SHARES}
    holds([found[i] for i in range(100)], [local[i].token_ids for i in range(100)])
    for i, reply in found.items():
        certain[replace(requests[i].sampling, seed=0)] += reply.certified
    shares = {choice: sum(each) / len(each) for choice, each in certain.items()}
    print(", ".join(f"{choice.temperature:g}, {choice.top_p:g}: {share:.3f}" for choice, share in shares.items()))
    assert all(shares[choice] >= share for choice, share in SHARES.items()), shares


def test_asking_for_more_where_needed_gives_the_local_text(url):
    requests, mix = asked(24, (Sampling(0.8),)), mixture()
    tokenizer = load_tokenizer(BASE)
    local = dict(Engine(mix, tokenizer, batch_size=24).run(requests))
    engine = RemoteEngine(remote(url, 100), Abilities(SIZE), mix.pairs, mix.vocabulary, tokenizer)
    found = dict(engine.run(requests))
    assert {i: reply.text for i, reply in found.items()} == {i: reply.text for i, reply in local.items()}
    assert engine.counts.certified_share > 0.99  # two scores may lie closer than the tolerance


def test_the_probe_finds_what_llama_cpp_does(url):
    found = asyncio.run(probe(remote(url, 20), load_tokenizer(BASE), SIZE))
    seen = {test: (outcome, what) for test, outcome, what in found.rows()}
    assert found.abilities == Abilities(SIZE, longest=512)
    assert seen["tokenizer"][0] == "ok" and seen["bias"] == ("ok", "honoured; scores are taken before it")
    assert seen["temperature"] == seen["penalties"] == ("ok", "scores are taken before it")
    assert seen["prompt scores"][0] == seen["chosen ids"][0] == "no"
