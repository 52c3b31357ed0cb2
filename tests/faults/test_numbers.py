"""NaN, infinity and other numbers that a model may give: the row stops, and its place is named."""

from __future__ import annotations

import copy
import json
from itertools import product

import httpx2
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from proxytune.analysis.tokens import Said, records
from proxytune.decoding.engine import Engine
from proxytune.decoding.mixture import Mixture
from proxytune.decoding.processor import ProxyTuningLogitsProcessor
from proxytune.decoding.request import Limits, Request
from proxytune.decoding.scoring import Given, choices, losses
from proxytune.errors import DataError, ModelError, SettingsError, TrioError
from proxytune.models.local import LocalSource
from proxytune.models.source import Term
from proxytune.models.vocabulary import Vocabulary, shared
from proxytune.steering.choice import Sampling
from tests.decoding.test_engine import DRAFTERS, replies
from tests.decoding.tiny_models import SIZE, ByteTokenizer, mixture
from tests.serving.conftest import house, running  # noqa: F401

BROKEN = """
from transformers import LlamaForCausalLM
forward, calls = LlamaForCausalLM.forward, []
def broken(self, *args, **kwargs):
    found = forward(self, *args, **kwargs)
    if self.config.hidden_size == {width}:
        found.logits[..., -1, 40] = float("{number}")
    return found
LlamaForCausalLM.forward = broken
"""
BASE, SMALL = 32, 16


@pytest.mark.parametrize("stage", ["decode", "evaluate"])
@pytest.mark.parametrize(("width", "number"), [(BASE, "nan"), (BASE, "inf"), (SMALL, "nan"), (SMALL, "inf")])
def test_a_number_that_is_none_stops_with_its_place(place, stage, width, number):
    ended, _ = place.run(place.begin(stage), program=BROKEN.format(width=width, number=number))
    (last,) = ended.err.splitlines()[-1:]
    assert ended.code == 4 and "position" in last and "Traceback" not in ended.err, ended.err[-800:]
    measured = {path.name.split("-")[1] for path in (place.folder / "outputs" / "points").glob("*.jsonl")}
    assert measured <= ({"base"} if width == SMALL else set())


ROLES = ("base", "expert", "anti")
SAMPLINGS = [
    Sampling(),
    Sampling(1.0, top_p=0.9, seed=3),
    Sampling(0.7, top_k=5, min_p=0.05, repetition_penalty=1.3),
]


def broken(role: str, number: float, after: int = 0) -> Mixture:
    """The tiny trio, in which one model gives `number` for token 7 from its reading `after` + 1 on."""
    mix = mixture()
    terms = {term.role: term for term in mix.terms}
    source, cut, calls = copy.copy(terms[role].source), terms[role].source.cut, []

    def breaking(logits):
        calls.append(1)
        logits = cut(logits).clone()
        if len(calls) > after:
            logits[..., 7] = number
        return logits

    source.cut = breaking
    terms[role] = Term(source, role)
    return Mixture(terms["base"], mix.vocabulary, ((terms["expert"], terms["anti"]),))


def prompts(length: int = 2) -> dict[str, list[int]]:
    return {role: [1] * length for role in ROLES}


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "top-p", "all"])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_never_said_by_whatever_rule_and_drafter(role, number, sampling):
    """Nor does infinity of an anti ban a token in silence; -inf of it is +inf of what is steered."""
    numbers = [number, -number] if role == "anti" else [number]
    for drafter, number in product(DRAFTERS, numbers):
        with pytest.raises(ModelError, match="NaN or infinity at output position 0 of prompt 0"):
            request = Request(prompts(), Limits(5), (1.0,), sampling)
            replies([request], broken(role, number), drafter=drafter, draft_tokens=2)


def test_a_row_that_meets_one_ends_alone():
    """The rows beside it, at alpha 0 here, say what they say alone."""
    sound = [Request(prompts(n), Limits(6), (0.0,)) for n in (1, 2, 3)]
    engine, ended = Engine(broken("expert", float("nan"), after=4), ByteTokenizer(), batch_size=3), {}
    handles = [engine.submit(request) for request in (sound[0], Request(prompts(), Limits(6), (1.0,)), *sound[1:])]
    while engine.busy:
        ended |= {handle: reply for handle, reply in engine.step() if reply.finish_reason}
    failed = ended.pop(handles[1])
    assert failed.finish_reason == "error" and "NaN or infinity at output position" in str(failed.error)
    assert 1 <= len(failed.token_ids) < 6
    alone = replies(sound, mixture())
    assert [ended[handle].token_ids for handle in sorted(ended)] == [alone[i].token_ids for i in range(3)]


@pytest.mark.parametrize("role", ROLES)
def test_the_very_position_is_named(role):
    """The first reading of each model is its prompt's, the next are of one token each."""
    told = []
    for after in (2, 3):
        with pytest.raises(ModelError) as error:
            request = Request(prompts(), Limits(6), (1.0,))
            replies([request], broken(role, float("nan"), after), drafter="none", draft_tokens=0)
        told.append(int(str(error.value).split("position ")[1].split()[0]))
    assert told[1] == told[0] + 1 and 1 <= told[0] <= 3


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_of_numbers_that_are_none_is_refused_with_its_position(role, number):
    """-inf for a token that the reply has is no loss either; the others are one whatever the reply has."""
    mix, ids = broken(role, number), [3, 7, 2] if number == float("-inf") else [3, 4, 2]
    for score in (
        lambda: list(losses(mix, [Given(prompts(), ids)], [[1.0]])),
        lambda: choices(mix, prompts(), [ids], [[1.0]]),
    ):
        with pytest.raises(ModelError, match=r"at position [01] of a reply of 3 tokens"):
            score()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_whoever_reads_scores_refuses_them(role, number):
    """The analysis of tokens, and transformers' own loop."""
    mix, said = broken(role, number), Said("a", "x", prompts(), [3, 4, 2])
    with pytest.raises(ModelError, match="position 0 of a reply of 3 tokens"):
        list(records(mix, [said], [1.0], ByteTokenizer()))
    scores = mix.base.source.cut(mix.base.source.model(torch.ones(1, 2, dtype=torch.int64)).logits)[:, -1]
    with pytest.raises(ModelError, match="output position 0 of row 0"):
        ProxyTuningLogitsProcessor(mix)(torch.ones(1, 2, dtype=torch.int64), scores)


def test_an_alpha_of_zero_needs_no_sound_pair():
    sound = replies([Request(prompts(), Limits(5), (0.0,))], mixture())[0].token_ids
    assert replies([Request(prompts(), Limits(5), (0.0,))], broken("expert", float("nan")))[0].token_ids == sound


@pytest.mark.parametrize("empty", ROLES)
def test_a_prompt_without_tokens_is_refused_whichever_model_it_is_for(empty):
    given = prompts() | {empty: []}
    with pytest.raises(SettingsError, match="a prompt has no tokens"):
        replies([Request(given, Limits(3), (1.0,))], mixture())
    with pytest.raises(DataError, match="has no tokens"):
        list(losses(mixture(), [Given(given, [3])], [[1.0]]))
    with pytest.raises(DataError, match="has no tokens"):
        choices(mixture(), given, [[3]], [[1.0]])


@pytest.mark.parametrize("role", ROLES)
def test_a_token_that_only_a_tokenizer_knows_is_refused_in_a_prompt(role):
    """Some have special tokens beyond their model's embedding, which on a GPU would be the end of the process."""
    given, mix = prompts() | {role: [1, SIZE]}, mixture()
    for ask in (
        lambda: replies([Request(given, Limits(3), (1.0,))], mix),
        lambda: list(losses(mix, [Given(given, [3])], [[1.0]])),
        lambda: choices(mix, given, [[3]], [[1.0]]),
    ):
        with pytest.raises(DataError, match=f"id {SIZE}, and the {role}'s model knows ids below {SIZE}"):
            ask()


def test_a_reply_without_tokens_has_no_loss():
    with pytest.raises(DataError, match="has no tokens"):
        list(losses(mixture(), [Given(prompts(), [])], [[1.0]]))


def test_a_text_that_no_tokenizer_reads_anything_in_is_refused(tmp_path):
    from proxytune.models.prompts import encode
    from tests.models.tiny_family import tokenizer

    with pytest.raises(DataError, match="a prompt is empty"):
        encode("", tokenizer(), "plain")


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "top-p", "all"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_models_of_one_token_say_that_token(drafter, sampling):
    def source(seed: int) -> LocalSource:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=1, bos_token_id=None, eos_token_id=None, pad_token_id=None, **sizes)
        return LocalSource(LlamaForCausalLM(config).eval())

    base, expert, anti = (Term(source(seed), role) for seed, role in enumerate(ROLES))
    mix = Mixture(base, Vocabulary(1, ()), ((expert, anti),))
    given = {role: [0] for role in ROLES}
    found = replies([Request(given, Limits(4), (1.5,), sampling)], mix, drafter=drafter, draft_tokens=2)
    assert found[0].token_ids == [0] * 4
    assert list(losses(mix, [Given(given, [0, 0])], [[1.5]])) == [[[0.0]]]


def test_models_that_share_no_token_are_refused():
    words = {"base": ({f"b{i}": i for i in range(50)}, 50), "expert": ({f"e{i}": i for i in range(50)}, 50)}
    with pytest.raises(TrioError, match="50 of 50 ids differ"):
        shared(words)


def test_more_than_the_models_read_is_refused_or_ends_the_reply():
    short = copy.copy(mixture().base.source)
    short.text = type("Config", (), {"max_position_embeddings": 6, "vocab_size": SIZE})()
    mix = Mixture(Term(short, "base"), Vocabulary(SIZE, ()), mixture().pairs)
    assert len(replies([Request(prompts(4), Limits(9), (1.0,))], mix)[0].token_ids) == 2
    with pytest.raises(SettingsError, match="a prompt has 6 tokens and the models read 6"):
        replies([Request(prompts(6), Limits(9), (1.0,))], mix)
    with pytest.raises(DataError, match="a prompt and its reply have 9 tokens and the models read 6"):
        list(losses(mix, [Given(prompts(4), [1] * 5)], [[1.0]]))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_the_server_refuses_the_reply_and_answers_the_next(house, number):  # noqa: F811
    with running(house.settings()) as server:
        engine = server.app.state.loop.engines["base"]
        source = engine.rows.mixture.base.source
        cut, body = source.cut, {"model": "base", "prompt": "x", "max_tokens": 2}

        def breaking(logits):
            logits = cut(logits).clone()
            logits[..., 40] = number
            return logits

        source.cut = breaking
        answer = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 500 and "NaN or infinity at output position 0" in json.dumps(answer.json())
        source.cut = cut
        assert httpx2.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
