"""The OpenAI-compatible server over a base that is itself behind an API."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager

import pytest

from proxytune.settings import Decode, DecodeStage, Serve
from proxytune.stages import decode
from proxytune.stages import trio as trios
from proxytune.tasks import qa
from tests.remote import faults
from tests.remote.server import behind

pytest.importorskip("fastapi", reason="proxytune[serve] is not installed")
httpx2 = pytest.importorskip("httpx2", reason="httpx2 is not installed")
openai = pytest.importorskip("openai", reason="openai is not installed")

STOP = list(qa.TASK.stop)
PROMPTS = ["Say 12.", "Who?", "Question: what follows 7?\nAnswer:"]


@contextmanager
def running(settings: Serve):
    import uvicorn

    from proxytune.stages import serve

    app = serve.assemble(settings, trios.find(settings))
    with serve.listening("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        server.should_exit = True
        thread.join(timeout=20)


def test_base_and_steered_say_what_they_say_here_and_a_dead_server_ends_its_own_requests_only(place, serving):
    here = decode.run(place.settings(DecodeStage, prompts=_file(place), compare=True, alpha=1.0))
    said = {
        system: [row["text"] for row in here if row["system"] == system] for system in ("base", "expert", "steered")
    }
    with serving("vllm") as server:
        settings = place.settings(
            Serve, alpha=1.0, decode=Decode(max_new_tokens=6), base=behind(server, draft_tokens=2, retries=0)
        )
        with running(settings) as client:
            names = {"base": "base", "expert": "expert", "steered": "base+qa"}
            assert [model.id for model in client.models.list()] == list(names.values())
            for system, model in names.items():
                found = [client.completions.create(model=model, prompt=text, stop=STOP) for text in PROMPTS]
                assert [each.choices[0].text for each in found] == said[system]
            with pytest.raises(openai.BadRequestError, match="log-probabilities"):
                client.completions.create(model="base+qa", prompt="Who?", logprobs=1)
            told = httpx2.get(str(client.base_url).replace("/v1/", "/metrics")).text.splitlines()
            metrics = dict(line.rsplit(" ", 1) for line in told if line[0] != "#")
            tokens, certified = (
                metrics[f'proxytune_engine_{n}_total{{model="base+qa"}}'] for n in ("tokens", "certified")
            )
            assert 0 < int(tokens) == int(certified)
            server.faults = [faults.status(500)] * 2
            with pytest.raises(openai.InternalServerError, match="answered 500"):
                client.completions.create(model="base+qa", prompt="Who?")
            server.faults = []
            assert (
                client.completions.create(model="base+qa", prompt="Who?", stop=STOP).choices[0].text
                == said["steered"][1]
            )
            parts = client.completions.create(model="base+qa", prompt="Who?", stop=STOP, stream=True)
            assert "".join(part.choices[0].text for part in parts) == said["steered"][1]


def _file(place) -> str:
    path = place.outputs / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return str(path)
