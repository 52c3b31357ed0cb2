"""Trainings whose weights are split over two processes by FSDP2, on CPUs: what comes out is what one process makes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from proxytune.experts import launch
from proxytune.settings import Expert
from proxytune.stages import expert

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks would take the GPU")
FIELDS = {"name": "sft", "logging_steps": 1, "per_device_train_batch_size": 2}


class Killed(BaseException):
    pass


@pytest.fixture
def sharded(monkeypatch):
    """`launch=fsdp2` over CPUs. after: called once the ranks have ended well; log: gets what they measure."""
    spread, hooks = launch.spread, {"after": lambda: None, "log": lambda values, step: None}

    def over_cpus(asked, folder, module, settings, log):
        def both(values, step):
            hooks["log"](values, step)
            log(values, step)

        spread(asked, folder, "tests.stages.sharded_rank", settings, both)
        hooks["after"]()

    monkeypatch.setattr(launch, "devices", lambda: 2)
    monkeypatch.setattr(launch, "spread", over_cpus)
    return hooks


def same_weights(one, other) -> bool:
    """Of the same names, and but for rounding, which some dozens of steps make larger."""
    mine, theirs = (load_file(next(made.folder.glob("*.safetensors"))) for made in (one, other))
    assert mine.keys() == theirs.keys()
    return all(torch.allclose(mine[name], theirs[name], rtol=1e-3, atol=2e-4) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["none", pytest.param("lora", marks=pytest.mark.crash)])
def test_split_weights_train_as_one_process_does_with_twice_the_accumulation_also_when_killed(place, sharded, peft):
    shape, fields = {"name": peft}, FIELDS | {"max_steps": 20, "save_steps": 4, "save_total_limit": 9}
    alone = expert.run(place.settings(Expert, peft=shape, method=fields | {"gradient_accumulation_steps": 2}))
    both = place.settings(Expert, name="both", peft=shape, method=fields, launch={"name": "fsdp2"})

    def kill(values, step):
        if step > 8:
            raise Killed

    sharded["log"] = kill
    with pytest.raises(Killed):
        expert.run(both)
    (folder,) = place.outputs.glob("training/*/checkpoints/checkpoint-8")
    assert (folder / "optimizer.bin").exists() and not (folder / "optimizer.pt").exists(), "as FSDP writes it"
    sharded["log"] = lambda values, step: None
    split = expert.run(both)

    assert split.manifest.training["resumed_from"] is not None
    assert split.manifest.training["loss"] == pytest.approx(alone.manifest.training["loss"], rel=1e-3)
    assert {file.name for file in split.folder.iterdir()} == {file.name for file in alone.folder.iterdir()}
    assert same_weights(split, alone)


@pytest.mark.slow
@pytest.mark.crash
def test_the_best_of_split_weights_is_registered_also_when_killed_while_it_is_written(place, sharded):
    worst = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    fields = FIELDS | worst | {"max_steps": 6, "eval_steps": 2}  # so the best is not also the last
    alone = expert.run(place.settings(Expert, method=fields | {"gradient_accumulation_steps": 2}))
    both = place.settings(Expert, name="both", method=fields, launch={"name": "fsdp2"})

    def kill():
        (marker,) = place.outputs.glob("training/*/finished.json")
        marker.unlink()
        raise Killed

    sharded["after"] = kill
    with pytest.raises(Killed):
        expert.run(both)
    sharded["after"] = lambda: None
    split = expert.run(both)

    found, whole = split.manifest.training, alone.manifest.training
    assert (found["steps"], found["resumed_from"]) == (6, "checkpoint-6")
    assert found["best_step"] == whole["best_step"] == 2
    assert found["validation_loss"] == pytest.approx(whole["validation_loss"], rel=1e-5)
    assert same_weights(split, alone)
