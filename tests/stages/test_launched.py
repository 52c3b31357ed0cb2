"""A real training over two processes of this machine, killed once on its way."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from proxytune.experts.registry import Registry
from proxytune.settings import Expert
from proxytune.stages import expert

FIELDS = {"name": "sft", "max_steps": 60, "save_steps": 4, "logging_steps": 5, "per_device_train_batch_size": 2}
PROGRAM = """
import os, pathlib, signal, threading, time
from proxytune.settings import Expert
from proxytune.stages import expert

def look():
    while not list(pathlib.Path({outputs!r}).glob("training/*/checkpoints/checkpoint-{step}/complete.json")):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=look, daemon=True).start()
expert.run(Expert.model_validate_json({settings!r}))
"""


def killed_after(step: int, settings: Expert, warm) -> None:
    """The training in a process of its own, which is killed once the checkpoint of that step is complete."""
    told = {"outputs": str(settings.outputs), "step": step, "settings": settings.model_dump_json()}
    done = warm.run([], program=PROGRAM.format(**told))
    assert done.code == -signal.SIGKILL, f"it ended before it could be killed: {done.err}"


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.slow
def test_two_processes_train_the_weights_of_one_with_twice_the_accumulation_also_when_killed_on_the_way(warm, place):
    alone = place.settings(Expert, name="alone", method=FIELDS | {"gradient_accumulation_steps": 2})
    both = place.settings(Expert, name="both", method=FIELDS, launch={"name": "ddp", "processes": 2})
    one = expert.run(alone)
    killed_after(4, both, warm)
    two = expert.run(both)

    assert two.manifest.training["resumed_from"] is not None, "the checkpoints of both ranks were complete"
    mine, theirs = (load_file(made.folder / "adapter_model.safetensors") for made in (one, two))
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert one.manifest.training["loss"] == pytest.approx(two.manifest.training["loss"], rel=1e-5)

    registry = Registry(place.outputs / "registry")
    assert registry.versions("both") == [1], "one of the ranks at most registers"
    runs = [file.parent for file in place.outputs.glob("runs/*/run.json")]
    assert len(runs) == 3, "ranks have no records"
    (first,) = [run for run in runs if "alone@v1" in registered(run)]
    (last,) = [run for run in runs if "both@v1" in registered(run)]
    after = losses(last)[1:]  # the first one after the kill is a mean of fewer steps
    assert after == pytest.approx(losses(first)[-len(after) :], rel=1e-5)
    left = [path.name for path in (place.outputs / "training").iterdir() if path.suffix != ".lock"]
    assert left == [], "neither checkpoints nor what ranks wrote"


def registered(run: Path) -> str:
    file = run / "artifacts.jsonl"
    return file.read_text() if file.exists() else ""
