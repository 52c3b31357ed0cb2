"""The loop with a base behind HTTP against the loop with the same base in this process."""

from __future__ import annotations

import asyncio
import copy
import time
from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from proxytune.decoding import remote
from proxytune.decoding.engine import Engine
from proxytune.decoding.mixture import Mixture
from proxytune.decoding.remote import CertifiedReply, RemoteEngine
from proxytune.decoding.request import Limits, Request
from proxytune.errors import ModelError, SettingsError
from proxytune.models.dialects import dialect
from proxytune.models.local import LocalSource
from proxytune.models.probe import Abilities
from proxytune.models.remote import BudgetSpent, RemoteBase
from proxytune.models.source import Term
from proxytune.models.vocabulary import Vocabulary
from proxytune.settings import Remote, load
from proxytune.steering.choice import Sampling
from proxytune.steering.variants import Variant
from tests.decoding.tiny_models import END, SIZE, ByteTokenizer, mixture, model
from tests.remote import faults
from tests.remote.embedded import holds
from tests.remote.server import MODEL, Server

TEXTS = {i: f"<{i}>" for i in range(SIZE)}
GREEDY, SAMPLED, HOT = Sampling(), Sampling(0.9), Sampling(1.4)
CHOICES = (GREEDY, SAMPLED, HOT, Sampling(1.1, top_k=30, top_p=0.9, min_p=0.01))


def serving(name: str, net=None, **abilities) -> Server:
    net = net or model(1, 3)
    known = cache(lambda ids: net(torch.tensor([ids])).logits[0])
    return Server(name, lambda ids: known(tuple(ids)), text=TEXTS.__getitem__, **abilities)


def engine(
    server: Server, mix: Mixture, top: int = 8, *, chosen: int = 0, most: int | None = None, drafts: int = 0, **more
):
    settings = {"name": server.dialect, "url": server.url, "model": MODEL, "top": top, "draft_tokens": drafts}
    batch = more.pop("batch_size", None)
    base = RemoteBase(load(Remote, {**settings, **more}), dialect(server.dialect, TEXTS), first_pause=0.0)
    abilities = Abilities(most or top, chosen, server.dialect in ("vllm", "sglang"), server.dialect == "sglang")
    return RemoteEngine(base, abilities, mix.pairs, mix.vocabulary, ByteTokenizer(), batch_size=batch)


def asked(count: int, choices: tuple[Sampling, ...] = CHOICES, limits: Limits | None = None) -> list[Request]:
    """Ragged prompts, unlike for each model, alphas of both signs, and ways to choose in turn."""
    draw = torch.Generator().manual_seed(count)
    requests = []
    for n in range(count):
        prompts = {
            role: torch.randint(1, SIZE, (1 + (n + place) % 7,), generator=draw).tolist()
            for place, role in enumerate(("base", "expert", "anti"))
        }
        sampling = replace(choices[n % len(choices)], seed=n)
        alpha = (-0.5, 0.0, 0.6, 1.0, 1.7)[n % 5]
        requests.append(Request(prompts, limits or Limits(9, frozenset({END})), (alpha,), sampling))
    return requests


def local(mix: Mixture, requests: list[Request]) -> list[list[int]]:
    found = dict(Engine(mix, ByteTokenizer()).run(requests))
    return [found[i].token_ids for i in range(len(requests))]


def run(remote: RemoteEngine, requests: list[Request]) -> list[CertifiedReply]:
    found = dict(remote.run(requests))
    return [found[i] for i in range(len(requests))]


@pytest.mark.parametrize("name", ["vllm", "sglang", "llamacpp", "openai"])
def test_a_certified_token_is_the_local_loop_s(name):
    mix, requests = mixture((7, 30)), asked(12)
    with serving(name) as server:
        remote = engine(server, mix, 5 if name == "openai" else 12)
        replies = run(remote, requests)
    holds(replies, local(mix, requests))
    assert 0 < remote.counts.certified < remote.counts.tokens  # so that the test sees both
    assert not {7, 30} & {token for reply in replies for token in reply.token_ids}


@pytest.mark.parametrize("name", ["vllm", "sglang", "llamacpp"])
def test_with_more_asked_for_where_needed_every_token_is_certified_and_the_text_is_the_local_one(name):
    mix, requests = mixture(), asked(12)
    chosen = {"vllm": 16, "sglang": 40, "llamacpp": 0}[name]
    with serving(name) as server:
        remote = engine(server, mix, 8, chosen=chosen, most=8 if name == "vllm" else SIZE, drafts=3)
        replies = run(remote, requests)
    assert [reply.token_ids for reply in replies] == local(mix, requests)
    assert remote.counts.certified_share == 1
    wanted = {"vllm": "logprob_token_ids", "sglang": "token_ids_logprob"}.get(name)
    assert not wanted or any(body.get(wanted) for body in server.asked)
    assert max(body.get("n_probs", 0) for body in server.asked) == (SIZE if name == "llamacpp" else 0)


@cache
def near(seed: int):
    """The anti's weights, shaken a little: an expert that was tuned from it, or a base that the pair foretells well."""
    net = copy.deepcopy(model(3))
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(torch.randn_like(weight) * 0.025 * weight.std())
    return net


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_a_draft_is_verified_in_one_call_and_changes_no_token(name):
    base, expert, anti = (
        Term(LocalSource(net), role) for net, role in ((near(1), "base"), (near(2), "expert"), (model(3), "anti"))
    )
    mix = Mixture(base, Vocabulary(SIZE, ()), ((expert, anti),))
    requests = [
        Request({role: [5 + n, 9, n] for role in ("base", "expert", "anti")}, Limits(24), (0.8,), Sampling(seed=n))
        for n in range(6)
    ]
    with serving(name, near(1)) as server:
        drafting = engine(server, mix, 20, chosen=40, drafts=6)
        replies, calls = run(drafting, requests), len(server.asked)
        plain = engine(server, mix, 20, chosen=40)
        assert [r.token_ids for r in run(plain, requests)] == [r.token_ids for r in replies] == local(mix, requests)
    counts = drafting.counts
    assert counts.acceptance >= 0.7 and counts.calls_per_token <= 0.4, counts
    assert counts.calls == calls == sum(reply.calls for reply in replies)
    assert plain.counts.calls_per_token >= 1


def test_rows_do_not_influence_each_other_and_waiting_ones_take_free_places():
    mix, requests = mixture(), asked(9)
    with serving("vllm") as server:
        wide, narrow = (run(engine(server, mix, batch_size=size, in_flight=4, drafts=2), requests) for size in (9, 2))
    assert [(r.token_ids, r.certified) for r in wide] == [(r.token_ids, r.certified) for r in narrow]


def test_vllm_is_never_asked_for_ids_while_it_is_asked_for_best_scores():
    """It would answer both with ids alone, where it answers them in one batch."""
    mix, requests = mixture(), asked(24, (SAMPLED, HOT), Limits(4))
    slow = lambda ids: (time.sleep(0.002), net(torch.tensor([ids])).logits[0])[1]  # noqa: E731
    net = model(1, 3)
    with Server("vllm", slow) as server:
        remote = engine(server, mix, 8, chosen=16, in_flight=12)
        replies = run(remote, requests)
        assert not server.mixed and any(body.get("logprob_token_ids") for body in server.asked)
    assert [reply.token_ids for reply in replies] == local(mix, requests)


def test_ids_asked_for_beside_the_best_scores_save_calls_and_change_no_token(monkeypatch):
    mix, requests = mixture(), asked(16, (SAMPLED, HOT))
    found = {}
    with serving("sglang") as server:
        for beside in (0, 16):
            monkeypatch.setattr(remote, "BESIDE", beside)
            asking = engine(server, mix, 12, chosen=400, drafts=3)
            found[beside] = [reply.token_ids for reply in run(asking, requests)], asking.counts.calls_per_token
            assert asking.counts.certified_share == 1
    assert found[0][0] == found[16][0] == local(mix, requests)
    assert found[16][1] < 0.8 * found[0][1], (found[0][1], found[16][1])


def test_alpha_zero_is_the_base_alone_and_all_of_it_is_certified():
    requests = [
        Request({role: [3 + n, 8] for role in ("base", "expert", "anti")}, Limits(10), (0.0,)) for n in range(4)
    ]
    with serving("llamacpp") as server:
        remote = engine(server, mixture(), 2)
        found = run(remote, requests)
    alone = Mixture(mixture().base, Vocabulary(SIZE, ()))
    asked_alone = [Request(r.prompts, r.limits, ()) for r in requests]
    assert [r.token_ids for r in found] == local(alone, asked_alone)
    assert remote.counts.certified_share == 1


def test_an_end_before_its_time_is_not_said_and_stop_strings_cut():
    mix = mixture()
    requests = asked(8, CHOICES, Limits(12, frozenset({END, 9, 20, 33}), ("A", "BC"), min_new_tokens=6))
    with serving("sglang") as server:
        found = run(engine(server, mix, 10, chosen=60, drafts=4), requests)
    expected = dict(Engine(mix, ByteTokenizer()).run(requests))
    assert [(r.token_ids, r.text, r.finish_reason) for r in found] == [
        (expected[i].token_ids, expected[i].text, expected[i].finish_reason) for i in range(8)
    ]


def test_banned_ids_are_not_said():
    mix = mixture()
    free = asked(4, (GREEDY, SAMPLED))
    said = {token for reply in local(mix, free) for token in reply[:2]} - {END}
    requests = [replace(request, limits=replace(request.limits, banned=frozenset(said))) for request in free]
    with serving("sglang") as server:
        replies = run(engine(server, mix, 10, chosen=60, drafts=2), requests)
    assert said and not said & {token for reply in replies for token in reply.token_ids}
    assert [reply.token_ids for reply in replies] == local(mix, requests)


def test_replies_end_with_the_small_models_context():
    requests = asked(4, (GREEDY,), Limits(9))
    with serving("vllm") as server:
        remote, here = engine(server, mixture(), 30, drafts=4), Engine(mixture(), ByteTokenizer())
        remote.longest = here.longest = 10
        found, expected = run(remote, requests), dict(here.run(requests))
        assert [(r.token_ids, r.text, r.finish_reason) for r in found] == [
            (expected[i].token_ids, expected[i].text, expected[i].finish_reason) for i in range(4)
        ]
        assert min(len(reply.token_ids) for reply in found) < 9
        with pytest.raises(SettingsError, match="shorten the prompt"):
            remote.submit(Request({role: [1] * 10 for role in ("base", "expert", "anti")}, Limits(3), (1.0,)))


def test_what_is_not_certified_fails_where_that_is_asked_for():
    requests = asked(4, (HOT,))
    with serving("vllm") as server, pytest.raises(ModelError, match="is not certified"):
        run(engine(server, mixture(), 2, require_certified=True), requests)


def test_a_spent_budget_keeps_what_is_finished():
    requests = asked(6, (GREEDY,), Limits(5))
    with serving("vllm") as server:
        remote, found = engine(server, mixture(), batch_size=2, max_requests=23), {}
        with pytest.raises(BudgetSpent, match="max_requests=23"):
            for i, reply in remote.run(requests):
                found[i] = reply
        assert len(server.asked) == 23
    assert sorted(found) == [0, 1, 2, 3] and all(len(reply.token_ids) == 5 for reply in found.values())


def test_a_reply_finished_in_the_round_of_another_s_fault_is_kept():
    long, short = (Request({r: [n, 4] for r in ("base", "expert", "anti")}, Limits(n), (1.0,)) for n in (9, 1))
    with serving("vllm") as server:
        remote, found = engine(server, mixture(), in_flight=1, batch_size=2), []
        server.faults = [faults.status(400)]
        with pytest.raises(ModelError, match="400"):
            for i, _ in remote.run([long, short]):
                found.append(i)
    assert found == [1]


def test_a_fault_of_one_reply_ends_it_alone():
    requests, found = asked(3, (GREEDY,)), {}
    with serving("vllm") as server:
        remote = engine(server, mixture(), batch_size=2)
        server.faults = [faults.status(400)]

        async def all_() -> None:
            for request in requests:
                remote.submit(request)
            async with remote.base:
                while remote.busy:
                    found.update(await remote.step())

        asyncio.run(all_())
        calm = run(engine(server, mixture()), requests)
    (failed,) = [i for i, reply in found.items() if reply.error]
    assert failed in (0, 1) and found[failed].finish_reason == "error" and "400" in str(found[failed].error)
    assert all(found[i].token_ids == calm[i].token_ids for i in range(3) if i != failed)


def test_faults_on_the_way_change_no_token():
    """Whichever row meets them: one that is quick may meet all."""
    mix, requests, passing = mixture(), asked(5), [*faults.PASSING.values()]
    with serving("llamacpp") as server:
        calm = run(engine(server, mix), requests)
        server.faults = passing.copy()
        remote = engine(server, mix, retries=len(passing))
        assert [r.token_ids for r in run(remote, requests)] == [r.token_ids for r in calm]
        assert remote.base.spent.retries == len(passing)


def test_a_run_that_is_left_early_closes_its_connections():
    with serving("vllm") as server:
        remote = engine(server, mixture(), batch_size=1)
        replies = remote.run(asked(3, (GREEDY,)))
        next(replies)
        replies.close()
        assert remote.base.client.is_closed


def test_the_stream_serves_callers_with_a_loop_of_their_own():
    async def collect():
        return {i: reply.token_ids async for i, reply in engine(server, mixture()).stream(requests)}

    requests = asked(3, (GREEDY,))
    with serving("vllm") as server:
        mine = asyncio.run(collect())
        assert mine == {i: r.token_ids for i, r in enumerate(run(engine(server, mixture()), requests))}


def breaking(term: Term, number: float, where=lambda scores: scores[..., 0].isfinite()) -> Term:
    """The term, giving `number` for token 7 at some positions."""
    source, cut = copy.copy(term.source), term.source.cut

    def broken(logits):
        scores = cut(logits).clone()
        scores[where(scores), 7] = number
        return scores

    source.cut = broken
    return Term(source, term.role)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_in_a_small_model_is_told_with_its_place(place, number):
    """One token's is enough, whichever way it would lead."""
    pair = list(mixture().pairs[0])
    pair[place] = breaking(pair[place], number)
    mix = Mixture(mixture().base, Vocabulary(SIZE, ()), (tuple(pair),))
    with serving("vllm") as server, pytest.raises(ModelError, match="NaN or infinity at output position 0"):
        run(engine(server, mix), [replace(asked(1, (GREEDY,))[0], alphas=(1.0,))])


def test_the_place_of_such_a_number_is_the_local_loop_s_however_many_were_drafted():
    base, expert, anti = (
        Term(LocalSource(net), role) for net, role in ((near(1), "base"), (near(2), "expert"), (model(3), "anti"))
    )
    request = Request({role: [5, 9, 1] for role in ("base", "expert", "anti")}, Limits(24), (0.8,))
    said = local(Mixture(base, Vocabulary(SIZE, ()), ((expert, anti),)), [request])[0]
    broken = breaking(expert, float("nan"), lambda scores: scores.argmax(-1) == said[5])
    mix, told = Mixture(base, Vocabulary(SIZE, ()), ((broken, anti),)), []
    with serving("vllm", near(1)) as server:
        for write in (
            lambda: local(mix, [request]),
            *(partial(run, engine(server, mix, 20, chosen=40, drafts=n), [request]) for n in (0, 6)),
        ):
            with pytest.raises(ModelError, match=r"output position [1-5] ") as error:
                write()
            told.append(str(error.value))
    assert len(set(told)) == 1


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request({"base": [1]}, Limits(3), (1.0,), Sampling(repetition_penalty=1.2)), "repetition_penalty"),
        (Request({"base": [1]}, Limits(3), ()), "alphas"),
        (Request({"base": [1]}, Limits(3), (1.0,), variant=Variant(base_top_p=0.9)), "base_top_p"),
        (Request({"base": [1]}, Limits(3), (1.0,), variant=Variant(alpha_by="position")), "alpha_by"),
        (Request({"base": [1]}, Limits(3), (1.0,), logprobs=2), "log-probabilities"),
    ],
)
def test_what_cannot_be_certified_is_refused(request_, said):
    with serving("vllm") as server, pytest.raises(SettingsError, match=said):
        engine(server, mixture()).submit(request_)
