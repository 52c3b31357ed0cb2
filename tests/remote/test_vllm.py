"""vLLM's own server with the embedded base, against the loop with the base in this process.

vLLM lives in an environment of its own (`make vllm-env`), whose Python PROXYTUNE_VLLM_PYTHON names; it takes a minute
to start. PROXYTUNE_VLLM_URL names one that runs already, started as below.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from proxytune.decoding.engine import Engine
from proxytune.decoding.mixture import Mixture
from proxytune.decoding.remote import Counts, small
from proxytune.decoding.remote_scoring import Weigher
from proxytune.decoding.request import Limits, Request
from proxytune.decoding.scoring import Given, losses
from proxytune.decoding.served import Served
from proxytune.experts.registry import Registry
from proxytune.files import resource
from proxytune.models import trio as trios
from proxytune.models.dialects import dialect
from proxytune.models.loading import load_tokenizer
from proxytune.models.probe import probe
from proxytune.models.remote import RemoteBase
from proxytune.settings import Remote
from proxytune.stages.serve import listening
from proxytune.stages.shared.trio import files_of
from proxytune.steering.choice import Sampling
from proxytune.tasks import catalog
from tests.remote.embedded import BASE, SIZE, asked, holds, mixture

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("PROXYTUNE_VLLM_PYTHON", str(ROOT / ".vllm" / "bin" / "python"))
RUNNING = os.environ.get("PROXYTUNE_VLLM_URL")
pytestmark = pytest.mark.skipif(
    not (RUNNING or Path(PYTHON).is_file()), reason="vLLM's environment is not there: make vllm-env"
)


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Generator[str]:
    if RUNNING:
        yield RUNNING
        return
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
    remote = Remote(name="vllm", url=url, model="tiny", top=100, draft_tokens=7, in_flight=50)
    base = RemoteBase(remote, dialect("vllm"))
    return Served(base, asyncio.run(probe(base, load_tokenizer(BASE), SIZE)))


@pytest.fixture(scope="module")
def steered(tmp_path_factory) -> tuple[trios.Trio, Mixture]:
    """The embedded base and an expert of `qa`, tuned and registered by the command."""
    outputs = tmp_path_factory.mktemp("tuned") / "outputs"
    command = [sys.executable, "-m", "pipelines.cli", "expert", "task=qa", "tracker=local", f"outputs={outputs}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    expert = Registry(outputs / "registry").resolve("qa@latest")
    trio = trios.load(BASE, (files_of(expert),), "float32")
    return trio, Mixture(trio.base, trio.vocabulary, trio.pairs)


def compared(served: Served, mix: Mixture, requests: list[Request]) -> Counts:
    """What it took to say what the local loop says, wherever that is certified."""
    tokenizer = load_tokenizer(BASE)
    local = dict(Engine(mix, tokenizer, batch_size=len(requests)).run(requests))
    engine = served.engine(mix.pairs, mix.vocabulary, tokenizer)
    found, counts = dict(engine.run(requests)), engine.counts
    holds([found[i] for i in range(len(requests))], [local[i].token_ids for i in range(len(requests))])
    same = sum(found[i].token_ids == local[i].token_ids for i in range(len(requests)))
    print(
        f"{counts.tokens} tokens, {counts.certified_share:.4f} certified, {counts.calls_per_token:.3f} calls a token, "
        f"acceptance {counts.acceptance}, {same} of {len(requests)} replies the same"
    )
    return counts


def test_the_probe_finds_what_vllm_does(served):
    seen = {test: outcome for test, outcome, _ in served.probe.rows()}
    assert served.probe.model == "tiny" and served.probe.abilities.top >= SIZE
    assert served.probe.abilities.prompt_scores and served.probe.abilities.chosen > 0
    assert seen["tokenizer"] == "ok" and seen["token ids"] == "ok"


@pytest.mark.parametrize("choice", [Sampling(), Sampling(0.8), Sampling(0.8, top_p=0.9)], ids=["greedy", ".8", "top-p"])
def test_on_100_prompts_certified_tokens_are_the_local_loop_s_and_drafts_save_calls(served, choice):
    counts = compared(served, mixture(), asked(100, (choice,)))
    assert counts.certified_share > 0.95 and counts.calls_per_token < 1


@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 0.0), (0.5, 0.3), (1.0, 0.0), (1.0, 0.3)])
def test_where_seven_of_ten_drafts_hold_a_token_takes_at_most_0_4_calls(served, steered, alpha, temperature):
    trio, mix = steered
    task = catalog.get("qa")
    limits = Limits(task.max_new_tokens, trio.end_ids, task.stop)
    requests = [
        Request(trio.encode(row["prompt"]), limits, (alpha,), Sampling(temperature, seed=n))
        for n, row in enumerate(task.builtin()["test"][:100])
    ]
    counts = compared(served, mix, requests)
    assert counts.acceptance >= 0.7 and counts.calls_per_token <= 0.4 and counts.certified_share > 0.99


def test_a_server_that_gives_20_scores_is_asked_for_ids_instead(served):
    """Many at once, so that the server could answer such questions together with others."""
    abilities = replace(served.probe.abilities, top=20, prompt_scores=False)
    few = Served(served.base, replace(served.probe, abilities=abilities))
    counts = compared(few, mixture(), asked(32, (Sampling(0.8),)))
    assert counts.certified_share > 0.9


def test_losses_of_given_replies_are_the_local_ones(served):
    mix = mixture()
    rows = [Given(replace(r).prompts, [5 + i, 40, 7 * i + 3, 0]) for i, r in enumerate(asked(6, (Sampling(),)))]
    with torch.inference_mode():
        (here,) = losses(mix, rows, [(0.0,), (1.0,)], batch_size=6)
    there = dict(Weigher(served, small(mix.pairs, mix.vocabulary)).losses(rows, [(0.0,), (1.0,)]))
    assert [there[i].nats for i in range(6)] == [pytest.approx(each, abs=2e-3) for each in here]
