from __future__ import annotations

import json

import pytest

from proxytune.errors import DataError, RegistryError, SettingsError
from proxytune.experts.registry import Registry
from proxytune.models.identity import identify
from proxytune.models.loading import load_tokenizer
from proxytune.settings import Data, Expert
from proxytune.stages import expert
from tests.models.tiny_family import write_rows
from tests.stages.conftest import STEPS


def test_an_expert_carries_its_whole_lineage(trained):
    registry = Registry(trained.outputs / "registry")
    small, base = registry.resolve("qa@v1").manifest, registry.resolve("qa-tuned@v1").manifest
    assert (small.role, small.kind, small.prompt_format) == ("expert", "lora", "plain")
    assert (base.role, base.kind) == ("tuned", "lora")
    for manifest, ref in ((small, trained.family.small), (base, trained.family.base_ref)):
        assert manifest.anti == identify(ref, load_tokenizer(ref))
    assert (small.data.train, small.data.validation, small.data.test) == (40, 8, 9)
    assert small.data.fingerprint == base.data.fingerprint
    assert small.config["method"]["max_steps"] == 12 and small.command == "proxytune of a test"
    assert small.training["steps"] == 12 and small.training["loss"] > 0


def test_a_training_leaves_a_record_and_no_checkpoints(trained):
    runs = [json.loads(file.read_text()) for file in trained.outputs.glob("runs/expert-*/run.json")]
    assert [run["status"] for run in runs] == ["finished", "finished"]
    assert [
        path for path in (trained.outputs / "training").rglob("*") if path.is_file() and path.suffix != ".lock"
    ] == []
    (made,) = [
        json.loads(line)
        for file in trained.outputs.glob("runs/expert-*/artifacts.jsonl")
        for line in file.read_text().splitlines()
        if '"qa@v1"' in line
    ]
    assert made["kind"] == "model" and made["uses"][0].startswith("qa-rows@")


def test_rows_of_messages_make_a_chat_expert_and_held_out_prompts_are_dropped_aloud(place, tmp_path, capsys):
    data = Data(
        source="files",
        train=write_rows(tmp_path / "train.jsonl", 0, 8, chat=True),
        test=write_rows(tmp_path / "test.jsonl", 7, 2, chat=True),
    )
    made = expert.run(
        place.settings(Expert, data=data, name="talker", method=STEPS | {"max_steps": 2}, peft={"name": "none"})
    )
    assert (made.manifest.prompt_format, made.manifest.kind) == ("chat", "full")
    assert "proxytune: 1 train rows dropped" in capsys.readouterr().err


def test_rows_of_both_kinds_are_refused(place, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", 0, 4)
    data = Data(source="files", train=train, validation=write_rows(tmp_path / "v.jsonl", 9, 4, chat=True))
    with pytest.raises(DataError, match="some are messages"):
        expert.run(place.settings(Expert, data=data))


@pytest.mark.parametrize(
    "changes, error, told",
    [
        ({"name": "No Name"}, RegistryError, "cannot name an expert"),
        ({"method": {"name": "sft", "max_step": 3}}, SettingsError, "did you mean 'max_steps'"),
        ({"task": {"name": "qaa"}}, SettingsError, "did you mean 'qa'"),
    ],
)
def test_a_slip_is_told_before_anything_is_registered(place, changes, error, told):
    with pytest.raises(error, match=told):
        expert.run(place.settings(Expert, **changes))
    assert Registry(place.outputs / "registry").versions("qa") == [1]


def test_an_expert_without_training_rows_is_refused(place):
    with pytest.raises(DataError, match=r"no train rows.*data\.train"):
        expert.run(place.settings(Expert, data=Data(source="files", test=place.data.test)))
