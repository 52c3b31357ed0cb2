"""A base pushed by a bias: of fewer tokens than a bias takes all are pushed, and the greedy text is the steered one."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from proxytune.decoding import pushed
from proxytune.decoding.remote import RemoteEngine
from proxytune.decoding.request import Limits
from proxytune.errors import ModelError
from proxytune.models.dialects import dialect
from proxytune.models.probe import Abilities
from proxytune.models.remote import RemoteBase
from proxytune.settings import Remote
from tests.decoding.test_remote import GREEDY, TEXTS, asked, local, mixture, run, serving
from tests.decoding.tiny_models import END, SIZE
from tests.remote import faults

# Those that no try can mend and that do not change scores, of which there are none; and texts that are none
LASTING = {kind: fault for kind, fault in faults.LASTING.items() if "score" not in kind and "probab" not in kind}
LASTING = {kind: fault for kind, fault in LASTING.items() if kind not in ("NaN", "Infinity", "minus Infinity")} | {
    "no choices": faults.edited(lambda reply: reply.update(choices=[])),
    "a number for a text": faults.edited(lambda reply: reply["choices"][0].update(text=7)),
    "no text at all": faults.edited(lambda reply: reply["choices"][0].update(text=None)),
    "lines for a count": faults.edited(lambda reply: reply["usage"].update(prompt_tokens="1\n2")),
}


class Letters:
    """A tokenizer whose ids have one text each."""

    eos_token_id = END

    def decode(self, ids, **_) -> str:
        return "".join(TEXTS[i] for i in ids)


def engine(server, mix) -> RemoteEngine:
    settings = Remote(name="openai", url=server.url, model="served", mode="bias", top=5)
    base = RemoteBase(settings, dialect("openai", TEXTS), first_pause=0.0)
    return RemoteEngine(base, Abilities(0), mix.pairs, mix.vocabulary, Letters())


def test_a_bias_on_every_token_says_the_steered_text_and_certifies_none_of_it(monkeypatch):
    monkeypatch.setattr(pushed.Pusher, "ids", {text: i for i, text in TEXTS.items()})
    mix, requests = mixture((7, 30)), asked(6, (GREEDY,), Limits(6, frozenset({END}), min_new_tokens=2))
    assert SIZE <= pushed.MOST
    with serving("openai", told=False) as server:
        remote = engine(server, mix)
        replies = run(remote, requests)
    assert [reply.token_ids for reply in replies] == local(mix, requests)
    assert all(reply.inexact and not any(reply.certified) for reply in replies)
    assert remote.counts.calls == remote.counts.tokens == len(server.asked)


def test_of_more_tokens_than_a_bias_takes_those_are_pushed_where_it_matters(monkeypatch):
    monkeypatch.setattr(pushed.Pusher, "ids", {text: i for i, text in TEXTS.items()})
    monkeypatch.setattr(pushed, "MOST", 10)
    requests = [replace(each, alphas=(1.0,)) for each in asked(3, (GREEDY,), Limits(4))]
    with serving("openai", told=False) as server:
        run(engine(server, mixture()), requests)
    assert {len(body["logit_bias"]) for body in server.asked} == {10}


def test_faults_that_pass_are_asked_again_and_the_same_is_said():
    async def say() -> None:
        async with remote.base:
            expected = await remote.pusher.said((3, 1, 4), {}, {"temperature": 0})
            for kind, fault in faults.PASSING.items():
                server.faults, before = [fault] * 6, len(server.asked)
                assert await remote.pusher.said((3, 1, 4), {}, {"temperature": 0}) == expected, kind
                assert len(server.asked) == before + 7, kind

    with serving("openai", told=False) as server:
        remote = engine(server, mixture())
        asyncio.run(say())


def test_faults_that_last_are_told_in_one_line_after_one_request():
    async def say() -> None:
        async with remote.base:
            for kind, fault in LASTING.items():
                server.faults, before = [fault], len(server.asked)
                with pytest.raises(ModelError) as error:
                    pytest.fail(f"{kind}: {await remote.pusher.said((3, 1, 4), {}, {'temperature': 0})} was said")
                assert "\n" not in str(error.value) and len(str(error.value)) < 400, kind
                assert len(server.asked) == before + 1, kind

    with serving("openai", told=False) as server:
        remote = engine(server, mixture())
        asyncio.run(say())
