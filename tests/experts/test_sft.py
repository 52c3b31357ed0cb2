"""Real trainings of a random model: a few steps each."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from proxytune.errors import ModelError, SettingsError
from proxytune.experts import sft
from proxytune.models.loading import load_model
from proxytune.settings import ModelRef, Peft
from tests.models.tiny_family import TRAINING, save_llama, tokenizer, write_rows

ROOT = Path(__file__).resolve().parents[2]
FIELDS = TRAINING | {"max_steps": 8, "save_steps": 2, "logging_steps": 1, "eval_strategy": "no"}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> ModelRef:
    return ModelRef(model=str(save_llama(tmp_path_factory.mktemp("models") / "small", seed=1)))


def rows(folder: Path, chat: bool = False) -> dict[str, list]:
    named = {split: write_rows(folder / f"{split}.jsonl", first, n, chat=chat) for split, first, n in SPLITS}
    return {split: [json.loads(line) for line in Path(path).read_text().splitlines()] for split, path in named.items()}


SPLITS = (("train", 0, 40), ("validation", 100, 4))


def train(folder: Path, ref: ModelRef, *, peft: Peft = Peft(r=4), chat: bool = False, log=None, **changes):  # noqa: B008
    return sft.train(
        rows(folder, chat),
        ref,
        sft.tokenizer_for(ref, None, chat),
        FIELDS | changes,
        peft,
        folder / "work",
        seed=3,
        resume=True,
        log=log or (lambda values, step: None),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def uninterrupted(small, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("whole"), small)[0]


def killed(folder: Path, ref: ModelRef, after: int) -> subprocess.CompletedProcess[str]:
    """The same training in a process that is killed, for good, once step `after` was logged."""
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tests.experts.test_sft import ModelRef, train\n"
        f"def log(values, step):\n    if step > {after}: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"train(Path({str(folder)!r}), ModelRef(model={ref.model!r}), log=log)\n"
    )
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


def test_a_killed_training_goes_on_to_the_very_weights_of_an_uninterrupted_one(small, uninterrupted, tmp_path):
    done = killed(tmp_path, small, after=5)
    assert done.returncode == -signal.SIGKILL, done.stderr
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


def labels(ref: ModelRef, folder: Path, chat: bool) -> tuple[str, list[int]]:
    """(the text whose loss counts, its ids) of the first row, as the trainer's own loader serves it."""
    config = sft.configure(FIELDS, folder / "out", seed=0, evaluate=False)
    split = rows(folder, chat)
    own = sft.tokenizer_for(ref, None, chat)
    trainer = sft._trainer(load_model(ref), config, {"train": split["train"][:1], "validation": []}, own, Peft(r=2))
    (batch,) = trainer.get_train_dataloader()
    counted = batch["labels"][0]
    assert torch.equal(counted[counted != -100], batch["input_ids"][0][counted != -100])
    kept = counted[counted != -100].tolist()
    return own.decode(kept), kept


def test_the_loss_is_on_the_completion_alone_and_its_eos(small, tmp_path):
    text, ids = labels(small, tmp_path, chat=False)
    assert text == " 1 follows 0.\n<|endoftext|>" and ids[-1] == tokenizer().eos_token_id


def test_the_loss_of_messages_is_on_the_assistant_s_turn_and_its_end(small, tmp_path):
    text, _ = labels(small, tmp_path, chat=True)
    assert text.startswith("1 follows 0.<|end|>") and "Question" not in text


@pytest.mark.parametrize(
    "field, value",
    [("learning_rate", 0.125), ("max_length", 77), ("packing", True), ("optim", "adafactor"), ("warmup_steps", 5),
     ("neftune_noise_alpha", 3.0), ("save_total_limit", 9), ("gradient_checkpointing", True), ("seed", 11)],
)  # fmt: skip
def test_a_field_reaches_the_trainer_under_trl_s_own_name(tmp_path, field, value):
    assert getattr(sft.configure({"name": "sft", field: value}, tmp_path, seed=1, evaluate=True), field) == value


def test_null_leaves_a_field_to_trl_and_the_run_s_seed_is_the_trainer_s(tmp_path):
    from trl import SFTConfig

    config = sft.configure({"name": "sft", "learning_rate": None}, tmp_path, seed=7, evaluate=True)
    assert config.learning_rate == SFTConfig.__dataclass_fields__["learning_rate"].default
    assert (config.seed, config.data_seed, config.report_to) == (7, 7, [])


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"lerning_rate": 1}, "method.lerning_rate.*did you mean 'learning_rate'"),
        ({"optim": "magic"}, "method: .*magic"),
    ],
)
def test_a_field_that_trl_does_not_have_or_refuses_is_told(tmp_path, fields, told):
    with pytest.raises(SettingsError, match=told):
        sft.configure(fields, tmp_path, seed=1, evaluate=True)


def checkpoint(folder: Path, step: int) -> Path:
    """A checkpoint as the trainer's callback seals it."""
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(b"weights")
    (place / "optimizer.pt").write_bytes(b"moments")
    files = {file.name: sft.hash_file(file) for file in place.iterdir()}
    (place / sft.MARKER).write_text(json.dumps(files))
    return place


@pytest.mark.parametrize(
    "harm",
    [
        lambda place: (place / sft.MARKER).unlink(),
        lambda place: (place / sft.MARKER).write_text('{"model'),
        lambda place: (place / "optimizer.pt").unlink(),
        lambda place: (place / "model.safetensors").write_bytes(b"weig"),
        lambda place: (place / "model.safetensors").write_bytes(b"weightz"),
    ],
    ids=["no marker", "half a marker", "missing file", "file cut", "file changed"],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over_for_the_one_before(tmp_path, harm):
    whole, broken = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert sft.last_complete(tmp_path) == broken
    harm(broken)
    assert sft.last_complete(tmp_path) == whole and not broken.exists()
    assert sft.last_complete(tmp_path / "none") is None


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
        sft.tokenizer_for(ref, None, chat=True)
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}!")
    own = sft.tokenizer_for(ref, str(tmp_path / "own.jinja"), chat=True)
    assert own.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


def test_a_broken_model_is_told_before_training(tmp_path):
    folder = save_llama(tmp_path / "small", seed=1)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot load the model"):
        train(tmp_path, ModelRef(model=str(folder)))
