"""The engine against a reference that has no cache, no batch, no drafts and no streams."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune.decoding.engine import Engine
from proxytune.decoding.mixture import Mixture
from proxytune.decoding.request import Limits, Request
from proxytune.errors import ModelError, SettingsError
from proxytune.models.local import LocalSource
from proxytune.models.members import ACTIVE
from proxytune.models.source import Term
from proxytune.models.vocabulary import Vocabulary
from proxytune.steering.choice import Sampling, gumbel
from proxytune.steering.variants import EQUATION, Variant
from tests.decoding.tiny_models import END, SIZE, ByteTokenizer, lora_mixture, mixture, model, source

TOKENIZER = ByteTokenizer()
DRAFTERS = ("none", "expert", "pair", "ngram")
PROMPTS = st.fixed_dictionaries(
    {role: st.lists(st.integers(1, SIZE - 1), min_size=1, max_size=9) for role in ("base", "expert", "anti")}
)
SAMPLINGS = st.builds(
    Sampling,
    st.sampled_from([0.0, 0.5, 1.3]),
    st.sampled_from([0, 5]),
    st.sampled_from([1.0, 0.8]),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([1.0, 1.3]),
    st.integers(0, 1000),
)
LIMITS = st.builds(
    Limits,
    st.integers(1, 10),
    st.sampled_from([frozenset(), frozenset({END, 7})]),
    st.sampled_from([(), ("AB", "Z"), ("C",)]),
    st.sampled_from([0, 3]),
    st.sampled_from([frozenset(), frozenset(range(20, 50))]),
)
VARIANTS = st.sampled_from(
    [EQUATION, EQUATION, Variant(0.7), Variant(alpha_by="position", alpha_steps=3), Variant(0.9, "confidence")]
)
REQUESTS = st.builds(Request, PROMPTS, LIMITS, st.tuples(st.floats(-2, 2)), SAMPLINGS, VARIANTS)


def reference(mix: Mixture, request: Request) -> list[int]:
    """The method word for word: one row, whole sequences through whole models, one token at a time."""
    limits, sampling, said = request.limits, request.sampling, []
    while len(said) < limits.max_new_tokens:
        score = {term: plain(term, [*request.prompts[term.role], *said]) for term in mix.terms}
        base = score[mix.base].double()
        share = {
            "position": 1 - len(said) / request.variant.alpha_steps,
            "confidence": 1 - float(base.softmax(-1).max()),
        }
        steered = score[mix.base] + max(0.0, share.get(request.variant.alpha_by, 1.0)) * sum(
            alpha * (score[expert] - score[anti])
            for alpha, (expert, anti) in zip(request.alphas, mix.pairs, strict=True)
        )
        early = limits.end_ids if len(said) < limits.min_new_tokens else ()
        forbidden = [*mix.vocabulary.foreign, *limits.banned, *early]
        steered[forbidden] = base[forbidden] = -torch.inf
        likeliest = base.argsort(descending=True)
        before = base.softmax(-1)[likeliest].cumsum(-1) - base.softmax(-1)[likeliest]
        steered[likeliest[(before >= request.variant.base_top_p) & (request.variant.base_top_p < 1)]] = -torch.inf
        for i in {*request.prompts[mix.base.role], *said}:
            steered[i] *= sampling.repetition_penalty ** (-1 if steered[i] > 0 else 1)
        if sampling.temperature:
            steered /= sampling.temperature
            if sampling.top_k:
                steered[steered < steered.sort().values[-sampling.top_k]] = -torch.inf
            order = steered.argsort(descending=True)
            shares = steered.softmax(-1)[order]
            steered[order[(shares.cumsum(-1) - shares >= sampling.top_p) & (sampling.top_p < 1)]] = -torch.inf
            steered[steered.softmax(-1) < sampling.min_p * steered.softmax(-1).max()] = -torch.inf
            steered += gumbel(torch.tensor([sampling.seed]), torch.tensor([len(said)]), SIZE)[0]
        said.append(int(steered.argmax()))
        ends = len(said) > limits.min_new_tokens
        if ends and (said[-1] in limits.end_ids or any(stop in TOKENIZER.decode(said) for stop in limits.stop)):
            break
    return said


def plain(term: Term, ids: list[int]) -> torch.Tensor:
    """The last scores of one member of a source in a forward without a cache."""
    ACTIVE.set((term.member,))
    return term.source.model(torch.tensor([ids]), use_cache=False).logits[0, -1].clone()


def replies(requests, mix=None, **how):
    return dict(Engine(mix or mixture(), TOKENIZER, **how).run(requests))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(deadline=None)
@given(
    st.lists(REQUESTS, min_size=1, max_size=5),
    st.integers(1, 4),
    st.sampled_from(DRAFTERS),
    st.sampled_from([None, *range(8)]),
    st.sampled_from([3, 10, 1000]),
)
def test_every_way_of_decoding_gives_the_reference_s_tokens(dtype, requests, batch_size, drafter, draft, prefill):
    mix = mixture((5,), dtype)
    how = {"batch_size": batch_size, "drafter": drafter, "draft_tokens": draft, "prefill_tokens": prefill}
    found = replies(requests, mix, **how)
    with torch.inference_mode():
        for i, request in enumerate(requests):
            assert found[i].token_ids == reference(mix, request)


@settings(deadline=None)
@given(st.lists(REQUESTS, min_size=1, max_size=4), st.sampled_from(DRAFTERS), st.sampled_from([None, 0, 1, 4]))
def test_an_expert_that_shares_its_anti_s_weights_gives_the_reference_s_tokens(requests, drafter, draft):
    mix = lora_mixture()
    found = replies(requests, mix, batch_size=3, drafter=drafter, draft_tokens=draft)
    with torch.inference_mode():
        for i, request in enumerate(requests):
            assert found[i].token_ids == reference(mix, request)


@settings(deadline=None)
@given(
    PROMPTS,
    st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=3),
    st.sampled_from(DRAFTERS),
    st.sampled_from([0, 3]),
)
def test_two_experts_of_one_anti_steer_together(prompts, alphas, drafter, draft):
    mix = lora_mixture(experts=2)
    prompts = prompts | {"expert2": prompts["expert"][::-1]}
    requests = [Request(prompts, Limits(6), pair, Sampling(1.0)) for pair in alphas]
    found = replies(requests, mix, drafter=drafter, draft_tokens=draft)
    assert len(mix.groups) == 2 and len(mix.terms) == 4  # the base; the anti with both experts
    with torch.inference_mode():
        for i, request in enumerate(requests):
            assert found[i].token_ids == reference(mix, request)


def plainly(alpha=1.0, seed=1, count=10, **limits) -> Request:
    return Request(
        {"base": [3], "expert": [3], "anti": [3]}, Limits(count, **limits), (alpha,), Sampling(1.0, seed=seed)
    )


def test_the_same_seed_gives_the_same_text_whatever_shares_the_batch():
    mine = Request({"base": [3, 4], "expert": [9], "anti": [3, 4, 5]}, Limits(10), (0.7,), Sampling(1.0, seed=5))
    others = [
        Request({"base": [i], "expert": [i, i], "anti": [i]}, Limits(i), (i / 9,), Sampling(1.0, seed=i))
        for i in range(1, 9)
    ]
    alone = replies([mine])[0].token_ids
    for drafter, draft in (("none", 0), ("expert", 3), ("pair", 5), ("ngram", 2)):
        crowd = replies([*others, mine, *others], batch_size=4, drafter=drafter, draft_tokens=draft)
        assert crowd[8].token_ids == alone


def test_alpha_zero_says_what_the_base_alone_says_with_scores_equal_bit_for_bit():
    prompts = {"base": [3, 4, 8], "expert": [9], "anti": [2]}
    mix = mixture(dtype=torch.float32)
    alone = Mixture(mix.base, mix.vocabulary)
    said = [
        replies([Request(prompts, Limits(10), alphas, Sampling(1.0, seed=3))], each)[0].token_ids
        for each, alphas in ((mix, (0.0,)), (alone, ()))
    ]
    assert said[0] == said[1]
    scores = {term: torch.randn(2, 3, SIZE) for term in mix.terms}
    assert torch.equal(mix.combine(scores, [0.0]), scores[mix.base])


def test_a_base_that_is_the_anti_says_what_the_expert_says_at_alpha_one():
    base, expert, anti = (Term(source(seed), role) for seed, role in ((3, "base"), (2, "expert"), (3, "anti")))
    same = Mixture(base, Vocabulary(SIZE, ()), ((expert, anti),))
    prompts = {"base": [4, 4, 2], "expert": [7, 1], "anti": [4, 4, 2]}
    steered = Request(prompts, Limits(10), (1.0,), Sampling(1.0, seed=3))
    alone = Request(prompts, Limits(10), (), Sampling(1.0, seed=3))
    only = Mixture(expert, Vocabulary(SIZE, ()))
    assert replies([steered], same)[0].token_ids == replies([alone], only)[0].token_ids


def test_an_expert_that_is_the_anti_steers_nothing():
    base, expert, anti = (Term(source(seed), role) for seed, role in ((1, "base"), (2, "expert"), (2, "anti")))
    same = Mixture(base, Vocabulary(SIZE, ()), ((expert, anti),))
    prompts = {"base": [4], "expert": [7, 1], "anti": [7, 1]}
    steered = Request(prompts, Limits(10), (5.0,), Sampling(1.0, seed=3))
    alone = Request(prompts, Limits(10), (), Sampling(1.0, seed=3))
    assert replies([steered], same)[0].token_ids == replies([alone], Mixture(base, same.vocabulary))[0].token_ids


def test_a_stop_string_that_spans_tokens_cuts_the_text_before_it():
    whole = replies([plainly()])[0]
    stop = whole.text[3:5]
    for drafter in DRAFTERS:
        cut = replies([plainly(stop=(stop,))], drafter=drafter, draft_tokens=7)[0]
        assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert whole.finish_reason == "length"


def test_any_of_several_end_tokens_ends_a_reply_and_is_not_in_its_text():
    whole = replies([plainly()])[0]
    ended = replies([plainly(end_ids=frozenset({END, whole.token_ids[4]}))])[0]
    first = whole.token_ids.index(whole.token_ids[4])
    assert ended.token_ids == whole.token_ids[: first + 1]
    assert ended.text == whole.text[:first]
    assert ended.finish_reason == "stop"


def test_foreign_ids_are_never_said():
    foreign = tuple(range(0, SIZE, 2))
    requests = [plainly(1.5, seed) for seed in range(20)]
    found = replies(requests, mixture(foreign), drafter="expert", draft_tokens=3)
    said = {token for reply in found.values() for token in reply.token_ids}
    assert said and not said & set(foreign)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_ids_that_the_base_alone_has_are_never_drafted_from_its_prompt(penalty):
    nets = {role: copy.deepcopy(model(seed)) for seed, role in enumerate(("base", "expert", "anti"), 1)}
    for role in ("expert", "anti"):
        nets[role].resize_token_embeddings(SIZE - 10)
    base, *pair = (Term(LocalSource(net, SIZE - 10), role) for role, net in nets.items())
    mix = Mixture(base, Vocabulary(SIZE - 10, ()), (tuple(pair),))
    prompts = {"base": [3, SIZE - 1, SIZE - 1], "expert": [3], "anti": [3]}
    request = Request(prompts, Limits(6), (0.5,), Sampling(repetition_penalty=penalty))
    found = replies([request], mix, drafter="ngram", draft_tokens=3)
    assert found[0].token_ids == replies([request], mix)[0].token_ids


@torch.inference_mode()
@pytest.mark.parametrize("why", ["foreign", "banned", "an early end"])
def test_a_base_s_nucleus_of_what_may_not_be_said_is_what_it_likes_best_of_the_rest(why):
    prompts = {"base": [3, 4], "expert": [9], "anti": [3]}
    best, second = plain(mixture().base, prompts["base"]).topk(2).indices.tolist()
    mix = mixture((best,) if why == "foreign" else ())
    limits = {"banned": {"banned": frozenset([best])}, "an early end": {"end_ids": {best}, "min_new_tokens": 1}}
    request = Request(prompts, Limits(1, **limits.get(why, {})), (0.5,), variant=Variant(1e-6))
    assert replies([request], mix)[0].token_ids == reference(mix, request) == [second]


def test_nan_scores_stop_with_the_place_named():
    broken = LocalSource(model(1, 1))
    broken.cut = lambda logits: logits * float("nan")
    request = Request({"base": [1]}, Limits(3))
    with pytest.raises(ModelError, match="NaN or infinity at output position 0 of prompt 0"):
        replies([request], Mixture(Term(broken, "base"), Vocabulary(SIZE, ())))


def test_a_reply_ends_where_the_models_context_does_and_a_prompt_beyond_it_is_refused():
    short = LocalSource(model(1))
    short.text = type("Config", (), {"max_position_embeddings": 8, "vocab_size": SIZE})()
    mix = Mixture(Term(short, "base"), Vocabulary(SIZE, ()))
    reply = replies([Request({"base": [1] * 5}, Limits(50))], mix)[0]
    assert len(reply.token_ids) == 3 and reply.finish_reason == "length" and len(reply.text) == 3
    with pytest.raises(SettingsError, match="a prompt has 8 tokens and the models read 8"):
        replies([Request({"base": [1] * 8}, Limits(50))], mix)


def test_equal_prompts_are_read_once_for_all_alphas():
    mix = mixture()
    engine = Engine(mix, TOKENIZER)
    fills = []
    for stream in engine.rows.streams:
        stream.fill = lambda tokens, starts, first=0, fill=stream.fill: (
            fills.append(len(tokens)),
            fill(tokens, starts, first=first),
        )
    prompts = {"base": [3, 4, 8], "expert": [9, 9], "anti": [2, 2]}
    requests = [Request(prompts, Limits(8), (alpha / 5,), Sampling(1.0)) for alpha in range(11)]
    found = dict(engine.run(requests))
    assert fills == [1, 1, 1]
    for i, request in enumerate(requests):
        assert found[i].token_ids == replies([request])[0].token_ids


@pytest.mark.parametrize("mix", [mixture(), lora_mixture()], ids=["three models", "shared weights"])
def test_no_forward_reads_more_ids_of_prompts_than_the_budget(mix):
    engine, sizes = Engine(mix, TOKENIZER, prefill_tokens=8), []
    for stream in engine.rows.streams:
        stream.fill = lambda tokens, starts, first=0, fill=stream.fill: (
            sizes.append(tokens.numel()),
            fill(tokens, starts, first=first),
        )
    requests = [
        Request({"base": [3] * n, "expert": [9] * (1 + n // 2), "anti": [4]}, Limits(3), (0.5,)) for n in (1, 20, 4, 7)
    ]
    found = dict(engine.run(requests))
    assert max(sizes) == 8
    assert [found[i].token_ids for i in range(4)] == [replies([each], mix)[0].token_ids for each in requests]


def test_requests_that_come_while_others_are_written_are_answered_as_alone():
    engine = Engine(mixture(), TOKENIZER, batch_size=3, drafter="expert", draft_tokens=2)
    requests = [plainly(seed=seed, count=3 + seed) for seed in range(7)]
    found, waiting = {}, list(requests)
    while waiting or engine.busy:
        if waiting:
            engine.submit(waiting.pop(0))
        for handle, reply in engine.step():
            found[handle] = reply
    for handle, request in enumerate(requests):
        assert found[handle].token_ids == replies([request])[0].token_ids


def test_a_cancelled_reply_leaves_its_place_and_the_others_as_they_were():
    engine = Engine(mixture(), TOKENIZER, batch_size=2)
    handles = [engine.submit(plainly(seed=seed)) for seed in range(4)]
    first = dict(engine.step())
    engine.cancel(handles[0])
    engine.cancel(handles[3])  # still waiting
    found = {}
    while engine.busy:
        found |= dict(engine.step())
    assert set(found) == {handles[1], handles[2]} and first[handles[0]].finish_reason == "cancelled"
    for seed in (1, 2):
        assert found[handles[seed]].token_ids == replies([plainly(seed=seed)])[0].token_ids


def test_drafts_that_hold_are_counted():
    """A drafting expert that is the base itself holds always; a round then says all drafted tokens and one more."""
    base, expert, anti = (Term(source(1, 3), role) for role in ("base", "expert", "anti"))
    same = Mixture(base, Vocabulary(SIZE, ()), ((expert, anti),))
    engine = Engine(same, TOKENIZER, drafter="expert", draft_tokens=3)
    list(engine.run([plainly(count=16)]))
    assert engine.stats.acceptance == 1.0
    assert engine.stats.rounds == 4 and engine.stats.tokens_per_round == 4.0


def test_an_anti_that_shares_the_expert_s_weights_is_read_with_it_while_drafting():
    engine = Engine(lora_mixture(), TOKENIZER, drafter="expert", draft_tokens=3)
    list(engine.run([plainly(count=16)]))
    assert set(engine.stats.forwards) == {"base", "expert+anti"}
    assert engine.stats.forwards["base"] == engine.stats.rounds
