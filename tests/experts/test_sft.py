"""Real trainings of a random model: a few steps each."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from proxytune.errors import ModelError, SettingsError, StorageError
from proxytune.experts import fields, sft
from proxytune.experts.starting import Start, check_peft, tokenizer_for
from proxytune.experts.tuning import Job
from proxytune.models.loading import load_model
from proxytune.settings import Method, ModelRef, Peft
from tests.models.tiny_family import TRAINING, save_llama, tokenizer, write_rows

FIELDS = TRAINING | {"max_steps": 8, "save_steps": 2, "logging_steps": 1, "eval_strategy": "no"}


def rows(folder: Path, chat: bool = False) -> dict[str, list]:
    named = {split: write_rows(folder / f"{split}.jsonl", first, n, chat=chat) for split, first, n in SPLITS}
    return {split: [json.loads(line) for line in Path(path).read_text().splitlines()] for split, path in named.items()}


SPLITS = (("train", 0, 40), ("validation", 100, 4))


def job(folder: Path, ref: ModelRef, *, peft: Peft = Peft(r=4), chat: bool = False, log=None, **changes) -> Job:  # noqa: B008
    return Job(
        Start(ref),
        tokenizer_for(ref, None, chat),
        Method(**(FIELDS | changes)),
        peft,
        folder / "work",
        seed=3,
        log=log or (lambda values, step: None),
    )


def train(folder: Path, ref: ModelRef, *, chat: bool = False, **changes):
    return sft.train(rows(folder, chat), job(folder, ref, chat=chat, **changes))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def uninterrupted(small, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("whole"), small)[0]


def killed(warm, folder: Path, ref: ModelRef, after: int):
    """The same training in a process that is killed, for good, once step `after` was logged."""
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tests.experts.test_sft import ModelRef, train\n"
        f"def log(values, step):\n    if step > {after}: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"train(Path({str(folder)!r}), ModelRef(model={ref.model!r}), log=log)\n"
    )
    return warm.run([], program=program)


def test_a_killed_training_goes_on_to_the_very_weights_of_an_uninterrupted_one(warm, small, uninterrupted, tmp_path):
    done = killed(warm, tmp_path, small, after=5)
    assert done.code == -signal.SIGKILL, done.err
    finished, figures = train(tmp_path, small)
    assert figures["resumed_from"] == "checkpoint-4" and figures["steps"] == 8
    mine, whole = weights(finished), weights(uninterrupted)
    assert mine.keys() == whole.keys() and all(torch.equal(mine[name], whole[name]) for name in whole)


@pytest.mark.parametrize("peft", [Peft(r=4), Peft(name="none")], ids=["lora", "full"])
def test_training_learns_and_what_it_saves_differs_from_the_anti(small, tmp_path, peft):
    losses = []
    finished, figures = train(
        tmp_path, small, peft=peft, log=lambda values, step: losses.append(values.get("train/loss"))
    )
    losses = [loss for loss in losses if loss]
    assert losses[-1] < losses[0] and figures["loss"] == losses[-1]
    anti = load_model(small)
    expert = load_model(small, adapter=finished) if peft.name == "lora" else load_model(ModelRef(model=str(finished)))
    ids = torch.tensor([tokenizer()("Question: what follows 7?").input_ids])
    assert not torch.allclose(expert(ids).logits, anti(ids).logits, atol=1e-3)
    trained = sum(p.numel() for p in anti.parameters())
    assert figures["trained_parameters"] == trained if peft.name == "none" else figures["trained_parameters"] < trained


def test_a_finished_expert_names_its_base_as_the_user_did_and_nothing_of_the_trainer(small, uninterrupted):
    config = json.loads((uninterrupted / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == small.model
    assert not {"training_args.bin", "README.md"} & {file.name for file in uninterrupted.iterdir()}


def labels(
    ref: ModelRef, folder: Path, chat: bool, given: list | None = None, **changes
) -> list[tuple[str, list[int]]]:
    """(the text whose loss counts, its ids) of each given row, else the first, as the trainer's loader serves it."""
    one = job(folder, ref, peft=Peft(r=2), chat=chat, **changes)
    config = fields.configure(one.method, folder / "out", seed=0, evaluate=False)
    split = {"train": given or rows(folder, chat)["train"][:1], "validation": []}
    trainer = sft.trainer(load_model(ref), config, split, one)
    found = []
    for batch in trainer.get_train_dataloader():
        for ids, counted in zip(batch["input_ids"], batch["labels"], strict=True):
            assert torch.equal(counted[counted != -100], ids[counted != -100])
            kept = counted[counted != -100].tolist()
            found.append((one.tokenizer.decode(kept), kept))
    return found


def test_the_loss_is_on_the_completion_alone_and_its_eos(small, tmp_path):
    ((text, ids),) = labels(small, tmp_path, chat=False)
    assert text == " 1 follows 0.\n<|endoftext|>" and ids[-1] == tokenizer().eos_token_id


def test_the_loss_of_messages_is_on_the_assistant_s_turn_and_its_end(small, tmp_path):
    ((text, _),) = labels(small, tmp_path, chat=True)
    assert text.startswith("1 follows 0.<|end|>") and "Question" not in text


def configured(folder: Path, *, evaluate: bool = True, seed: int = 1, defaults=None, **given):
    return fields.configure(Method(**given), folder, seed=seed, evaluate=evaluate, defaults=defaults)


@pytest.mark.parametrize(
    "field, value",
    [("learning_rate", 0.125), ("max_length", 77), ("packing", True), ("optim", "adafactor"), ("warmup_steps", 5),
     ("neftune_noise_alpha", 3.0), ("save_total_limit", 9), ("gradient_checkpointing", True), ("seed", 11)],
)  # fmt: skip
def test_a_field_reaches_the_trainer_under_trl_s_own_name(tmp_path, field, value):
    assert getattr(configured(tmp_path, **{field: value}), field) == value


@pytest.mark.parametrize(
    ("cuda", "bf16", "taken"), [(False, False, "neither"), (True, True, "bf16"), (True, False, "fp16")]
)
def test_mixed_precision_goes_by_the_hardware(monkeypatch, cuda, bf16, taken):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    chosen = fields._machine(seed=0)
    assert (chosen["bf16"], chosen["fp16"]) == (taken == "bf16", taken == "fp16")
    assert chosen["use_cpu"] is not cuda and chosen["gradient_checkpointing"] is cuda


def test_steps_added_up_are_one_of_as_many_rows(small, tmp_path):
    made = {}
    for rows_a_step, steps in ((4, 1), (2, 2)):
        changes = {"per_device_train_batch_size": rows_a_step, "gradient_accumulation_steps": steps, "max_steps": 3}
        made[steps], _ = train(tmp_path / str(steps), small, **changes)
    one, two = (weights(folder) for folder in made.values())
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-5) for name in one)


def test_null_leaves_a_field_to_trl_and_the_run_s_seed_is_the_trainer_s(tmp_path):
    from trl import SFTConfig

    config = configured(tmp_path, learning_rate=None, seed=7)
    assert config.learning_rate == SFTConfig.__dataclass_fields__["learning_rate"].default
    assert (config.seed, config.data_seed, config.report_to) == (7, 7, [])


@pytest.mark.parametrize(
    "given, told",
    [
        ({"early_stoping_patience": 1}, "did you mean 'early_stopping_patience'"),
        ({"lerning_rate": 1}, "method.lerning_rate.*did you mean 'learning_rate'"),
        ({"optim": "magic"}, "method: .*magic"),
        ({"learning_rate": "fast"}, "method.learning_rate='fast': Input should be a valid number"),
    ],
)
def test_a_field_that_trl_does_not_have_or_refuses_is_told(tmp_path, given, told):
    with pytest.raises(SettingsError, match=told):
        configured(tmp_path, **given)


@pytest.mark.parametrize("source", ["method", "family.training"])
@pytest.mark.parametrize(
    "given",
    [
        {"chat_template_path": "org/model"},
        {"trust_remote_code": True},
        {"model_init_kwargs": {"trust_remote_code": True}},
        {"push_to_hub": True},
        {"hub_token": "hf_x"},
        {"report_to": "all"},
        {"trackio_space_id": "org/space"},
    ],
)
def test_no_field_loads_or_sends_what_nobody_looks_at(given, source):
    with pytest.raises(SettingsError, match=rf"^{source}\.{next(iter(given))} cannot be set"):
        fields.given(Method(**given)) if source == "method" else fields.given(Method(), given)


@pytest.mark.parametrize(
    "given, when",
    [
        ({}, ("epoch", "epoch")),
        ({"save_steps": 5}, ("steps", "epoch")),
        ({"eval_steps": 5}, ("epoch", "steps")),
        ({"eval_steps": 5, "early_stopping_patience": 2}, ("steps", "steps")),
        ({"save_steps": 5, "load_best_model_at_end": True}, ("steps", "steps")),
        ({"eval_strategy": "no", "save_strategy": "steps"}, ("steps", "no")),
    ],
)
def test_saving_and_measuring_are_by_steps_where_steps_are_given_and_the_best_is_saved_where_measured(
    tmp_path, given, when
):
    config = configured(tmp_path, **given)
    assert (config.save_strategy, config.eval_strategy) == when
    if config.load_best_model_at_end:
        assert config.save_steps == config.eval_steps == 5


def test_the_best_cannot_be_found_without_validation_rows(tmp_path):
    with pytest.raises(SettingsError, match="none are measured"):
        configured(tmp_path, evaluate=False, early_stopping_patience=1)


def test_the_family_s_defaults_give_way_to_the_user_s_fields(tmp_path):
    config = configured(tmp_path, max_length=9, defaults={"max_length": 5, "learning_rate": 0.5, "no_such": 1})
    assert (config.max_length, config.learning_rate) == (9, 0.5)


def test_a_training_shows_one_bar_and_nothing_of_the_libraries(small, tmp_path, capfd, recwarn):
    capfd.readouterr()
    train(tmp_path, small, max_steps=2)
    out, err = capfd.readouterr()
    (line,) = err.strip().splitlines()
    assert out == "" and line.startswith("training") and "2/2" in line
    assert not [w for w in recwarn if issubclass(w.category, FutureWarning)]


def test_messages_need_a_chat_template(tmp_path):
    ref = ModelRef(model=str(save_llama(tmp_path / "bare", seed=1, own=tokenizer(chat=False))))
    with pytest.raises(SettingsError, match=r"no chat template.*family\.chat_template"):
        tokenizer_for(ref, None, chat=True)
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}!")
    own = tokenizer_for(ref, str(tmp_path / "own.jinja"), chat=True)
    assert own.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    with pytest.raises(SettingsError, match=r"family\.chat_template=.*bare names a model that has no chat template"):
        tokenizer_for(ref, ref.model, chat=True)
    (tmp_path / "own.jinja").write_bytes(b"caf\xe9")
    for given, said in ((str(tmp_path / "own.jinja"), "not UTF-8"), ("{{ messages }}" * 50, "File name too long")):
        with pytest.raises(SettingsError, match=f"cannot be read: {said}"):
            tokenizer_for(ref, given, chat=True)


def test_packed_rows_do_not_see_each_other(small, tmp_path):
    """Loss of rows packed into one sequence is that of the same rows apart."""
    some = {"train": rows(tmp_path)["train"][:6], "validation": []}
    losses = []
    for changes in ({"per_device_train_batch_size": 6}, {"packing": True, "per_device_train_batch_size": 1}):
        one = job(tmp_path, small, peft=Peft(name="none"), max_length=512, **changes)
        config = fields.configure(one.method, tmp_path / "out", seed=0, evaluate=False)
        trainer = sft.trainer(load_model(small), config, some, one)
        (batch,) = trainer.get_train_dataloader()
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model.eval(), batch).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_every_turn_of_the_assistant_is_learned_where_that_is_asked(small, tmp_path):
    said = [{"role": role, "content": f"{role} {place}."} for place, role in enumerate(["user", "assistant"] * 2)]
    given = [{"prompt": said[:3], "completion": said[3:]}]
    asked = {"assistant_only_loss": True, "completion_only_loss": False}
    ref = ModelRef(model=str(save_llama(tmp_path / "marked", seed=1, own=marked())))
    ((text, _),) = labels(ref, tmp_path, True, given, **asked)
    assert "assistant 1." in text and "assistant 3." in text and "user" not in text


def marked():
    """The tokenizer with a chat template that marks what the assistant says."""
    own = tokenizer()
    own.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    return own


def test_learning_the_assistant_s_turns_needs_messages(small, tmp_path):
    with pytest.raises(SettingsError, match=r"method: .*not conversational"):
        train(tmp_path, small, assistant_only_loss=True)


def test_training_ends_when_validation_no_longer_gets_better_and_the_best_is_what_is_saved(small, tmp_path):
    seen = []
    stopping = {
        "peft": Peft(name="none"), "max_steps": 60, "save_steps": None, "eval_strategy": None, "eval_steps": 2,
        "early_stopping_patience": 2, "learning_rate": 0.05, "save_total_limit": 1,
    }  # fmt: skip
    finished, figures = train(
        tmp_path, small, log=lambda values, step: seen.append((step, values.get("validation/loss"))), **stopping
    )
    measured = {step: loss for step, loss in seen if loss is not None}
    best = min(measured, key=measured.__getitem__)
    assert figures["stopped_early"] and figures["steps"] == best + 4 < 60
    assert (figures["best_step"], figures["validation_loss"]) == (best, measured[best])
    kept = load_file(tmp_path / "work" / "checkpoints" / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(weights(finished)[name], kept[name]) for name in weights(finished))
    assert len(list((tmp_path / "work" / "checkpoints").glob("checkpoint-*"))) == 2, "the best and the last"
    (tmp_path / "work" / "finished.json").unlink()  # as if killed while the finished model was written
    again, same = train(tmp_path, small, **stopping)
    assert (same["steps"], same["best_step"], same["resumed_from"]) == (best + 4, best, f"checkpoint-{best + 4}")
    assert all(torch.equal(weights(again)[name], kept[name]) for name in kept)


BEST = {"save_steps": None, "eval_strategy": None, "eval_steps": 1, "load_best_model_at_end": True, "max_steps": 4}


def test_the_best_by_another_measure_is_registered_with_its_validation_loss(small, tmp_path):
    seen = []
    by = BEST | {"metric_for_best_model": "eval_mean_token_accuracy"}
    _, figures = train(tmp_path, small, log=lambda values, step: seen.append((step, values)), **by)
    measured = {step: values for step, values in seen if "validation/loss" in values}
    accuracy = {step: values["validation/mean_token_accuracy"] for step, values in measured.items()}
    assert accuracy[figures["best_step"]] == max(accuracy.values()) and len(accuracy) == 4
    assert figures["validation_loss"] == measured[figures["best_step"]]["validation/loss"]


def test_a_best_checkpoint_that_was_damaged_is_named_and_the_next_run_goes_on_from_one_before(small, tmp_path):
    by = BEST | {"max_steps": 2, "metric_for_best_model": "eval_loss", "greater_is_better": True}  # the first is best

    def damage(values, step):
        if step == 2:
            file = tmp_path / "work" / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors"
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)

    with pytest.raises(StorageError, match="checkpoint-1, the best checkpoint, is damaged"):
        train(tmp_path, small, log=damage, **by)
    whole, _ = train(tmp_path / "whole", small, **by)
    finished, figures = train(tmp_path, small, **by)
    assert (figures["best_step"], figures["resumed_from"]) == (1, None)
    assert all(torch.equal(weights(finished)[name], tensor) for name, tensor in weights(whole).items())


def test_a_training_that_goes_on_logs_what_one_that_was_left_alone_does(small, tmp_path):
    """Checkpoints come between the steps that are logged."""
    told: dict[str, list] = {}

    def trained(folder: str, until: int = 9) -> dict:
        def log(values, step):
            told.setdefault(folder, []).append((step, values.get("train/loss")))
            return 1 / (step < until)

        return train(tmp_path / folder, small, log=log, logging_steps=3, save_steps=4)[1]

    whole = trained("whole")
    with pytest.raises(ZeroDivisionError):
        trained("stopped", until=6)
    resumed = trained("stopped")
    assert resumed["resumed_from"] == "checkpoint-4" and resumed["loss"] == whole["loss"]
    assert dict(told["stopped"]) == dict(told["whole"])


def test_a_measure_that_there_is_not_is_refused_by_its_name(small, tmp_path):
    with pytest.raises(SettingsError, match=r"best_model=token_acuracy is nothing.*'eval_mean_token_accuracy'"):
        train(tmp_path, small, **BEST, metric_for_best_model="token_acuracy")


def test_a_training_that_was_finished_but_not_registered_is_not_done_again(small, tmp_path):
    first = train(tmp_path, small, max_steps=2)
    steps = []
    assert train(tmp_path, small, max_steps=2, log=lambda values, step: steps.append(step)) == first and not steps
    whole = {name: tensor.clone() for name, tensor in weights(first[0]).items()}  # they are mapped from the file
    (first[0] / "adapter_model.safetensors").write_bytes(b"half")
    finished, figures = train(tmp_path, small, max_steps=2)
    assert (figures["steps"], figures["resumed_from"]) == (2, "checkpoint-2"), "no step more than was asked for"
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(finished).items())


def test_qlora_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"needs bitsandbytes.*pip install bitsandbytes"):
        check_peft(Peft(name="qlora"))


def test_qlora_tunes_over_4_bits_and_its_adapter_goes_over_the_weights_as_they_are(small, tmp_path):
    pytest.importorskip("bitsandbytes", reason="an optional package")
    frozen = [p for p in Start(small).model(Peft(name="qlora")).parameters() if p.dtype == torch.uint8]
    assert len(frozen) == 14, "seven linear layers in each of two blocks"
    finished, figures = train(tmp_path / "4bit", small, peft=Peft(name="qlora", r=4))
    _, plain = train(tmp_path / "whole", small, peft=Peft(r=4))
    assert figures["loss"] == pytest.approx(plain["loss"], rel=0.2), "as far as random weights stand 4 bits"
    ids = torch.tensor([tokenizer()("Question: what follows 7?").input_ids])
    tuned, anti = load_model(small, adapter=finished), load_model(small)
    assert not torch.allclose(tuned(ids).logits, anti(ids).logits, atol=1e-3)


def test_dora_is_refused_with_the_reason():
    with pytest.raises(SettingsError, match="no low-rank term beside its anti"):
        Peft(use_dora=True)


def test_the_record_has_the_pace_and_the_memory_of_a_training(small, tmp_path):
    seen = []
    train(tmp_path, small, max_steps=4, log=lambda values, step: seen.append(values))
    named = [values for values in seen if "train/loss" in values]
    assert len(named) == 4
    assert all(v["train/tokens_per_second"] > 0 and 0 < v["train/memory_gib"] < 100 for v in named)


def test_a_broken_model_is_told_before_training(tmp_path):
    folder = save_llama(tmp_path / "small", seed=1)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot load the model"):
        train(tmp_path, ModelRef(model=str(folder)))
