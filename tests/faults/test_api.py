"""A base behind an API whose server fails now and then: the same tokens, for few more requests."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
import torch

from proxytune.decoding.remote import CertifiedReply, RemoteEngine
from proxytune.decoding.request import Limits
from proxytune.models.dialects import dialect
from proxytune.models.probe import Abilities
from proxytune.models.remote import RemoteBase
from proxytune.models.replies import Query
from proxytune.settings import Remote
from tests.decoding.test_remote import TEXTS, asked, serving
from tests.decoding.tiny_models import END, ByteTokenizer, mixture, model
from tests.remote import faults
from tests.remote.server import MODEL, Fault, Server

NAMES = ("vllm", "sglang", "llamacpp", "openai")
SHORT, LONG = 25, 200  # generations
IDS, TOP = (3, 1, 4, 1, 5), 5


def unlucky(share: float, seed: int) -> Callable[[], Fault | None]:
    """One of the faults that pass, for so many of all requests. How many fail of so many depends on the seed alone."""
    draw, kinds = random.Random(seed), random.Random(seed + 1)
    return lambda: kinds.choice([*faults.PASSING.values()]) if draw.random() < share else None


def client(server: Server, **changes) -> RemoteBase:
    settings = {"name": server.dialect, "url": server.url, "model": MODEL, "top": TOP, "draft_tokens": 2, **changes}
    return RemoteBase(Remote(**settings), dialect(server.dialect, TEXTS), first_pause=0.0)


def written(server: Server, generations: int) -> tuple[list[CertifiedReply], RemoteEngine]:
    inside = server.dialect in ("vllm", "sglang")
    abilities = Abilities(TOP, 16 if inside else 0, inside, server.dialect == "sglang")
    mix = mixture()
    engine = RemoteEngine(client(server), abilities, mix.pairs, mix.vocabulary, ByteTokenizer())
    found = dict(engine.run(asked(generations, limits=Limits(6, frozenset({END})))))
    return [found[i] for i in range(generations)], engine


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("generations", "most"), [(SHORT, 1.25), pytest.param(LONG, 1.15, marks=pytest.mark.crash)])
def test_where_one_request_in_ten_fails_every_token_is_the_same_for_a_ninth_more_requests(
    name, generations, most, record_property
):
    """A ninth is what is to be expected; `most` of the requests without faults leaves room for chance."""
    with serving(name) as server:
        calm, _ = written(server, generations)
        needed = len(server.asked)
        server.luck = unlucky(0.1, seed=7)
        stormy, engine = written(server, generations)
        sent = len(server.asked) - needed
    assert [(r.token_ids, r.certified, r.calls) for r in stormy] == [(r.token_ids, r.certified, r.calls) for r in calm]
    assert sent == needed + engine.base.spent.retries and needed < sent <= most * needed, (needed, sent)
    for what, value in (("requests", needed), ("sent", sent), ("ratio", round(sent / needed, 3))):
        record_property(what, value)


@pytest.mark.crash
@pytest.mark.parametrize("kind", faults.SLOW)
@pytest.mark.parametrize("name", NAMES)
def test_a_server_that_takes_too_long_is_asked_again_up_to_six_times_in_a_row(name, kind):
    """Faults of the other kinds, six in a row, are in tests/models/test_remote.py: they take no time."""

    async def run() -> None:
        async with client(server, timeout_seconds=faults.PATIENCE) as base:
            for row in range(1, 7):
                server.faults, before = [faults.SLOW[kind]] * row, len(server.asked)
                (told,) = await base.ask(Query(IDS, TOP))
                assert told.ids == expected and len(server.asked) == before + row + 1, row

    with torch.inference_mode():
        expected = model(1, 3)(torch.tensor([IDS])).logits[0, -1].topk(TOP).indices.tolist()
    with serving(name) as server:
        asyncio.run(run())
