from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from proxytune.errors import DataError, RegistryError, SettingsError
from proxytune.experts.registry import Registry
from proxytune.models.identity import identify
from proxytune.models.loading import load_model, load_tokenizer
from proxytune.models.trio import load as load_trio
from proxytune.settings import Data, Expert, ModelRef
from proxytune.stages import expert
from proxytune.stages.shared import trio as trios
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


def preferences(path: Path, first: int, count: int) -> str:
    rows = [
        {
            "prompt": f"Question: what follows {i}?\nAnswer:",
            "chosen": f" {i + 1} follows {i}.\n",
            "rejected": f" Nothing follows {i}.\n",
        }
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tuned_on(place, tmp_path, **changes):
    """The registered `qa` tuned on by preferences, a few steps."""
    data = Data(
        source="files",
        train=preferences(tmp_path / "pairs.jsonl", 0, 24),
        validation=preferences(tmp_path / "held.jsonl", 100, 4),
        test=place.data.test,
    )
    method = {"name": "dpo", "max_steps": 3, "eval_strategy": "no", "learning_rate": 5e-3}
    return expert.run(place.settings(Expert, **({"data": data, "method": method, "from_": "qa@latest"} | changes)))


def test_a_chain_keeps_the_original_anti_and_every_expert_in_between(place, tmp_path):
    registry = Registry(place.outputs / "registry")
    first = registry.resolve("qa@v1")
    second = tuned_on(place, tmp_path)
    third = tuned_on(place, tmp_path, peft={"name": "lora", "r": 99})
    assert (second.reference, third.reference) == ("qa@v2", "qa@v3")
    assert (
        third.manifest.anti == first.manifest.anti == identify(place.family.small, load_tokenizer(place.family.small))
    )
    assert [(a.reference, a.method, a.kind) for a in third.manifest.lineage] == [
        ("qa@v1", "sft", "lora"),
        ("qa@v2", "dpo", "lora"),
    ]
    assert third.manifest.lineage[0].data == first.manifest.data
    assert third.manifest.lineage[1].files == trios.weights_of(second)
    assert third.manifest.config["peft"]["r"] == first.manifest.config["peft"]["r"], "an adapter keeps its shape"
    assert third.manifest.config["from"] == "qa@latest" and second.manifest.data.train == 24
    trio = load_trio(place.family.base_ref, [trios.files_of(third)], "float32")
    (tuned, anti), ids = trio.pairs[0], torch.tensor([7, 8, 9])
    assert tuned.source is anti.source, "one copy of the weights"
    scored = anti.source.score([[[5, 6]]], [ids.tolist()], (anti.member,))[0][0]
    untouched = load_model(place.family.small)(torch.tensor([[5, 6, 7, 8]])).logits[0, 1:4, : trio.vocabulary.size]
    assert torch.allclose(scored, untouched, atol=1e-5)
    made = [json.loads(line) for f in place.outputs.glob("runs/*/artifacts.jsonl") for line in f.open()]
    assert ["qa@v2"] in [row["uses"][1:] for row in made if row["name"] == "qa@v3"]


def test_whole_models_make_a_chain_of_two_models_and_an_anti_may_be_chosen(place, tmp_path):
    whole = expert.run(place.settings(Expert, name="whole", method=STEPS | {"max_steps": 2}, peft={"name": "none"}))
    second = tuned_on(place, tmp_path, from_="whole", name="whole", peft={"name": "none"})
    assert second.manifest.kind == "full" and second.manifest.anti == whole.manifest.anti
    other = tuned_on(place, tmp_path, from_="whole@v1", anti="start", name="other", peft={"name": "lora", "r": 2})
    own = ModelRef(model=str(whole.folder))
    assert other.manifest.anti == identify(own, load_tokenizer(own)) != whole.manifest.anti
    assert other.manifest.kind == "lora" and [a.reference for a in other.manifest.lineage] == ["whole@v1"]
    load_trio(place.family.base_ref, [trios.files_of(other)], "float32")


@pytest.mark.parametrize(
    "changes, error, told",
    [
        ({"from_": "qa-tuned"}, SettingsError, "is the base itself tuned, and model=small .add model=base"),
        ({"model": "base"}, SettingsError, "is the small model tuned, and model=base"),
        ({"from_": "qaa"}, RegistryError, "did you mean 'qa'"),
        ({"anti": "start"}, SettingsError, "is an adapter, and an anti is a whole model"),
        ({"data": "chat"}, SettingsError, "the rows are messages, and qa@v1 was tuned on texts"),
        ({"method": {"name": "dpo", "packing": True}}, SettingsError, "unknown key method.packing"),
        ({"method": {"name": "dpo", "beta": "high"}}, SettingsError, "method.beta='high'"),
    ],
)
def test_what_cannot_be_gone_on_from_is_told_before_training(place, tmp_path, changes, error, told):
    if changes.get("data") == "chat":
        rows = [
            {"prompt": [{"role": "user", "content": f"{i}?"}], **{
                name: [{"role": "assistant", "content": f"{name} {i}"}] for name in ("chosen", "rejected")}}
            for i in range(9)
        ]  # fmt: skip
        (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = {"data": Data(source="files", train=str(tmp_path / "chat.jsonl"))}
    with pytest.raises(error, match=told):
        tuned_on(place, tmp_path, **changes)
    assert Registry(place.outputs / "registry").versions("qa") == [1]
    assert not (place.outputs / "runs").exists()


def test_a_family_that_an_expert_is_not_of_is_refused(place, tmp_path):
    with pytest.raises(SettingsError, match="of the family random, and family=tiny"):
        tuned_on(place, tmp_path, family=place.family.model_copy(update={"name": "tiny"}))


def test_preferences_of_a_task_s_own_rows_need_no_file(place, tmp_path):
    made = tuned_on(place, tmp_path, data=Data(source="builtin", limit_train=8, limit_validation=4, limit_test=4))
    assert made.manifest.data.train == 8 and made.manifest.training["rewards/margins"] is not None


def test_samples_show_base_expert_and_steered_at_work_and_change_nothing(place):
    method = STEPS | {"max_steps": 4}
    plain = expert.run(place.settings(Expert, name="plain", method=method))
    shown = expert.run(place.settings(Expert, name="shown", method=method, sample_steps=2))
    assert trios.weights_of(shown) == trios.weights_of(plain)
    (table,) = place.outputs.glob("runs/*/tables/samples.jsonl")
    rows = [json.loads(line) for line in table.open()]
    assert [(row["step"], row["system"]) for row in rows] == [
        (step, system) for step in (2, 4) for system in ("base", "expert", "steered") for _ in range(3)
    ]
    texts = {(row["step"], row["system"], row["prompt"]): row["text"] for row in rows}
    for (step, system, prompt), text in texts.items():
        if system == "base" and step == 2:
            assert text == texts[4, "base", prompt], "the base never moves"
    assert any(texts[2, "expert", p] != texts[4, "expert", p] for _, _, p in texts), "the expert does"
