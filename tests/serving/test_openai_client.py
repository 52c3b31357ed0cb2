"""What OpenAI's own client gets from a real server, beside what the engine says when nothing else runs."""

from __future__ import annotations

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest

from proxytune.decoding.engine import Engine
from proxytune.decoding.mixture import Mixture
from proxytune.decoding.request import Limits, Request
from proxytune.models import trio as trio_module
from proxytune.serving.protocol import Completion
from proxytune.serving.served import Guide, Served
from proxytune.settings import Decode, Steer
from proxytune.stages.shared import trio as trios
from proxytune.steering.choice import Sampling
from tests.serving.conftest import STEERED, metric, running, until

ASKED = "Question: what follows 7?\nAnswer:"
SAMPLED = {"temperature": 1.0, "seed": 11}


@pytest.fixture(scope="module")
def trio(house) -> trio_module.Trio:
    """A trio of the tests' own: an engine is no place for two threads."""
    settings = house.settings()
    experts = [trios.files_of(e) for e in (trios.find(settings), trios.held(settings)[0][0])]
    return trio_module.load(settings.base_ref, experts, "float32")


def alone(trio, prompt, alphas, name="steered", count=12, seed=11, temperature=1.0, **limits):
    """The reply of an engine that has nothing else to do."""
    mixture = trios.mixtures(trio)[name]
    limits = Limits(count, trio.end_ids, **limits)
    request = Request(trio.encode(prompt), limits, alphas, Sampling(temperature, seed=seed))
    ((_, reply),) = Engine(mixture, trio.tokenizers["base"]).run([request])
    return reply


def test_base_expert_and_steered_are_listed_with_their_alphas(client):
    found = {model.id: model for model in client.models.list()}
    assert {"base", "expert", STEERED} <= set(found)
    assert [(s["version"], s["alpha"]) for s in found[STEERED].steering] == [("qa@v1", 0.5), ("style@v1", 0.0)]
    card = client.models.retrieve(STEERED)
    assert (card.max_model_len, card.max_tokens) == (2048, 2048)
    assert card.example.startswith("Question: ") and card.example.endswith("\nAnswer:")  # of the first expert's task


@pytest.mark.parametrize(("model", "name"), [("base", "base"), ("expert", "expert"), (STEERED, "steered")])
def test_a_completion_says_what_the_engine_says(client, trio, model, name):
    answer = client.completions.create(model=model, prompt=ASKED, **SAMPLED)
    expected = alone(trio, ASKED, (0.5, 0.0) if name == "steered" else (), name)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected.text, expected.finish_reason)
    assert answer.model == model and answer.object == "text_completion"
    prompt = len(trio.encode(ASKED)["base"])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, len(expected.token_ids))


def test_a_chat_is_put_to_each_model_in_its_own_format(client, trio):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What follows 7?"}]
    how = {**SAMPLED, "extra_body": {"alpha": [0.5, 1.5]}}
    answer = client.chat.completions.create(model=STEERED, messages=messages, max_tokens=9, **how)
    assert answer.choices[0].message.content == alone(trio, messages, (0.5, 1.5), count=9).text
    assert answer.choices[0].message.role == "assistant" and answer.object == "chat.completion"
    assert answer.steering == [{"expert": "qa@v1", "alpha": 0.5}, {"expert": "style@v1", "alpha": 1.5}]


@pytest.mark.parametrize(
    ("asked", "alphas"),
    [
        ({"alpha": 2}, (2.0, 0.0)),
        ({"alpha": [1, -1]}, (1.0, -1.0)),
        ({"steering": [{"expert": "style@v1", "alpha": 1.5}]}, (0.0, 1.5)),
        ({"steering": {"qa@v1": 0.25, "style@v1": 1}}, (0.25, 1.0)),
        ({}, (0.5, 0.0)),
    ],
)
def test_alpha_and_steering_are_per_request(client, trio, asked, alphas):
    answer = client.completions.create(model=STEERED, prompt=ASKED, **SAMPLED, extra_body=asked)
    assert answer.choices[0].text == alone(trio, ASKED, alphas).text
    assert [each["alpha"] for each in answer.steering] == list(alphas)


def test_a_stream_s_pieces_are_the_whole_answer_with_usage_at_the_end(client):
    whole = client.completions.create(model=STEERED, prompt=ASKED, **SAMPLED)
    chunks = list(
        client.completions.create(
            model=STEERED, prompt=ASKED, **SAMPLED, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 3


def test_a_streamed_chat_names_its_role_once(client):
    how = {"model": STEERED, "messages": [{"role": "user", "content": "What follows 7?"}], **SAMPLED}
    whole = client.chat.completions.create(**how)
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**how, stream=True)]
    assert [delta.role for delta in deltas if delta.role] == ["assistant"] == [deltas[0].role]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content


def test_a_stop_text_is_neither_sent_nor_streamed(client, trio):
    text = alone(trio, ASKED, (0.5, 0.0)).text
    stop = text[5:9]
    how = {"model": STEERED, "prompt": ASKED, **SAMPLED, "stop": [stop, "not to be found"]}
    whole = client.completions.create(**how).choices[0]
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**how, stream=True))
    assert whole.text == streamed == text[: text.index(stop)] and whole.finish_reason == "stop"


@pytest.mark.parametrize(("asked", "least"), [({}, 5), ({"min_tokens": 0}, 0), ({"min_tokens": 7}, 7)])
def test_min_tokens_are_the_server_s_where_a_body_does_not_say(trio, asked, least):
    guides = (Guide("qa@best", "qa@v1", 0.5), Guide("style@v1", "style@v1", 0.0))
    served = Served(trio, guides, Decode(min_new_tokens=5), tokens=12, max_tokens=100)
    (request,) = served.requests(Completion(model="base", prompt=ASKED, **asked))
    assert request.limits.min_new_tokens == least


def test_choices_have_the_seeds_after_the_first(client, trio):
    answer = client.completions.create(model=STEERED, prompt=[ASKED, "Say 1."], n=3, **SAMPLED)
    expected = [alone(trio, ASKED, (0.5, 0.0), seed=11 + i).text for i in range(3)]
    expected += [alone(trio, "Say 1.", (0.5, 0.0), seed=14 + i).text for i in range(3)]
    assert [choice.text for choice in answer.choices] == expected and len(set(expected)) == 6
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.prompt_tokens == sum(len(trio.encode(p)["base"]) for p in (ASKED, "Say 1."))
    streamed = [""] * 6
    for chunk in client.completions.create(model=STEERED, prompt=[ASKED, "Say 1."], n=3, **SAMPLED, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected


def test_without_a_seed_sampling_differs_and_greedy_does_not(client):
    def texts(temperature):
        answers = (client.completions.create(model="base", prompt=ASKED, temperature=temperature) for _ in range(4))
        return {answer.choices[0].text for answer in answers}

    assert len(texts(1.0)) > 1 and len(texts(0.0)) == 1


def test_64_clients_with_64_alphas_get_what_each_would_get_alone(server, trio):
    def alphas(place: int) -> tuple[float, float]:
        return (place / 16 - 2, (place % 3) / 2)

    def ask(place: int) -> str:
        how = {"model": STEERED, "prompt": ASKED, "temperature": 1.0, "seed": place, "max_tokens": 3 + place % 3}
        how["extra_body"] = {"alpha": list(alphas(place))}
        if place % 2:
            return client.completions.create(**how).choices[0].text
        return "".join(part.choices[0].text for part in client.completions.create(**how, stream=True))

    client = server.client()
    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(ask, range(64)))
    engine = Engine(trios.mixtures(trio)["steered"], trio.tokenizers["base"])
    for place, text in enumerate(together):
        limits, how = Limits(3 + place % 3, trio.end_ids), Sampling(1.0, seed=place)
        ((_, reply),) = engine.run([Request(trio.encode(ASKED), limits, alphas(place), how)])
        assert text == reply.text
    assert len(set(together)) > 48
    assert [ask(place) for place in range(4)] == together[:4]


def test_replies_of_all_models_are_written_at_the_same_time(server):
    def ask(place: int) -> str:
        model = ("base", "expert", STEERED)[place % 3]
        return (
            client.completions.create(model=model, prompt=f"Say {place}.", temperature=0.8, seed=place).choices[0].text
        )

    client = server.client()
    with ThreadPoolExecutor(9) as pool:
        assert list(pool.map(ask, range(9))) == [ask(place) for place in range(9)]


def test_completions_tell_the_log_probabilities_of_their_tokens(client, trio):
    answer = client.completions.create(model=STEERED, prompt=ASKED, **SAMPLED, logprobs=3)
    told, text = answer.choices[0].logprobs, answer.choices[0].text
    expected = alone(trio, ASKED, (0.5, 0.0))
    assert "".join(told.tokens) == text and len(told.tokens) == len(expected.token_ids)
    assert [text[at : at + len(t)] for at, t in zip(told.text_offset, told.tokens, strict=True)] == told.tokens
    for token, logprob, top, each in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, told.steering, strict=True
    ):
        assert len(top) <= 3 and logprob <= max(top.values()) <= 0
        assert each["chosen"]["token"] == token and each["chosen"]["steered"] == pytest.approx(logprob)
        assert {"steered", "base", "expert", "anti", "expert2"} <= set(each["chosen"])
        assert each["changed"] == (each["chosen"]["id"] != each["base"]["id"])
    assert any(each["changed"] for each in told.steering)


def test_chat_tells_log_probabilities_whole_and_streamed_alike(client):
    how = {"model": STEERED, "messages": [{"role": "user", "content": "Say 1."}], **SAMPLED}
    how |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**how).choices[0].logprobs.content
    streamed = [
        token for chunk in client.chat.completions.create(**how, stream=True)
        for token in chunk.choices[0].logprobs.content
    ]  # fmt: skip
    assert [(t.token, t.bytes, len(t.top_logprobs)) for t in whole] == [
        (t.token, t.bytes, len(t.top_logprobs)) for t in streamed
    ]
    assert [t.logprob for t in whole] == pytest.approx([t.logprob for t in streamed], abs=1e-4)
    assert client.chat.completions.create(**(how | {"logprobs": False, "top_logprobs": 0})).choices[0].logprobs is None


def test_alpha_zero_tells_the_base_s_own_probabilities(client):
    answer = client.completions.create(model=STEERED, prompt=ASKED, **SAMPLED, logprobs=2, extra_body={"alpha": [0, 0]})
    for each in answer.choices[0].logprobs.steering:
        assert not each["changed"]
        assert each["chosen"]["steered"] == pytest.approx(each["chosen"]["base"], abs=1e-5)
        assert math.exp(each["top"][0]["base"]) <= 1


def test_ids_are_a_prompt_where_no_model_wants_a_chat_format(client, trio):
    ids = trio.encode(ASKED)["base"]
    for model, name in (("base", "base"), ("expert", "expert")):
        answer = client.completions.create(model=model, prompt=ids, **SAMPLED)
        assert answer.choices[0].text == alone(trio, ASKED, (), name).text
    with pytest.raises(openai.BadRequestError, match="chat format"):
        client.completions.create(model=STEERED, prompt=ids)
    with pytest.raises(openai.BadRequestError, match="token id 99999"):
        client.completions.create(model="base", prompt=[99999])


def test_tokenize_gives_the_base_s_ids(server, trio):
    def post(**body):
        return httpx2.post(f"{server.url}/tokenize", json=body, timeout=60).json()

    ids = trio.encode(ASKED)["base"]
    assert post(prompt=ASKED) == {"tokens": ids, "count": len(ids), "max_model_len": 2048}
    assert post(messages=[{"role": "user", "content": "Hi"}])["tokens"] == trio.encode("Hi\n")["base"]


def test_a_full_queue_is_429_and_the_others_are_answered(house, monkeypatch):
    settings = house.settings(decode=Decode(batch_size=1), queue=1, steering=[])
    with running(settings) as server:
        engine, refusing = server.app.state.loop.engines["base"], threading.Event()
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: (step(), refusing.wait(60))[0])  # none ends before one is refused
        client, found = server.client(), []
        how = {"model": "base", "prompt": ASKED, "max_tokens": 200, "extra_body": {"min_tokens": 200}}
        threads = [
            threading.Thread(target=lambda: found.append(client.completions.create(**how).usage.completion_tokens))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        until(lambda: server.app.state.loop.open["base"] == 2)
        until(lambda: metric(server.url, 'proxytune_waiting{model="base"}') == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(**how)
        assert refused.value.code == "queue_full" and refused.value.response.headers["retry-after"] == "1"
        refusing.set()
        assert client.completions.create(model="expert", prompt=ASKED, max_tokens=2).usage.completion_tokens == 2
        for thread in threads:
            thread.join()
        assert found == [200, 200]


REFUSED = [
    ({"model": "bse"}, 404, "did you mean 'base'"),
    ({"alpa": 1}, 400, "did you mean 'alpha'"),
    ({"alpha": 1}, 400, f"base is not steered; ask for {STEERED}"),
    ({"model": STEERED, "alpha": [1]}, 400, f"alpha has 1 numbers, and {STEERED} takes 2"),
    ({"model": STEERED, "alpha": 1e9}, 400, "alpha must be a number from -1000 to 1000"),
    ({"model": STEERED, "alpha": 1, "steering": {}}, 400, "not both"),
    ({"model": STEERED, "steering": {"cod": 1}}, 400, "no expert 'cod'"),
    ({"prompt": ""}, 400, "a prompt is empty"),
    ({"prompt": []}, 400, "prompt must be a text"),
    ({"model": STEERED, "alpha": float("nan")}, 400, "alpha must be a number"),
    ({"model": STEERED, "alpha": [1, float("inf")]}, 400, "alpha must be a number"),
    ({"model": STEERED, "steering": {"qa@best": 1e9}}, 400, "steering must be like"),
    ({"top_k": 2**63}, 400, "top_k: "),
    ({"temperature": 1e-300}, 400, "temperature: give 0, or at least 0.001"),
    ({"repetition_penalty": 1e300}, 400, "repetition_penalty: "),
    ({"prompt": "x " * 3000}, 400, "the models read 2048"),
    ({"prompt": "\ud800"}, 400, "not JSON text"),
    ({"max_tokens": 0}, 400, "max_tokens: "),
    ({"max_tokens": 4096}, 400, "more than the 2048"),
    ({"temperature": -1}, 400, "temperature: "),
    ({"n": 1000}, 400, "n: "),
    ({"n": 128, "prompt": ["a"] * 4}, 400, "more than this server takes at once"),
    ({"seed": 2**80}, 400, "seed: "),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias: "),
    ({"presence_penalty": 1}, 400, "presence_penalty: "),
    ({"best_of": 2}, 400, "best_of: "),
    ({"logprobs": 21}, 400, "logprobs: "),
    ({"stop": [""]}, 400, "stop"),
    ({"stream_options": {"include_usage": True}}, 400, "needs stream"),
]


@pytest.mark.parametrize(("changes", "status", "said"), REFUSED, ids=[str(sorted(r[0]))[:30] for r in REFUSED])
def test_what_cannot_be_answered_is_refused_in_openai_s_shape(server, changes, status, said):
    body = {"model": "base", "prompt": "x", "max_tokens": 2, "temperature": 1} | changes
    answer = httpx2.post(
        f"{server.url}/v1/completions",
        content=json.dumps(body),
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    error = answer.json()["error"]
    assert answer.status_code == status and said in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
        ({"tools": [{"type": "function"}]}, "tools: "),
        ({"top_logprobs": 3}, "needs logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_a_chat_that_asks_for_what_is_not_done_is_refused(server, changes, said):
    body = {"model": "base", "messages": [{"role": "user", "content": "x"}]} | changes
    answer = httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


STERN = """{% for m in messages %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}\
{{ raise_exception('turns must take turns') }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"""


def test_turns_that_the_expert_s_template_refuses_are_refused_in_one_line_where_that_expert_reads_them(house):
    house.publish("stern", 3, STERN, prompt_format="chat")
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}
    steering = [Steer(expert="stern@v1"), Steer(expert="qa@best", alpha=0.0)]
    with running(house.settings(expert="stern@v1", steering=steering)) as server:
        client = server.client()

        def ask(*messages, model="base+stern@v1"):
            return client.chat.completions.create(model=model, messages=messages, max_tokens=2)

        assert ask(system, user).usage.completion_tokens == ask(user).usage.completion_tokens == 2
        for messages in ((system,), (user, user)):
            for model in ("base+stern@v1", "expert"):
                with pytest.raises(openai.BadRequestError, match="turns must take turns") as refused:
                    ask(*messages, model=model)
                assert "\n" not in refused.value.body["message"]
            for model in ("base", "qa@best"):  # these read plain text
                counted = ask(*messages, model=model).usage
                asked = httpx2.post(f"{server.url}/tokenize", json={"model": model, "messages": messages}, timeout=60)
                assert asked.json()["count"] == counted.prompt_tokens


def test_experts_go_by_their_own_names_alone_and_some_of_them_steer(client, trio):
    names = [model.id for model in client.models.list()]
    assert names == ["base", "expert", "qa@best", "style@v1", "base+qa@best", "base+style@v1", STEERED]

    def text(model, **extra):
        return client.completions.create(model=model, prompt=ASKED, **SAMPLED, extra_body=extra).choices[0].text

    assert text("qa@best") == text("qa@v1") == text("expert") == alone(trio, ASKED, (), "expert").text
    second = Mixture(trio.pairs[1][0], trio.vocabulary)
    request = Request(trio.encode(ASKED), Limits(12, trio.end_ids), (), Sampling(1.0, seed=11))
    ((_, reply),) = Engine(second, trio.tokenizers["base"]).run([request])
    assert text("style@v1") == reply.text
    assert text("base+style@v1", alpha=1.5) == alone(trio, ASKED, (0.0, 1.5)).text
    assert text("base+style@v1+qa@v1", alpha=[1.5, 0.25]) == alone(trio, ASKED, (0.25, 1.5)).text
    assert text("base+qa@best") == alone(trio, ASKED, (0.5, 0.0)).text
    for wrong in ("base+", "base+qa@best+qa@best", "expert+qa@best", "base+cod"):
        with pytest.raises(openai.NotFoundError, match="no model"):
            text(wrong)


def test_a_failure_amid_a_stream_is_told_in_it_and_the_next_request_is_answered(house):
    with running(house.settings(steering=[])) as server:
        client, engines = server.client(), server.app.state.loop.engines
        stream = client.completions.create(
            model="base", prompt=ASKED, max_tokens=1500, stream=True, extra_body={"min_tokens": 1500}
        )
        next(iter(stream))
        engines["base"].step = lambda: (_ for _ in ()).throw(RuntimeError("secret of the house"))
        with pytest.raises(openai.APIError, match="the server failed: RuntimeError"):
            list(stream)
        assert client.completions.create(model="base", prompt=ASKED, max_tokens=2).usage.completion_tokens == 2
        assert metric(server.url, "proxytune_failures_total") == 1
        server.app.state.loop.close()
        assert httpx2.get(f"{server.url}/health", timeout=60).status_code == 503
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            client.completions.create(model="base", prompt=ASKED, max_tokens=2)
