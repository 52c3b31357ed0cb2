"""vLLM's own server with the embedded base, against the loop with the base in this process.

vLLM lives in an environment of its own (`make vllm-env`), whose Python PROXYTUNE_VLLM_PYTHON names; it takes a minute
to start.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
import urllib.request
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from proxytune.decoding.engine import Engine
from proxytune.decoding.remote import small
from proxytune.decoding.remote_scoring import Weigher
from proxytune.decoding.scoring import Given, losses
from proxytune.decoding.served import Served
from proxytune.files import resource
from proxytune.models.dialects import dialect
from proxytune.models.loading import load_tokenizer
from proxytune.models.probe import probe
from proxytune.models.remote import RemoteBase
from proxytune.settings import Remote
from proxytune.stages.serve import listening
from proxytune.steering.choice import Sampling
from tests.remote.embedded import BASE, SIZE, asked, mixture

PYTHON = os.environ.get("PROXYTUNE_VLLM_PYTHON", str(Path(__file__).resolve().parents[2] / ".vllm" / "bin" / "python"))
pytestmark = pytest.mark.skipif(not Path(PYTHON).is_file(), reason="vLLM's environment is not there: make vllm-env")


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Generator[str]:
    with listening("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(resource("data") / "tiny" / "base")]
    command += ["--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--max-logprobs", "-1"]
    command += ["--max-model-len", "512", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"})
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(server, address, log)
            yield address
        finally:
            server.terminate()
            server.wait(timeout=60)


def _wait(server: subprocess.Popen, address: str, log: Path, seconds: float = 540) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            pytest.fail(f"vLLM ended at its start:\n{log.read_text(errors='replace')[-3000:]}")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2)
            return
        except OSError:
            time.sleep(1)
    pytest.fail(f"vLLM did not start within {seconds:g} s")


@pytest.fixture(scope="module")
def served(url) -> Served:
    remote = Remote(name="vllm", url=url, model="tiny", top=100, draft_tokens=4, in_flight=8)
    base = RemoteBase(remote, dialect("vllm"))
    return Served(base, asyncio.run(probe(base, load_tokenizer(BASE), SIZE)))


def test_the_probe_finds_what_vllm_does(served):
    seen = {test: outcome for test, outcome, _ in served.probe.rows()}
    assert served.probe.model == "tiny" and served.probe.abilities.top >= SIZE
    assert served.probe.abilities.prompt_scores and served.probe.abilities.chosen > 0
    assert seen["tokenizer"] == "ok" and seen["token ids"] == "ok"


def test_certified_tokens_are_the_local_loop_s_and_drafts_save_calls(served):
    mix, tokenizer = mixture(), load_tokenizer(BASE)
    requests = asked(12, (Sampling(), Sampling(0.8)))
    local = dict(Engine(mix, tokenizer, batch_size=12).run(requests))
    engine = served.engine(mix.pairs, mix.vocabulary, tokenizer)
    for i, reply in engine.run(requests):
        for mine, certified, theirs in zip(reply.token_ids, reply.certified, local[i].token_ids, strict=False):
            assert mine == theirs or not certified
            if mine != theirs:
                break
    counts = engine.counts
    print(
        f"{counts.certified_share:.3f} certified, {counts.calls_per_token:.2f} calls a token, {counts.acceptance:.2f}"
    )
    assert counts.certified_share > 0.9


def test_losses_of_given_replies_are_the_local_ones(served):
    mix = mixture()
    rows = [Given(replace(r).prompts, [5 + i, 40, 7 * i + 3, 0]) for i, r in enumerate(asked(6, (Sampling(),)))]
    with torch.inference_mode():
        (here,) = losses(mix, rows, [(0.0,), (1.0,)], batch_size=6)
    there = dict(Weigher(served, small(mix.pairs, mix.vocabulary)).losses(rows, [(0.0,), (1.0,)]))
    assert [there[i].nats for i in range(6)] == [pytest.approx(each, abs=2e-3) for each in here]
