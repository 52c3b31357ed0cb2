"""What replies tell of their tokens' probabilities, against whole forwards without a cache."""

from __future__ import annotations

import pytest
import torch

from proxytune.decoding.engine import Engine
from proxytune.decoding.mixture import Mixture
from proxytune.decoding.request import Limits, Request
from proxytune.steering.choice import Sampling
from tests.decoding.test_engine import plain
from tests.decoding.tiny_models import SIZE, ByteTokenizer, lora_mixture, mixture

PROMPTS = {"base": [3, 4], "expert": [9], "anti": [3, 4, 5]}
WAYS = [("none", 0), ("expert", 3), ("pair", 5), ("ngram", 2), ("expert", None)]


def asked(seed=1, alpha=0.7, count=9, logprobs=4, **limits) -> Request:
    return Request(PROMPTS, Limits(count, **limits), (alpha,), Sampling(1.0, seed=seed), logprobs=logprobs)


def replies(requests, mix=None, **how):
    return dict(Engine(mix or mixture(), ByteTokenizer(), **how).run(requests))


@pytest.mark.parametrize(("drafter", "draft"), WAYS)
@pytest.mark.parametrize("mix", [mixture((5,)), lora_mixture()], ids=["apart", "shared weights"])
@torch.inference_mode()
def test_each_token_has_the_log_probabilities_of_whole_forwards(mix, drafter, draft):
    requests = [asked(seed) for seed in range(3)]
    found = replies(requests, mix, batch_size=2, drafter=drafter, draft_tokens=draft)
    for i, request in enumerate(requests):
        reply = found[i]
        assert len(reply.logprobs) == len(reply.token_ids) == 9
        for place, told in enumerate(reply.logprobs):
            scores = {t: plain(t, [*request.prompts[t.role], *reply.token_ids[:place]]) for t in mix.terms}
            ((expert, anti),) = mix.pairs
            steered = mix.vocabulary.mask(scores[mix.base] + 0.7 * (scores[expert] - scores[anti])).log_softmax(-1)
            assert told.ids[0] == reply.token_ids[place]
            assert list(told.ids[2:]) == steered.topk(4).indices.tolist()
            assert torch.allclose(torch.tensor(told.steered).double(), steered[list(told.ids)], atol=1e-5)
            for term in mix.terms:
                alone = scores[term].log_softmax(-1)[list(told.ids)]
                assert torch.allclose(torch.tensor(told.alone[term.role]).double(), alone, atol=1e-5)


def test_asking_changes_no_token_of_any_row():
    plain = [asked(seed, logprobs=0) for seed in range(6)]
    mixed = [asked(seed, logprobs=seed % 3) for seed in range(6)]
    for drafter, draft in WAYS:
        how = {"batch_size": 4, "drafter": drafter, "draft_tokens": draft}
        before, after = replies(plain, **how), replies(mixed, **how)
        assert [before[i].token_ids for i in range(6)] == [after[i].token_ids for i in range(6)]
        assert [len(after[i].logprobs) for i in range(6)] == [0, 9, 9] * 2
        assert not any(reply.logprobs for reply in before.values())


def test_what_the_base_would_say_is_its_own_choice_under_the_same_noise():
    """At the first position that is the base's own first token; at alpha 0 it is what is said everywhere."""
    mix = mixture()
    alone = Mixture(mix.base, mix.vocabulary)
    for seed in range(8):
        steered = replies([asked(seed, alpha=3.0)], mix)[0]
        base = replies([Request(PROMPTS, Limits(9), (), Sampling(1.0, seed=seed))], alone)[0]
        assert steered.logprobs[0].ids[1] == base.token_ids[0]
        still = replies([asked(seed, alpha=0.0)], mix)[0]
        assert [told.ids[1] for told in still.logprobs] == still.token_ids == base.token_ids


@pytest.mark.parametrize(("drafter", "draft"), WAYS)
def test_a_reply_that_ends_inside_a_round_has_no_more_logprobs_than_tokens(drafter, draft):
    text = replies([asked()])[0].text
    for request in (asked(stop=(text[3:5],)), asked(end_ids=frozenset({ord(text[4]) - 64})), asked(count=2)):
        reply = replies([request], drafter=drafter, draft_tokens=draft)[0]
        assert len(reply.logprobs) == len(reply.token_ids) < 9
        assert [told.ids[0] for told in reply.logprobs] == reply.token_ids


def test_more_than_the_vocabulary_tells_the_whole_vocabulary():
    reply = replies([asked(logprobs=10 * SIZE, count=1)])[0]
    assert sorted(reply.logprobs[0].ids[2:]) == list(range(SIZE))
    assert sum(torch.tensor(reply.logprobs[0].steered[2:]).exp()) == pytest.approx(1, abs=1e-5)


def test_a_model_alone_tells_its_own():
    mix = mixture()
    reply = replies([Request(PROMPTS, Limits(3), logprobs=2)], Mixture(mix.pairs[0][0], mix.vocabulary))[0]
    for told in reply.logprobs:
        assert told.alone == {"expert": told.steered} and told.ids[0] == told.ids[1] == told.ids[2]
