"""The probe against servers that do what they say, that do less, and that lie."""

from __future__ import annotations

import asyncio

import pytest
import torch

from proxytune.errors import ModelError
from proxytune.models.dialects import dialect
from proxytune.models.loading import load_tokenizer
from proxytune.models.probe import Abilities, Probe, probe
from proxytune.models.remote import BudgetSpent, RemoteBase, Unreachable
from proxytune.settings import ModelRef, Remote, load
from tests.remote import faults
from tests.remote.server import MODEL, Server

TOKENIZER = load_tokenizer(ModelRef(model="embedded:small"))
SIZE, TOP = len(TOKENIZER), 20
TEXTS = {i: TOKENIZER.decode([i]) for i in range(SIZE)}
NAMES = ("vllm", "sglang", "llamacpp", "openai")


def logits(ids: list[int]) -> torch.Tensor:
    """(T, V) logits that depend on the last two ids."""
    draw = torch.Generator()
    rows = []
    for t, i in enumerate(ids):
        draw.manual_seed(i * 3000 + (ids[t - 1] if t else 2999))
        rows.append(torch.randn(SIZE, generator=draw) * 3)
    return torch.stack(rows)


def serving(name: str, model=logits, tokenizer=TOKENIZER, **abilities) -> Server:
    return Server(name, model, tokenizer, text=TEXTS.__getitem__, **abilities)


def examine(server: Server, **changes) -> Probe:
    top = 5 if server.dialect == "openai" else TOP
    settings = load(Remote, {"name": server.dialect, "url": server.url, "model": MODEL, "top": top, **changes})
    base = RemoteBase(settings, dialect(server.dialect, TEXTS), first_pause=0.0)
    return asyncio.run(probe(base, TOKENIZER, SIZE))


def outcome(found: Probe, test: str) -> tuple[str, str]:
    return next((what, seen) for name, what, seen in found.rows() if name == test)


EXPECTED = {
    "vllm": Abilities(SIZE, 128, True),
    "sglang": Abilities(SIZE, 1024, True, True),
    "llamacpp": Abilities(SIZE),
    "openai": Abilities(5),
}


@pytest.mark.parametrize("name", NAMES)
def test_an_honest_server_is_found_to_do_what_its_kind_does(name):
    with serving(name) as server:
        found = examine(server)
        assert len(server.asked) < 20
    assert found.abilities == EXPECTED[name]
    for test in ("model", "scores", "token ids", "rounding", "bias"):
        assert outcome(found, test)[0] == "ok"
    assert "before" in outcome(found, "temperature")[1]
    assert outcome(found, "tokenizer")[0] == ("open" if name == "openai" else "ok")
    assert all(isinstance(part, str) for row in found.rows() for part in row)


def test_a_server_that_does_less_is_asked_for_no_more():
    with serving("vllm", most_top=50, chosen=False, prompt_scores=False, tokenizer=None) as server:
        found = examine(server)
    assert found.abilities == Abilities(50)
    assert outcome(found, "chosen ids")[0] == outcome(found, "prompt scores")[0] == "no"
    assert outcome(found, "tokenizer") == ("open", "the server does not say")


@pytest.mark.parametrize(("name", "longest"), [("vllm", 4096), ("sglang", 4090), ("llamacpp", 4096), ("openai", None)])
def test_the_context_is_found_where_the_server_tells_of_it(name, longest):
    with serving(name, longest=4096) as server:
        found = examine(server)
    assert found.abilities.longest == longest
    assert outcome(found, "context")[0] == ("ok" if longest else "open")


@pytest.mark.parametrize("said", [True, "4096", -1, 0, 4096.0, [4096]])
def test_a_context_that_is_no_length_is_none(said):
    with serving("vllm", longest=said) as server:
        assert examine(server).abilities.longest is None


@pytest.mark.parametrize(
    ("name", "path"),
    [("vllm", "/v1/models"), ("sglang", "/get_model_info"), ("llamacpp", "/props"), ("vllm", "/tokenize")],
)
def test_an_outage_is_not_taken_for_what_a_server_cannot_do(name, path):
    with serving(name) as server:
        server.down.add(path)
        with pytest.raises(Unreachable, match="503: down, 7 times in a row"):
            examine(server)


@pytest.mark.parametrize("before", [0, 4, 8, 10])
def test_an_outage_in_the_midst_of_the_tests_shrinks_no_ability(before):
    with serving("vllm") as server:
        server.faults = [*[None] * before, *[faults.status(500)] * 7]
        with pytest.raises(Unreachable, match="7 times in a row"):
            examine(server)


def test_scores_after_temperature_are_told():
    with serving("sglang", after=True) as server:
        assert "after" in outcome(examine(server), "temperature")[1]


def test_rounded_scores_raise_the_tolerance():
    def lie(reply, body):
        faults.put(reply, [[token, round(score, 2)] for token, score in faults.pairs(reply)])
        return reply

    with serving("llamacpp") as server:
        server.lie = lie
        found = examine(server)
    assert found.abilities.tolerance == pytest.approx(0.005)
    assert "steps of 0.01" in outcome(found, "rounding")[1]


def test_scores_that_change_once_when_a_prompt_is_cached_raise_the_tolerance():
    """As those of a model of 4 bits a weight do, whose rows are multiplied in another way alone than many at once."""
    known = set()

    def lie(reply, body):
        if tuple(body["prompt"]) not in known:
            known.add(tuple(body["prompt"]))
            faults.put(reply, [[token, score * 1.04] for token, score in faults.pairs(reply)])
        return reply

    with serving("llamacpp") as server:
        server.lie = lie
        found = examine(server)
    assert 0.04 < found.abilities.tolerance < 1 and found.abilities.top == SIZE
    assert "nats off once a prompt is cached" in outcome(found, "rounding")[1]
    with serving("llamacpp") as server:
        assert found.likeness == examine(server).likeness[: len(found.likeness)]


def off_by_id(reply, body):
    """Scores of chosen ids are off by .015."""
    meta = reply["meta_info"]
    if body["token_ids_logprob"] and body["logprob_start_len"] == -1:
        meta["output_token_ids_logprobs"] = [[[e[0] - 0.015, *e[1:]] for e in meta["output_token_ids_logprobs"][0]]]
    return reply


def off_in_a_long_list(reply, body):
    if body["n_probs"] > TOP:
        faults.put(reply, [[token, score - 0.015] for token, score in faults.pairs(reply)])
    return reply


@pytest.mark.parametrize(("name", "lie"), [("sglang", off_by_id), ("llamacpp", off_in_a_long_list)])
def test_what_is_let_pass_in_any_list_of_scores_is_tolerated(name, lie):
    with serving(name) as server:
        server.lie = lie
        assert examine(server).abilities.tolerance == pytest.approx(0.03)


def add_bos(reply, body):
    reply["usage"]["prompt_tokens"] += 1
    return reply


def forgets_the_best(reply, body):
    """Leaves the second best out, unless many are asked for."""
    found = faults.pairs(reply)
    if len(found) <= TOP:
        faults.put(
            reply, [found[0], *found[2:], [next(i for i in range(SIZE) if i not in dict(found)), found[-1][1] - 1]]
        )
    return reply


def worse_chosen(reply, body):
    """Scores of chosen ids are another model's."""
    meta = reply["meta_info"]
    if "output_token_ids_logprobs" in meta:
        meta["output_token_ids_logprobs"] = [[[e[0] - 1.0, e[1], None] for e in meta["output_token_ids_logprobs"][0]]]
    return reply


def shifted_prompt_scores(reply, body):
    """Scores inside the prompt are one position late."""
    listed = reply["choices"][0]["prompt_logprobs"]
    if listed:
        before = [None, None, *listed[1:-1]]
        for t, entry in enumerate(before):
            if entry is not None:
                actual = str(body["prompt"][t])
                entry.setdefault(actual, {"logprob": -20.0, "rank": 999})
                keep = sorted(entry, key=lambda i: entry[i]["rank"])[: body["prompt_logprobs"]]
                before[t] = {i: entry[i] for i in {*keep, actual}}
        reply["choices"][0]["prompt_logprobs"] = before
    return reply


def unlike_each_time():
    count = 0

    def lie(reply, body):
        nonlocal count
        count += 1
        faults.put(reply, [[token, score - 0.1 * count] for token, score in faults.pairs(reply)])
        return reply

    return lie


def hot(reply, body):
    """Scores are divided by a temperature that is not 0."""
    if body["temperature"] == 1.0:
        faults.put(reply, [[token, score * 1.5] for token, score in faults.pairs(reply)])
    return reply


@pytest.mark.parametrize(
    ("name", "lie", "test"),
    [
        ("vllm", add_bos, "scores test: 19 ids were sent as the prompt, the server read 20"),
        ("llamacpp", forgets_the_best, "top scores test"),
        ("sglang", worse_chosen, "chosen ids test"),
        ("vllm", shifted_prompt_scores, "prompt scores test"),
        ("llamacpp", unlike_each_time(), "rounding test"),
        ("llamacpp", hot, "temperature test"),
    ],
)
def test_a_server_that_lies_is_refused_with_the_test_named(name, lie, test):
    with serving(name) as server:
        server.lie = lie
        with pytest.raises(ModelError, match=f"failed the {test}") as error:
            examine(server)
    assert "\n" not in str(error.value)


def test_a_server_that_reads_no_ids_is_refused():
    with (
        serving("vllm", lambda ids: logits(sorted(ids))) as server,
        pytest.raises(ModelError, match="the token ids test"),
    ):
        examine(server)


def test_a_server_that_writes_every_text_in_its_own_way_is_refused():
    with Server("openai", logits, text=lambda i: f"#{i}") as server, pytest.raises(ModelError, match="those of no id"):
        examine(server)


def test_a_server_with_another_tokenizer_is_refused():
    class Other:
        def __call__(self, text, add_special_tokens):
            ids = TOKENIZER(text, add_special_tokens=False)
            ids["input_ids"] = [i + (i > 300) for i in ids["input_ids"]]
            return ids

    with (
        serving("vllm", tokenizer=Other()) as server,
        pytest.raises(ModelError, match="the tokenizer test"),
    ):
        examine(server)


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_a_server_of_another_model_is_refused_with_its_name(name):
    with serving(name) as server, pytest.raises(ModelError, match="the model test: it serves served"):
        examine(server, model="mine")


def test_a_budget_holds_for_the_probe_too():
    with serving("vllm") as server, pytest.raises(BudgetSpent):
        examine(server, max_requests=9)
