"""Losses and standings with a base behind HTTP against the whole vocabulary's truth: what is told holds."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxytune.decoding import remote_scoring
from proxytune.decoding.mixture import Mixture
from proxytune.decoding.remote import small
from proxytune.decoding.remote_scoring import Weigher
from proxytune.decoding.scoring import Given, losses
from proxytune.decoding.served import Served
from proxytune.errors import ModelError
from proxytune.models.dialects import dialect
from proxytune.models.local import LocalSource
from proxytune.models.probe import Abilities, Probe
from proxytune.models.remote import BudgetSpent, RemoteBase
from proxytune.models.source import Term
from proxytune.models.vocabulary import Vocabulary
from proxytune.settings import Remote
from tests.decoding.test_engine import PROMPTS
from tests.decoding.tiny_models import SIZE, model, source
from tests.remote import faults
from tests.remote.server import MODEL, Server

TEXTS = {i: "same" if i in (8, 9) else f"<{i}>" for i in range(SIZE)}  # two ids that openai cannot tell apart
FOREIGN = (7, 30)
ERROR = 2e-4  # nats a token: scores may be off by 1e-4, and float32 adds them up


class Sharp(LocalSource):
    """A base whose scores are multiplied by `factor`: the larger, the less its unlikely tokens weigh together."""

    factor = 1.0

    def cut(self, logits):
        return super().cut(logits) * self.factor


BASE = Sharp(model(1, 3))
PAIRS = tuple((Term(source(2), "expert"), Term(source(n), "anti" if n == 3 else "anti2")) for n in (3, 4))


def mix(pairs: int) -> Mixture:
    return Mixture(Term(BASE, "base"), Vocabulary(SIZE, FOREIGN), PAIRS[:pairs])


@pytest.fixture(scope="module", params=["vllm", "sglang", "llamacpp", "openai"])
def server(request) -> Generator[Server]:
    scores = lambda ids: model(1, 3)(torch.tensor([ids])).logits[0] * BASE.factor  # noqa: E731
    with Server(request.param, scores, text=TEXTS.__getitem__) as found:
        yield found


def weigher(server: Server, pairs: int = 1, top: int = SIZE, first: int = 20, chosen: int = 0, **settings) -> Weigher:
    """top: the most scores that the server gives; first: how many are asked for at the start."""
    inside = server.dialect in ("vllm", "sglang")
    remote = Remote(name=server.dialect, url=server.url, model=MODEL, top=min(first, top), **settings)
    base = RemoteBase(remote, dialect(server.dialect, TEXTS), first_pause=0.0)
    probe = Probe((), Abilities(top, chosen, inside, server.dialect == "sglang"), MODEL)
    return Weigher(Served(base, probe), small(mix(pairs).pairs, mix(pairs).vocabulary))


KNOWN = [i for i in range(SIZE) if i not in FOREIGN]
REPLIES = st.lists(st.sampled_from(KNOWN), min_size=1, max_size=4)
ALPHAS = st.lists(st.floats(-2, 2), min_size=2, max_size=2)
PROMPTS_OF_TWO = PROMPTS.map(lambda prompts: {**prompts, "anti2": prompts["anti"]})


@given(
    st.lists(st.tuples(PROMPTS_OF_TWO, REPLIES), min_size=1, max_size=3),
    st.lists(ALPHAS, min_size=1, max_size=2),
    st.integers(1, 2),
    st.sampled_from([1.0, 4.0, 12.0]),
    st.integers(6, SIZE),
    st.sampled_from([1e-3, 0.05, 0.5]),
)
def test_a_loss_that_is_told_is_the_whole_vocabulary_s_within_the_tolerance(
    server, rows, alphas, pairs, factor, top, tolerance
):
    if server.dialect == "openai":
        top = 5
    BASE.factor, few = factor, [entry[:pairs] for entry in alphas]
    given_rows = [Given(prompts, reply) for prompts, reply in rows]
    ((*truth,),) = losses(mix(pairs), given_rows, few, batch_size=len(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_scoring, "FIRST", 5)  # so that lists that are not whole are tried too
        asked = len(server.asked)
        found = dict(weigher(server, pairs, top, tolerance=tolerance).losses(given_rows, few))
    assert sorted(found) == list(range(len(rows)))
    assert sum(weight.calls for weight in found.values()) <= len(server.asked) - asked
    for i, (_, reply) in enumerate(rows):
        if found[i].nats is not None:
            slack = len(reply) * (tolerance / 2 + ERROR)
            assert found[i].nats == [pytest.approx(nats, abs=slack) for nats in truth[i]]
        elif top == SIZE:
            pytest.fail("with every score at hand no loss is open")


@pytest.mark.parametrize(("rows", "batch"), [(None, 3), (2, 2), (9, 3)])
def test_no_more_rows_are_weighed_at_once_than_calls_may_be_in_flight(server, rows, batch):
    one = weigher(server, in_flight=3)
    assert Weigher(one.served, one.mixture, rows).batch == batch


@given(PROMPTS, st.lists(st.sampled_from(KNOWN), min_size=2, max_size=6, unique=True), ALPHAS, st.booleans())
def test_a_standing_that_is_certain_names_the_whole_vocabulary_s_best(server, prompts, options, alphas, by_id):
    BASE.factor, chosen = 4.0, 16 if by_id and server.dialect in ("vllm", "sglang") else 0
    top = 5 if server.dialect == "openai" else 12
    few = [entry[:1] for entry in (alphas, alphas[::-1])]
    truth = [losses(mix(1), [Given(prompts, [option])], few) for option in options]
    nats = torch.tensor([next(each)[0] for each in truth])  # (options, alphas)
    ((place, standings, calls),) = weigher(server, top=top, first=5, chosen=chosen).standings([prompts], [options], few)
    assert place == 0 and 1 <= calls <= 2
    for entry, standing in enumerate(standings):
        known = [i for i, each in enumerate(standing.nats) if each is not None]
        assert len(known) == len(options) or not chosen
        if standing.certain:
            assert nats[standing.nats.index(0.0), entry] <= nats[:, entry].min() + ERROR
        if known:
            best = nats[known, entry].min()
            expected = (nats[known, entry] - best).tolist()
            assert [standing.nats[i] for i in known] == pytest.approx(expected, abs=ERROR)


def test_where_lists_do_not_do_nothing_more_is_asked_once_that_is_seen():
    """The first row's loss stays open, so the second batch is told open without a call."""
    scores = lambda ids: model(1, 3)(torch.tensor([ids])).logits[0]  # noqa: E731
    rows = [Given({role: [4, 5 + n] for role in ("base", "expert", "anti")}, [6, 9]) for n in range(4)]
    BASE.factor = 1.0
    with Server("vllm", scores) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_scoring, "FIRST", 5)
        found = dict(weigher(server, top=8, in_flight=2).losses(rows, [(1.0,)]))
        assert [found[i].nats for i in range(4)] == [None] * 4
        assert len(server.asked) == 4  # two rows, with 5 scores and with 8
        assert not weigher(server, top=4).able
        server.asked.clear()
        assert dict(weigher(server, top=4).losses(rows, [(1.0,)]))[0].calls == 0 == len(server.asked)
        rough = weigher(server)
        assert rough.able
        rough.abilities = replace(rough.abilities, tolerance=0.3)  # its scores change when a prompt is cached
        assert not rough.able


@pytest.mark.parametrize("name", ["vllm", "llamacpp"])
def test_rows_that_were_weighed_are_told_before_a_fault_or_a_spent_budget(name):
    scores = lambda ids: model(1, 3)(torch.tensor([ids])).logits[0]  # noqa: E731
    rows = [Given({role: [4, 5 + n] for role in ("base", "expert", "anti")}, [6]) for n in range(4)]
    BASE.factor, found = 1.0, {}
    with Server(name, scores) as server:
        with pytest.raises(BudgetSpent):
            for i, weight in weigher(server, in_flight=1, max_requests=2).losses(rows, [(1.0,)]):
                found[i] = weight.nats
        server.faults = [faults.status(400)]
        with pytest.raises(ModelError, match="400"):
            for i, weight in weigher(server, in_flight=4).losses(rows, [(1.0,)]):
                found[10 + i] = weight.nats
    ((*truth,),) = losses(mix(1), rows, [(1.0,)])
    assert sorted(found)[:2] == [0, 1] and len(found) == 5
    assert all(nats == pytest.approx(truth[i % 10], abs=ERROR) for i, nats in found.items())


def test_a_foreign_id_has_no_weight():
    """What no model may say is taken out of the mass, and a reply that has it weighs infinitely much: not told."""
    scores = lambda ids: model(1, 3)(torch.tensor([ids])).logits[0]  # noqa: E731
    prompts = {role: [4, 5] for role in ("base", "expert", "anti")}
    BASE.factor = 1.0
    with Server("vllm", scores) as server:
        found = dict(weigher(server).losses([Given(prompts, [i]) for i in (*FOREIGN, 3)], [(0.5,)]))
        assert [found[i].nats is None for i in (0, 1)] == [True, True]
        mass = sum(float(torch.tensor(w.nats[0]).neg().exp()) for w in map(alone(server), KNOWN))
    assert mass == pytest.approx(1, abs=1e-3)


def alone(server: Server):
    prompts = {role: [4, 5] for role in ("base", "expert", "anti")}
    return lambda i: dict(weigher(server).losses([Given(prompts, [i])], [(0.5,)]))[0]
