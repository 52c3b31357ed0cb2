"""The OpenAI-compatible server over a base that is itself behind an API."""

from __future__ import annotations

import json

import pytest

from proxytune.settings import Decode, DecodeStage, Serve
from proxytune.stages import decode
from proxytune.tasks import qa
from tests.remote import faults
from tests.remote.server import behind

pytest.importorskip("fastapi", reason="proxytune[serve] is not installed")
pytest.importorskip("httpx2", reason="httpx2 is not installed")
openai = pytest.importorskip("openai", reason="openai is not installed")

STOP = list(qa.TASK.stop)
PROMPTS = ["Say 12.", "Who?", "Question: what follows 7?\nAnswer:"]


def test_base_and_steered_say_what_they_say_here_and_a_dead_server_ends_its_own_requests_only(place, serving):
    from tests.serving.conftest import metric, running  # which wants the packages above

    here = decode.run(place.settings(DecodeStage, prompts=_file(place), compare=True, alpha=1.0))
    said = {
        system: [row["text"] for row in here if row["system"] == system] for system in ("base", "expert", "steered")
    }
    with serving("vllm") as server:
        settings = place.settings(
            Serve, alpha=1.0, decode=Decode(max_new_tokens=6), base=behind(server, draft_tokens=2, retries=0)
        )
        with running(settings) as house:
            client = house.client()
            names = {"base": "base", "expert": "expert", "steered": "base+qa"}
            assert [model.id for model in client.models.list()] == list(names.values())
            for system, model in names.items():
                found = [client.completions.create(model=model, prompt=text, stop=STOP) for text in PROMPTS]
                assert [each.choices[0].text for each in found] == said[system]
                told = [(each.model_extra or {}).get("proxytune") for each in found]
                if system == "expert":
                    assert told == [None] * 3
                else:
                    tokens = [each.usage.completion_tokens for each in found]
                    assert [(one["tokens"], one["certified"]) for one in told] == [(n, n) for n in tokens]
                    assert all(one["calls"] > 0 for one in told)
            with pytest.raises(openai.BadRequestError, match="log-probabilities"):
                client.completions.create(model="base+qa", prompt="Who?", logprobs=1)
            tokens, certified = (
                metric(house.url, f'proxytune_engine_{n}_total{{model="base+qa"}}') for n in ("tokens", "certified")
            )
            assert 0 < tokens == certified
            server.faults = [faults.status(500)] * 2
            with pytest.raises(openai.InternalServerError, match="answered 500"):
                client.completions.create(model="base+qa", prompt="Who?")
            server.faults = []
            assert (
                client.completions.create(model="base+qa", prompt="Who?", stop=STOP).choices[0].text
                == said["steered"][1]
            )
            parts = list(client.completions.create(model="base+qa", prompt="Who?", stop=STOP, stream=True))
            assert "".join(part.choices[0].text for part in parts) == said["steered"][1]
            whole = client.completions.create(model="base+qa", prompt="Who?", stop=STOP)
            assert [p.model_extra["proxytune"] for p in parts if "proxytune" in p.model_extra] == [whole.proxytune]
            assert "proxytune" in parts[-1].model_extra
            how = {"stream": True, "stream_options": {"include_usage": True}, "n": 2}
            *_, last = client.completions.create(model="base+qa", prompt="Who?", stop=STOP, **how)
            assert last.proxytune["tokens"] == last.usage.completion_tokens == last.proxytune["certified"] > 0


def _file(place) -> str:
    path = place.outputs / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return str(path)
