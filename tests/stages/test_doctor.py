"""What the doctor finds, each fault by its kind, without loading weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import cli
from proxytune.errors import DataError, ModelError, RegistryError, SettingsError, TrioError
from proxytune.evaluation.intervals import Estimate
from proxytune.models.described import describe
from proxytune.models.loading import load_model
from proxytune.settings import Doctor, Evaluate, ModelRef, Remote
from proxytune.stages import doctor, effect, evaluate
from proxytune.stages.shared import memory
from tests.models.tiny_family import save_llama, tokenizer, with_long_row
from tests.remote import faults
from tests.remote.server import MODEL, Server

PROMPT = "Question: what follows 7?\nAnswer:"


def examine(place, **changes):
    return doctor.run(place.settings(Doctor, **({"forward": False} | changes)))


def with_base(place, folder: Path):
    return place.family.model_copy(update={"bases": {"base": ModelRef(model=str(folder))}})


def test_a_trio_that_fits_is_told_without_loading_its_weights(place, monkeypatch, capsys):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    found = examine(place, prompt=PROMPT)
    assert list(found) == ["lineage", "vocabulary", "ends", "soft caps", "prompts", "memory"]
    assert "a LoRA adapter of" in found["lineage"][0] and "alpha 1, since no sweep" in found["lineage"][1]
    assert found["vocabulary"][0].startswith("2,048 ids") and "base has 2,112 rows" in found["vocabulary"][1]
    assert "'<|endoftext|>' (0)" in found["ends"][0]
    assert all(repr(PROMPT) in line for line in found["prompts"]) and len(found["prompts"]) == 3
    shown = capsys.readouterr().out
    assert shown.count("ok ") == len(found) and "FAULT" not in shown
    assert not (place.outputs / "runs").exists()


def test_each_model_reads_the_prompt_once_and_its_likeliest_token_is_told(place):
    told = examine(place, prompt=PROMPT, forward=True)["forward"]
    assert [line.split(":")[0] for line in told] == ["base", "expert", "anti"]
    asked = torch.tensor([tokenizer()(PROMPT)["input_ids"]])
    for line, ref in ((told[0], place.family.base_ref), (told[2], place.family.small)):
        with torch.inference_mode():
            scores = load_model(ref, "float32")(asked).logits[0, -1, : len(tokenizer())]
        token = int(scores.argmax())
        assert f"{tokenizer().decode([token])!r} ({float(scores.softmax(-1)[token]):.1%})" in line


def test_no_weights_are_loaded_where_something_else_is_wrong(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ModelError, match="nowhere"):
        examine(place, prompt=PROMPT, family=with_base(place, tmp_path / "nowhere"), forward=True, effect=True)
    out = capsys.readouterr().out
    assert "FAULT forward     not looked at, since the above" in out
    assert "FAULT effect      not looked at, since the above" in out


def test_weights_that_are_no_numbers_are_a_fault(place, tmp_path):
    folder = Path(shutil.copytree(place.family.base_ref.model, tmp_path / "base"))
    weights = {name: weight * float("nan") for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="base gives NaN or infinity after the prompt"):
        examine(place, prompt=PROMPT, family=with_base(place, folder), forward=True)


def test_memory_is_what_the_loaded_models_take(place):
    found = examine(place, prompt=PROMPT)["memory"]
    for role, ref in (("base", place.family.base_ref), ("anti of qa@v1", place.family.small)):
        numbers = sum(weight.numel() for weight in load_model(ref, "float32").parameters())
        assert next(line for line in found if line.startswith(role)).startswith(f"{role}: {numbers:,} numbers")
        assert describe(ref).parameters == numbers
    assert "free on the cpu" in found[-1]


def test_models_larger_than_the_memory_are_refused_before_they_are_loaded(place, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000.0)
    with pytest.raises(ModelError, match=r"are needed on the cpu and 1 kB are free.*bfloat16"):
        examine(place, prompt=PROMPT)
    assert "ok    prompts" in capsys.readouterr().out  # the other checks were made all the same


def test_an_anti_that_changed_is_a_fault_of_the_trio_s_kind(place, tmp_path):
    manifest = place.outputs / "registry" / "qa" / "v1" / "manifest.json"
    other = Path(shutil.copytree(place.family.small.model, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    told = json.loads(manifest.read_text())
    told["anti"]["model"] = str(other)
    del told["check"]  # as written before manifests had one
    manifest.write_text(json.dumps(told))
    with pytest.raises(TrioError, match="its weights changed"):
        examine(place, prompt=PROMPT)


def test_a_base_of_another_vocabulary_is_a_fault(place, tmp_path):
    own = tokenizer().train_new_from_iterator(["some other text entirely"] * 9, vocab_size=400)
    with pytest.raises(TrioError, match="do not share a vocabulary"):
        examine(place, prompt=PROMPT, family=with_base(place, save_llama(tmp_path / "base", seed=5, own=own)))


def test_what_cannot_be_had_is_looked_for_once(place, tmp_path, monkeypatch, capsys):
    looks = []
    real = doctor.load_tokenizer
    monkeypatch.setattr(doctor, "load_tokenizer", lambda ref: looks.append(ref.model) or real(ref))
    with pytest.raises(ModelError, match="nowhere"):
        examine(place, prompt=PROMPT, family=with_base(place, tmp_path / "nowhere"))
    assert looks == [str(tmp_path / "nowhere")]
    shown = capsys.readouterr().out
    assert shown.count("cannot load the model") == 1 and "not looked at, since the above" in shown


def test_without_an_expert_the_rest_is_told_and_the_code_is_the_registry_s(place, capsys):
    with pytest.raises(RegistryError, match="no expert is named"):
        examine(place, prompt=PROMPT, expert="nobody")
    shown = capsys.readouterr().out
    assert "FAULT lineage" in shown and "ok    vocabulary" in shown and "small (plain" in shown


def test_soft_caps_that_differ_are_told(place, tmp_path):
    folder = Path(shutil.copytree(place.family.base_ref.model, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text()) | {"final_logit_softcapping": 30.0}
    (folder / "config.json").write_text(json.dumps(config))
    found = examine(place, prompt=PROMPT, family=with_base(place, folder))
    assert found["soft caps"] == ["capped: base at 30; undone before the models are mixed"]


@pytest.fixture
def server(trained):
    net = load_model(trained.family.base_ref, "float32")
    with Server("vllm", lambda ids: net(torch.tensor([ids])).logits[0], tokenizer()) as serving:
        yield serving


def test_of_a_server_all_findings_are_told_and_nothing_of_the_base_is_loaded(place, server):
    base = Remote(name="vllm", url=server.url, model=MODEL)
    found = examine(place, prompt=PROMPT, base=base)
    tests = [line.split(":")[0].split(maxsplit=1) for line in found["server"]]
    assert ["ok", "chosen ids"] in tests and ["ok", "prompt scores"] in tests and ["ok", "tokenizer"] in tests
    assert found["memory"][0] == f"base: at {server.url}; nothing of it is loaded here"
    assert "requests and" in found["server"][-1]
    with pytest.raises(SettingsError, match="effect=true needs"):
        examine(place, prompt=PROMPT, base=base, effect=True)


def test_a_server_that_lies_is_a_fault_named_by_its_test(place, server):
    server.faults = [faults.edited(faults.longer_prompt)]
    with pytest.raises(ModelError, match="failed the scores test"):
        examine(place, prompt=PROMPT, base=Remote(name="vllm", url=server.url, model=MODEL))


def test_the_effect_is_the_loss_that_evaluate_finds(place):
    settings = place.settings(Doctor, prompt=PROMPT, effect=True, alphas=[0.5, 1.0])
    expert = doctor.Patient(settings).experts[0]
    nats, ids, tokens = effect.measured(settings, expert)
    whole = place.settings(Evaluate, split="validation", generate=False, alpha=0.5, tuned=None)
    records = evaluate.measure(whole, expert, evaluate.asked(whole, expert), [0.5])
    for name, key in (("base", ("base", None)), ("expert", ("expert", None)), (0.5, ("steered", 0.5))):
        assert ids == [row["id"] for row in records[key]]
        assert nats[name].tolist() == pytest.approx([row["loss"] for row in records[key]], rel=1e-5)
        assert tokens.tolist() == [row["tokens"] for row in records[key]]
    told = "\n".join(examine(place, prompt=PROMPT, effect=True, alphas=[0.5, 1.0])["effect"])
    assert "nats a token on 8 validation rows" in told and "it helps" in told


def test_a_row_longer_than_a_context_has_no_part_in_the_effect(place, tmp_path, monkeypatch):
    longer = place.data.model_copy(update={"validation": with_long_row(place.data.validation, tmp_path)})
    told = examine(place, prompt=PROMPT, effect=True, alphas=[1.0], data=longer, rows=4)["effect"]
    assert told[0].startswith("nats a token on 3 validation rows")
    monkeypatch.setattr(effect.trios, "fits", lambda *_: False)
    with pytest.raises(DataError, match="first 4 validation rows are longer"):
        examine(place, prompt=PROMPT, effect=True, alphas=[1.0], data=longer, rows=4)


@pytest.mark.parametrize(
    ("base", "expert", "anti", "said"),
    [
        (2.0, 3.0, 3.0, "as if the adapter were not there"),
        (2.0, 3.5, 3.0, "worse on these rows than the model it was tuned from"),
        (3.5, 1.0, 3.0, "worse on these rows than the untuned small model"),
        (1.0, 2.0, 3.0, "the base is better than the expert already"),
        (2.5, 2.0, 3.0, "does not fit this base"),
    ],
)
def test_a_steering_without_effect_has_its_usual_reason_named(base, expert, anti, said):
    values = {"base": base, "expert": expert, "anti": anti}
    why, hint = effect.reason({k: Estimate(v, torch.zeros(1).numpy()) for k, v in values.items()}, [0.25, 1.0])
    assert said in why and hint


def test_an_expert_that_changes_nothing_is_a_fault(place, monkeypatch):
    real = effect.measured

    def same(settings, expert):
        nats, ids, tokens = real(settings, expert)
        alike = {name: nats["base"] if isinstance(name, float) else each for name, each in nats.items()}
        return alike | {"expert": nats["anti"]}, ids, tokens

    monkeypatch.setattr(effect, "measured", same)
    with pytest.raises(TrioError, match=r"does not help here; expert and anti score alike"):
        examine(place, prompt=PROMPT, effect=True, alphas=[1.0])


def test_the_command_ends_with_the_fault_s_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", "task=qa", "prompt=Hello", "expert=nobody"]) == RegistryError.exit_code
    told = capsys.readouterr()
    assert told.err.startswith("proxytune: ") and len(told.err.splitlines()) == 1 and "ok    memory" in told.out
