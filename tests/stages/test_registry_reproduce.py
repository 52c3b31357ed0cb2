"""A registered expert trained again from its manifest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pipelines import cli
from proxytune.errors import DataError, RegistryError, SettingsError
from proxytune.experts.registry import Registry
from proxytune.stages import reproduce
from tests.models.tiny_family import write_rows


def again(place, reference: str = "qa@v1", **changes: Any):
    return reproduce.run(reference, {"outputs": str(place.outputs), "tracker": "none"} | changes, "a test")


def test_an_expert_trained_again_from_its_manifest_has_the_same_weights_byte_for_byte(place, capsys):
    outputs = f"outputs={place.outputs}"
    assert cli.main(["expert", "--from-manifest", "qa@v1", outputs, "tracker=none", "threads=1"]) == 0
    assert "the weights of qa@v2 are those of qa@v1, byte for byte" in capsys.readouterr().out
    registry = Registry(place.outputs / "registry")
    first, second = registry.resolve("qa@v1").manifest, registry.resolve("qa@v2").manifest
    assert first.files["adapter_model.safetensors"] == second.files["adapter_model.safetensors"]
    assert (first.anti, first.data, first.lineage) == (second.anti, second.data, second.lineage)
    assert second.command == f"proxytune expert --from-manifest qa@v1 {outputs} tracker=none threads=1"
    for section in ("method", "peft", "family", "seed"):
        assert first.config[section] == second.config[section]


def test_weights_that_came_out_otherwise_are_told_with_how_far_apart_they_are(place, capsys):
    registry = Registry(place.outputs / "registry")
    with registry.staging() as folder:
        shutil.copytree(registry.resolve("qa@v1").folder, folder, dirs_exist_ok=True)
        tensors = load_file(folder / "adapter_model.safetensors")
        name = next(iter(tensors))
        tensors[name].view(-1)[0] += 0.5
        save_file(tensors, folder / "adapter_model.safetensors")
        registry.publish(folder, registry.resolve("qa@v1").manifest)
    again(place, "qa@v2")
    assert "the weights of qa@v3 differ from those of qa@v2 by at most 0.5\n" in capsys.readouterr().out


def test_other_rows_are_refused_and_the_same_rows_elsewhere_are_taken(place, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", 0, 41)
    with pytest.raises(DataError, match="the rows are not those of qa@v1: 41 train rows here, 40 there"):
        again(place, data={"train": other})
    moved = Path(shutil.copy(place.data.train, tmp_path / "moved.jsonl"))
    assert again(place, data={"train": str(moved)}, name="moved").reference == "moved@v1"


def test_another_checkpoint_under_the_same_name_is_refused(place, tmp_path, monkeypatch):
    registry = Registry(place.outputs / "registry")
    like = registry.resolve("qa@v1").manifest
    strange = like.model_copy(update={"anti": like.anti.model_copy(update={"weights": "0" * 64})})
    strange.write(registry.resolve("qa@v1").folder)
    with pytest.raises(RegistryError, match="is not the checkpoint that qa@v1 was tuned from"):
        again(place)
    assert registry.versions("qa") == [1]


def poisoned(place, **changes: Any):
    registry = Registry(place.outputs / "registry")
    like = registry.resolve("qa@v1")
    like.manifest.model_copy(update={"config": like.manifest.config | changes}).write(like.folder)


def test_a_manifest_that_asks_for_a_self_rewarding_run_is_refused_before_anything_is_asked(place, monkeypatch):
    """Nobody would hold its rows and models against the manifest, and its judge may be anybody's server."""
    judge = {"by": "m", "url": "https://nowhere.invalid/v1", "key": "HF_TOKEN"}
    poisoned(place, method={"name": "self_rewarding", "judge": judge})
    monkeypatch.setattr("proxytune.stages.self_rewarding.method.run", lambda settings: pytest.fail("it ran"))
    with pytest.raises(RegistryError, match="the manifest of qa@v1 says method=self_rewarding"):
        again(place)


def test_the_tracker_of_somebody_else_s_manifest_is_not_taken(place):
    tracker = {"name": "wandb", "entity": "strangers", "project": "theirs"}
    manifest = Registry(place.outputs / "registry").resolve("qa@v1").manifest
    manifest = manifest.model_copy(update={"config": manifest.config | {"tracker": tracker}})
    origin = {"reference": "qa@v1", "source": "hub:org/qa", "manifest": "0" * 64}
    imported = manifest.model_validate(manifest.model_dump() | {"origins": [origin]})
    assert reproduce._values(manifest, {})["tracker"] == tracker
    assert reproduce._values(imported, {})["tracker"] == {}
    assert reproduce._values(imported, {"tracker": "none"})["tracker"] == {"name": "none"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"max_steps": 3}}, "method would change it"),
        ({"seed": 1}, "seed would change it"),
        ({"launch": "ddp"}, "launch would change it"),
        ({"output": "x"}, "did you mean 'outputs'"),
        ({"threads": "many"}, "threads='many'"),
    ],
)
def test_what_would_change_the_recipe_is_refused(place, changes, said):
    with pytest.raises(SettingsError, match=said):
        again(place, **changes)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--from-manifest", ""], 6, "''"),
        (["--from-manifest", "qa", "--cfg", "job"], 2, "--cfg does not go with --from-manifest"),
        (["--from-manifest", "qa", "-m", "--config-dir", "x"], 2, "--config-dir --multirun does not go with"),
        (["--from-manifest", "qa", "tracker=null"], 2, "tracker=None"),
        (["--from-manifest", "qa", "data="], 2, "data=None"),
        (["--from-manifest", "qa", "name=["], 2, "cannot read 'outputs="),
        (["--from-manifest", "qa", "name=${"], 2, "cannot read 'outputs="),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else None,
)
def test_a_slip_trains_nothing(place, arguments, code, said, capsys):
    assert cli.main(["expert", f"outputs={place.outputs}", *arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and Registry(place.outputs / "registry").versions("qa") == [1]
