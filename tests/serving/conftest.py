"""A random family with two LoRA experts made on the spot and registered, and a server of them on a free port."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from openai import OpenAI

from proxytune.experts.manifest import CodeVersion, DataLineage, Manifest
from proxytune.experts.registry import Registry
from proxytune.models.identity import identify
from proxytune.models.loading import load_model
from proxytune.settings import Decode, Family, Serve, Steer, TaskChoice, Tracker
from proxytune.stages import serve
from proxytune.stages.shared import trio as trios
from tests.decoding.tiny_models import adapter
from tests.models.tiny_family import save_family, tokenizer

STEERED = "base+qa@best+style@v1"


@dataclass(frozen=True)
class House:
    """A family, and outputs whose registry has `qa` (best alpha 0.5) and `style`, which reads chats."""

    family: Family
    outputs: Path

    def settings(self, **changes: Any) -> Serve:
        values: dict[str, Any] = {
            "family": self.family,
            "task": TaskChoice(name="qa"),
            "tracker": Tracker(name="local"),
            "outputs": self.outputs,
            "expert": "qa@best",
            "steering": [Steer(expert="qa@best"), Steer(expert="style@v1", alpha=0.0)],
            "decode": Decode(max_new_tokens=12, batch_size=16),
        }
        return Serve(**(values | changes))

    def publish(self, name: str, seed: int, template: str | None = None, **changes: Any) -> None:
        """template: of chats, instead of the family's."""
        own = tokenizer()
        own.chat_template = template or own.chat_template
        registry = Registry(self.outputs / "registry")
        with registry.staging() as folder:
            adapter(load_model(self.family.small), seed, folder)
            own.save_pretrained(folder)
            draft = {
                "name": name,
                "task": "qa",
                "family": "random",
                "role": "expert",
                "kind": "lora",
                "anti": identify(self.family.small, tokenizer()),
                "data": DataLineage(source="files", fingerprint="0", train=1, validation=0, test=0),
                "prompt_format": "plain",
                "config": {"family": self.family.model_dump(mode="json")},
                "code": CodeVersion(version="0"),
                "command": "a test",
                "training": {},
            }
            expert = registry.publish(folder, Manifest(**(draft | changes)))
        registry.tag(expert.reference, "best")


@pytest.fixture(scope="session")
def house(tmp_path_factory) -> House:
    folder = tmp_path_factory.mktemp("house")
    house = House(save_family(folder / "family"), folder / "outputs")
    house.publish("qa", 1, alpha=0.5)
    house.publish("style", 2, prompt_format="chat")
    return house


@dataclass(frozen=True)
class Running:
    app: Any
    url: str
    server: uvicorn.Server

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=300)


@contextmanager
def running(settings: Serve, key: str | None = None) -> Generator[Running]:
    """The application that the stage assembles, on a thread of the test's own."""
    app = serve.assemble(settings, trios.find(settings), key)
    with serve.listening("127.0.0.1", 0) as listener:
        server = serve.server_of(app, drain_seconds=0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield Running(app, f"http://127.0.0.1:{listener.getsockname()[1]}", server)
        server.should_exit = True
        thread.join(timeout=120)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def server(house) -> Generator[Running]:
    with running(house.settings()) as found:
        yield found


@pytest.fixture
def client(server) -> OpenAI:
    return server.client()


def metric(url: str, line: str, **how: Any) -> float:
    """The value of one line of /metrics."""
    import httpx2

    text = httpx2.get(f"{url}/metrics", **how, timeout=60).text
    return float(next(each for each in text.splitlines() if each.startswith(line + " ")).rpartition(" ")[2])


def until(true, seconds: float = 10.0) -> None:
    """Wait for something to hold: seconds by the clock and, on a busy machine, of this processor; a minute at most."""
    clock, own = time.monotonic(), time.process_time()
    while not true():
        passed = time.monotonic() - clock
        assert passed < 60 and min(passed, time.process_time() - own) < seconds, "waited too long"
        time.sleep(0.02)
