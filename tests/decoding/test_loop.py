"""The loop against a reference that has no cache, no batch and no streams."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune.decoding.loop import Limits, Request, decode
from proxytune.decoding.mixture import Mixture, Term
from proxytune.decoding.scoring import Given, losses
from proxytune.errors import ModelError
from proxytune.models.local import LocalSource
from proxytune.models.vocabulary import Vocabulary
from proxytune.steering.choice import Choice
from tests.decoding.tiny_models import END, SIZE, ByteTokenizer, mixture, model

TOKENIZER = ByteTokenizer()
PROMPTS = st.fixed_dictionaries(
    {role: st.lists(st.integers(1, SIZE - 1), min_size=1, max_size=9) for role in ("base", "expert", "anti")}
)
REQUESTS = st.builds(
    lambda prompts, alpha, seed: Request(prompts, (alpha,), seed),
    PROMPTS,
    st.floats(-2, 2),
    st.integers(0, 1000),
)
CHOICES = st.builds(Choice, st.sampled_from([0.0, 0.5, 1.3]), st.sampled_from([0, 5]), st.sampled_from([1.0, 0.8]))


def reference(mix: Mixture, request: Request, choice: Choice, limits: Limits) -> list[int]:
    """One row, the whole sequence through every model again for each token."""
    emitted: list[int] = []
    while len(emitted) < limits.max_new_tokens:
        base, expert, anti = (
            term.source.model(torch.tensor([[*request.prompts[term.role], *emitted]])).logits[:, -1]
            for term in mix.terms()
        )
        steered = base + request.alphas[0] * (expert - anti)
        steered[:, list(mix.vocabulary.foreign)] = -torch.inf
        emitted += choice(steered, torch.tensor([request.seed]), torch.tensor([len(emitted)])).tolist()
        if emitted[-1] in limits.end_ids or any(stop in TOKENIZER.decode(emitted) for stop in limits.stop):
            break
    return emitted


@settings(max_examples=40)
@given(
    st.lists(REQUESTS, min_size=1, max_size=4), CHOICES, st.integers(1, 3), st.sampled_from([(), ("AB", "Z"), ("C",)])
)
def test_ragged_batches_with_unlike_prompts_give_the_reference_s_tokens(requests, choice, batch_size, stop):
    limits = Limits(8, frozenset({END, 7}), stop)
    found = dict(decode(mixture((5,)), requests, choice, limits, TOKENIZER, batch_size=batch_size))
    with torch.inference_mode():
        for i, request in enumerate(requests):
            assert found[i].token_ids == reference(mixture((5,)), request, choice, limits)


def run(requests, limits=None, choice=None, mix=None):
    found = decode(mix or mixture(), requests, choice or Choice(1.0), limits or Limits(10), TOKENIZER)
    return {i: reply for i, reply in found}


def test_the_same_seed_gives_the_same_text_whatever_shares_the_batch():
    mine = Request({"base": [3, 4], "expert": [9], "anti": [3, 4, 5]}, (0.7,), seed=5)
    others = [Request({"base": [i], "expert": [i, i], "anti": [i]}, (i / 9,), seed=i) for i in range(1, 9)]
    assert run([mine])[0].token_ids == run([*others, mine, *others])[8].token_ids


def test_alpha_zero_says_what_the_base_alone_says():
    prompts = {"base": [3, 4, 8], "expert": [9], "anti": [2]}
    alone = Mixture(mixture().base, Vocabulary(SIZE, ()))
    assert run([Request(prompts, (0.0,), 3)])[0].token_ids == run([Request(prompts, (), 3)], mix=alone)[0].token_ids


def test_a_base_that_is_the_anti_says_what_the_expert_says_at_alpha_one():
    expert, anti = (Term(LocalSource(model(seed)), role) for seed, role in ((2, "expert"), (3, "anti")))
    same = Mixture(Term(LocalSource(model(3)), "base"), Vocabulary(SIZE, ()), ((expert, anti),))
    prompts = {"base": [4, 4, 2], "expert": [7, 1], "anti": [4, 4, 2]}
    only = Mixture(expert, Vocabulary(SIZE, ()))
    assert (
        run([Request(prompts, (1.0,), 3)], mix=same)[0].token_ids
        == run([Request(prompts, (), 3)], mix=only)[0].token_ids
    )


def test_a_stop_string_that_spans_tokens_cuts_the_text_before_it():
    request = Request({"base": [3], "expert": [3], "anti": [3]}, (1.0,), 1)
    whole = run([request])[0]
    stop = whole.text[3:5]
    cut = run([request], Limits(10, stop=(stop,)))[0]
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert whole.finish_reason == "length"


def test_any_of_several_end_tokens_ends_a_reply_and_is_not_in_its_text():
    request = Request({"base": [3], "expert": [3], "anti": [3]}, (1.0,), 1)
    whole = run([request])[0]
    ended = run([request], Limits(10, frozenset({END, whole.token_ids[4]})))[0]
    first = whole.token_ids.index(whole.token_ids[4])
    assert ended.token_ids == whole.token_ids[: first + 1]
    assert ended.text == whole.text[:first]
    assert ended.finish_reason == "stop"


def test_foreign_ids_are_never_said():
    foreign = tuple(range(0, SIZE, 2))
    requests = [Request({"base": [i], "expert": [i], "anti": [i]}, (1.5,), i) for i in range(1, 20)]
    said = {token for reply in run(requests, mix=mixture(foreign)).values() for token in reply.token_ids}
    assert said and not said & set(foreign)


def test_nan_scores_stop_with_the_place_named():
    broken = model(1, 1)
    source = LocalSource(broken)
    source.cut = lambda logits: logits * float("nan")
    with pytest.raises(ModelError, match="NaN at output position 0 of prompt 0"):
        run([Request({"base": [1]})], mix=Mixture(Term(source, "base"), Vocabulary(SIZE, ())))


@settings(max_examples=40)
@given(
    st.lists(st.tuples(PROMPTS, st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=6)), min_size=1, max_size=5),
    st.lists(st.floats(-2, 2), min_size=1, max_size=4),
    st.integers(1, 3),
)
def test_losses_of_all_alphas_are_those_of_one_row_and_one_alpha_at_a_time(rows, alphas, batch_size):
    mix = mixture()
    given_rows = [Given(prompts, completion) for prompts, completion in rows]
    found = [row for batch in losses(mix, given_rows, [[a] for a in alphas], batch_size=batch_size) for row in batch]
    with torch.inference_mode():
        for i, (prompts, completion) in enumerate(rows):
            logits = [
                term.source.model(torch.tensor([[*prompts[term.role], *completion]])).logits[
                    0, len(prompts[term.role]) - 1 : -1
                ]
                for term in mix.terms()
            ]
            for j, alpha in enumerate(alphas):
                steered = (logits[0] + alpha * (logits[1] - logits[2])).log_softmax(-1)
                expected = -steered.gather(-1, torch.tensor(completion)[:, None]).sum()
                assert found[i][j] == pytest.approx(expected.item(), rel=1e-9)
