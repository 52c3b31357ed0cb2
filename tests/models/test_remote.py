"""The client against a server that fails in every way we know of."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from types import SimpleNamespace

import httpx2
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxytune.errors import ModelError, SettingsError
from proxytune.files import resource
from proxytune.models import remote
from proxytune.models.dialects import dialect
from proxytune.models.remote import BudgetSpent, RemoteBase
from proxytune.models.replies import BadReply, Query, Told
from proxytune.settings import Remote, load
from proxytune.steering.candidates import bound
from tests.remote import faults
from tests.remote.server import MODEL, Server

NAMES = ("vllm", "sglang", "llamacpp", "openai")
SIZE, TOP = 40, 5
IDS = (3, 1, 4, 1, 5)
TEXTS = {i: f"<{i}>" for i in range(SIZE)}


def logits(ids: list[int]) -> torch.Tensor:
    """(T, V) logits that depend on the last two ids."""
    rows = []
    for t, i in enumerate(ids):
        draw = torch.Generator().manual_seed(i * 1000 + (ids[t - 1] if t else 999))
        rows.append(torch.randn(SIZE, generator=draw) * 3)
    return torch.stack(rows)


def truth(ids) -> torch.Tensor:
    return logits(list(ids))[-1].double().log_softmax(-1)


def serving(name: str, **abilities) -> Server:
    return Server(name, logits, text=TEXTS.__getitem__, **abilities)


def client(server: Server, **changes) -> RemoteBase:
    settings = load(Remote, {"name": server.dialect, "url": server.url, "model": MODEL, "top": TOP, **changes})
    return RemoteBase(settings, dialect(server.dialect, TEXTS), first_pause=0.0)


async def asking(base: RemoteBase, query: Query) -> list[Told]:
    async with base:
        return await base.ask(query)


@pytest.mark.parametrize("name", NAMES)
def test_the_best_scores_are_told_with_a_floor_for_the_rest(name):
    with serving(name) as server:
        (told,) = asyncio.run(asking(client(server), Query(IDS, TOP)))
    best = truth(IDS).topk(TOP)
    assert told.ids == best.indices.tolist() and told.said == told.ids[0]
    assert told.scores == pytest.approx(best.values.tolist()) and told.floor == pytest.approx(best.values[-1].item())


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_chosen_ids_are_told_and_bound_nothing_else(name):
    with serving(name) as server:
        (told,) = asyncio.run(asking(client(server), Query(IDS, TOP, chosen=(7, 30, 12))))
    assert dict(zip(told.ids, told.scores, strict=True)) == pytest.approx(
        {i: truth(IDS)[i].item() for i in (7, 30, 12)}
    )
    assert told.floor == 0.0


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_prompt_scores_are_those_of_the_prompt_cut_there(name):
    with serving(name) as server:
        found = asyncio.run(asking(client(server), Query(IDS, TOP, positions=3)))
    for back, told in zip((2, 1, 0), found, strict=True):
        known = dict(zip(told.ids, told.scores, strict=True))
        expected = truth(IDS[: len(IDS) - back])
        assert set(expected.topk(TOP).indices.tolist()) <= set(known)
        assert known == pytest.approx({i: expected[i].item() for i in known})
        assert told.floor == pytest.approx(expected.topk(TOP).values[-1].item())


@pytest.mark.parametrize("name", ["vllm", "openai"])
def test_a_chosen_token_beyond_the_best_is_no_floor(name):
    """At a temperature the server adds the token it sampled, here its third best, to the two best."""
    with serving(name) as server:
        (told,) = asyncio.run(asking(client(server, top=2), Query(IDS, 2, extra={"temperature": 1.0})))
    best = truth(IDS).topk(3)
    assert sorted(told.ids) == sorted(best.indices.tolist()) and told.said == best.indices[2]
    assert told.floor == pytest.approx(best.values[1].item())


@pytest.mark.parametrize("name", NAMES)
def test_faults_that_pass_are_asked_again_up_to_six_times_in_a_row(name):
    async def run() -> None:
        async with client(server) as base:
            for kind, fault in faults.PASSING.items():
                for row in range(1, 7):
                    server.faults, before = [fault] * row, len(server.asked)
                    (told,) = await base.ask(Query(IDS, TOP))
                    assert told.ids == expected and len(server.asked) == before + row + 1, (kind, row)
                server.faults = [fault] * 7
                with pytest.raises(ModelError, match="7 times in a row") as error:
                    await base.ask(Query(IDS, TOP))
                assert "\n" not in str(error.value) and not server.faults, kind

    expected = truth(IDS).topk(TOP).indices.tolist()
    with serving(name) as server:
        asyncio.run(run())


@pytest.mark.parametrize("kind", faults.SLOW)
def test_a_server_that_takes_too_long_is_asked_again(kind):
    with serving("vllm") as server:
        server.faults = [faults.SLOW[kind]] * 2
        began = time.monotonic()
        (told,) = asyncio.run(asking(client(server, timeout_seconds=faults.PATIENCE), Query(IDS, TOP)))
    assert len(server.asked) == 3 and time.monotonic() - began > 2 * faults.PATIENCE and told.ids


@pytest.mark.parametrize("name", NAMES)
def test_faults_that_last_are_told_in_one_line_after_one_request(name):
    async def run() -> None:
        async with client(server) as base:
            for kind, fault in faults.LASTING.items():
                for row in range(1, 7):
                    if name == "openai" and kind == "too few scores":
                        continue  # tokens of one text are one key there
                    server.faults, before = [fault] * row, len(server.asked)
                    try:
                        found = str(await base.ask(Query(IDS, TOP)))
                    except ModelError as error:
                        assert "\n" not in str(error) and len(str(error)) < 400, kind
                        assert len(server.asked) == before + 1, (kind, row, str(error))
                    else:
                        pytest.fail(f"{kind} was taken for {found}")

    with serving(name) as server:
        asyncio.run(run())
        assert len(faults.PASSING) + len(faults.SLOW) + len(faults.LASTING) >= 50


def shuffled(found):
    return [found[0], found[2], found[1], *found[3:]]


def twice(found):
    return [*found[:-1], [found[0][0], found[-1][1]]]


@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("sglang", faults.scores(shuffled), "not in order"),
        ("llamacpp", faults.scores(shuffled), "not in order"),
        ("vllm", faults.scores(shuffled), "not in order"),
        ("sglang", faults.scores(twice), "two scores"),
        ("llamacpp", faults.scores(twice), "two scores"),
        ("llamacpp", faults.scores(lambda f: [[-3, f[0][1]], *f[1:]]), "no id"),
        ("sglang", faults.scores(lambda f: [[True, f[0][1]], *f[1:]]), "no id"),
        ("vllm", faults.scores(lambda f: [*f[:-1], [" the", f[-1][1]]]), "instead of by its id"),
        ("vllm", faults.edited(lambda reply: reply.update(model="other")), "model served"),
        ("openai", faults.edited(lambda reply: reply.update(model="other")), "model served"),
        ("llamacpp", faults.edited(lambda reply: reply.update(model="other.gguf")), "model served"),
        ("llamacpp", faults.edited(lambda reply: reply.update(truncated=True)), "cut the prompt"),
    ],
)
def test_scores_that_cannot_be_are_never_scores(name, fault, said):
    with serving(name) as server:
        server.faults = [fault]
        with pytest.raises(BadReply, match=said):
            asyncio.run(asking(client(server), Query(IDS, TOP)))
    assert len(server.asked) == 1


def spoilt(reply):
    """What vLLM makes of a request that it answers in one batch with one for chosen ids."""
    listed = reply["choices"][0]["logprobs"]
    listed["top_logprobs"][0] = {listed["tokens"][0]: listed["token_logprobs"][0], "token_id:0": -9999.0}


def test_an_answer_that_another_client_spoilt_is_asked_for_again():
    with serving("vllm") as server:
        server.faults = [faults.edited(spoilt)] * 2
        (told,) = asyncio.run(asking(client(server), Query(IDS, TOP)))
        assert told.ids == truth(IDS).topk(TOP).indices.tolist() and len(server.asked) == 3
        server.faults = [faults.edited(spoilt)] * 3
        with pytest.raises(BadReply, match="beside a request for chosen ids"):
            asyncio.run(asking(client(server, retries=2), Query(IDS, TOP)))
        assert len(server.asked) == 6


def test_a_dated_version_is_the_model_it_stands_for():
    with serving("openai") as server:
        server.faults = [faults.edited(lambda reply: reply.update(model="served:20260101-v2"))]
        asyncio.run(asking(client(server), Query(IDS, TOP)))


def test_texts_that_several_ids_have_name_no_id():
    texts = TEXTS | {7: "<8>"}
    assert set(dialect("openai", texts).unbounded) == {7, 8}
    (told,) = named_by(texts, texts, truth(IDS).where(torch.arange(SIZE) != 7, 0).log_softmax(-1))
    assert told.ids[0] == -1 and told.floor == told.scores[-1]


def named_by(texts: dict[int, str], theirs: dict[int, str], scores: torch.Tensor) -> list[Told]:
    """What is made of an honest server's best scores, which it writes under `theirs`, by a tokenizer of `texts`."""
    best = scores.topk(TOP)
    said = theirs[int(best.indices[0])]
    listed = {}
    for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        listed.setdefault(theirs[i], score)
    logprobs = {"tokens": [said], "token_logprobs": [listed[said]], "top_logprobs": [listed]}
    reply = {"model": MODEL, "choices": [{"logprobs": logprobs}], "usage": {"prompt_tokens": len(IDS)}}
    return dialect("openai", texts).parse(reply, Query(IDS, TOP), MODEL)


@given(
    st.lists(st.sampled_from(["", "\ufffd", "same", *"abcdefgh"]), min_size=12, max_size=12),
    st.dictionaries(st.integers(0, 11), st.sampled_from(["", "</s>", " foo", "bytes:\\xe2"]), max_size=4),
    st.lists(st.floats(-6, 6), min_size=12, max_size=12),
)
def test_no_id_scores_above_its_bound_however_the_server_writes_it(ours, otherwise, drawn):
    texts = dict(enumerate(ours))
    # A split character is one for the tokenizer too.
    theirs = texts | {i: text for i, text in otherwise.items() if "bytes" not in text or texts[i] == "\ufffd"}
    scores = torch.tensor(drawn).log_softmax(-1)
    (told,) = named_by(texts, theirs, scores)
    unbounded = dialect("openai", texts).unbounded
    ids, known = torch.tensor([told.ids], dtype=torch.int64), torch.tensor([told.scores])
    bounds = bound(ids, known, torch.tensor([told.floor]), len(texts), unbounded=unbounded)
    assert (scores <= bounds.upper_BV[0] + 1e-6).all() and (scores >= bounds.lower_BV[0] - 1e-6).all()


def test_halves_of_a_character_bound_as_texts_of_several_ids_do():
    texts = TEXTS | {7: "\ufffd", 8: "\ufffd"}
    scores = truth(IDS).where(torch.arange(SIZE) != 7, 0).log_softmax(-1)
    assert named_by(texts, texts | {7: "bytes:\\xe2\\x80"}, scores) == named_by(texts, texts, scores)


def test_connections_are_kept_and_no_more_are_in_flight_than_allowed():
    open_now, most = set(), 0

    def slow(handler, reply):
        nonlocal most
        open_now.add(handler)
        most = max(most, len(open_now))
        time.sleep(0.005)
        open_now.discard(handler)
        handler.reply(200, reply)

    async def run() -> None:
        async with client(server, in_flight=3) as base:
            await asyncio.gather(*(base.ask(Query(IDS, TOP)) for _ in range(40)))

    with serving("vllm") as server:
        server.faults = [slow] * 40
        asyncio.run(run())
        assert server.connections == 3 and most <= 3  # a third one is opened while two are in use


def test_retry_after_is_obeyed_and_pauses_grow_with_jitter(monkeypatch):
    pauses = []

    async def nap(seconds):
        pauses.append(seconds)

    with serving("vllm") as server:
        server.faults = [faults.status(429, Retry_After="7"), *[faults.status(500)] * 4]
        base = client(server)
        base.first_pause = 1.0
        monkeypatch.setattr(remote, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": nap}))  # in here alone
        asyncio.run(asking(base, Query(IDS, TOP)))
    assert pauses[0] == 7 and all(2**n / 2 <= pause <= 2**n for n, pause in enumerate(pauses) if n)
    assert len(pauses) == 5 and pauses[3] != 8 and base.spent.retries == 5


@pytest.mark.parametrize(
    ("budget", "said"), [({"max_requests": 3}, "max_requests=3"), ({"max_tokens": 20}, "max_tokens=20")]
)
def test_a_budget_stops_before_the_request_that_would_break_it(budget, said):
    async def run() -> None:
        async with client(server, **budget) as base:
            for _ in range(3):
                await base.ask(Query(IDS, TOP))
            with pytest.raises(BudgetSpent, match=said):
                await base.ask(Query(IDS, TOP))

    with serving("vllm") as server:
        asyncio.run(run())
        assert len(server.asked) == 3  # of 5 prompt tokens and 1 for the reply: 18 tokens


def test_retries_count_in_the_budget():
    with serving("vllm") as server:
        server.faults = [faults.status(500)] * 9
        with pytest.raises(BudgetSpent):
            asyncio.run(asking(client(server, max_requests=4), Query(IDS, TOP)))
        assert len(server.asked) == 4


KEY = "sk-verysecret123"


def test_the_key_is_sent_and_never_shown(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SOME_KEY", KEY)
    with serving("vllm") as server:
        base = client(server, key_variable="SOME_KEY")
        asyncio.run(asking(base, Query(IDS, TOP)))
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        told = [repr(base), repr(vars(base)), repr(base.settings)]
        for answer in (
            faults.status(401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}),
            faults.body(json.dumps({"error": KEY}).encode()),
            faults.status(500, {"detail": KEY}),
        ):
            server.faults = [answer] * 7
            with pytest.raises(ModelError) as error:
                asyncio.run(asking(base, Query(IDS, TOP)))
            told.append(str(error.value))
        assert "***" in told[3] and "SOME_KEY" in told[3]
    assert KEY not in " ".join([*told, caplog.text])


@pytest.mark.parametrize("key", ["", "  ", "sk-line\nbreak", "sk-\u00e9"])
def test_a_key_that_is_missing_or_no_key_is_told_without_it(monkeypatch, key):
    monkeypatch.setenv("SOME_KEY", key)
    with serving("vllm") as server, pytest.raises(SettingsError, match="SOME_KEY") as error:
        client(server, key_variable="SOME_KEY")
    assert not key.strip() or key not in str(error.value)


def test_keys_in_a_url_are_refused_and_not_shown():
    for url in ("http://user:hunter2@host/", "https://host/?key=hunter2"):
        with pytest.raises(SettingsError, match="key_variable") as error:
            load(Remote, {"name": "vllm", "url": url})
        assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_base_of_the_configuration_is_one(name, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    values = yaml.safe_load((resource("conf") / "base" / f"{name}.yaml").read_text("utf-8"))
    assert list(values) == [field for field in Remote.model_fields if field != "mode" or name == "openai"]
    settings = load(Remote, values | {"model": "m"})
    assert settings.name == name and RemoteBase(settings, dialect(name, TEXTS)).spent.requests == 0


@pytest.mark.parametrize("scheme", ["https", "HTTPS", "http"])
def test_certificates_are_asked_of_every_https(scheme, monkeypatch):
    made = []
    monkeypatch.setattr(httpx2, "AsyncClient", lambda **how: made.append(how))
    RemoteBase(Remote(name="vllm", url=f"{scheme}://host"), dialect("vllm"))._client()
    assert made[0]["verify"] is (scheme != "http")


@pytest.mark.parametrize("proxy", ["socks5://user:hunter2@127.0.0.1:9", "gopher://user:hunter2@127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_is_told_without_its_password(proxy, monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", proxy)
    base = RemoteBase(Remote(name="vllm", url="http://host"), dialect("vllm"))
    with pytest.raises(SettingsError, match="ALL_PROXY") as error:
        asyncio.run(asking(base, Query(IDS, TOP)))
    assert "hunter2" not in str(error.value)


def test_an_address_that_is_none_is_told_in_one_line():
    base = RemoteBase(Remote(name="vllm", url="http://host"), dialect("vllm"))
    base.settings = base.settings.model_copy(update={"url": "http://a" + "b" * 70 + ".\u00e9"})
    with pytest.raises(ModelError, match="cannot be sent as HTTP"):
        asyncio.run(asking(base, Query(IDS, TOP)))


def test_a_server_that_is_not_there_is_told_in_one_line():
    with serving("vllm") as server:
        base = client(server, retries=1)
    server.server_close()
    with pytest.raises(ModelError, match="cannot be reached, 2 times in a row"):
        asyncio.run(asking(base, Query(IDS, TOP)))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_sampling_is_sent_switched_off(name):
    with serving(name) as server:
        asyncio.run(asking(client(server), Query(IDS, TOP)))
    body = server.asked[0]
    sent = body.get("sampling_params", body)
    assert sent["temperature"] == 0 and sent["top_p"] == 1 and sent["presence_penalty"] == 0
    assert "processor" not in json.dumps(body)  # a pickled function, where it is taken


def test_what_two_answers_tell_is_put_together():
    both = Told([1, -1, 2], [-0.5, -1.0, -2.0], -2.0).merge(Told([2, 9], [-2.1, -7.0], 0.0))
    assert (both.ids, both.scores, both.floor) == ([1, -1, 2, 9], [-0.5, -1.0, -2.0, -7.0], -2.0)
