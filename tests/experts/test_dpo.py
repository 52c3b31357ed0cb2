"""Real trainings of a random model on preferences: a few steps each."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from proxytune.experts import dpo, sft
from proxytune.experts.starting import Start, continued, tokenizer_for
from proxytune.experts.tuning import Job
from proxytune.models.loading import load_model
from proxytune.settings import Method, ModelRef, Peft
from tests.models.tiny_family import TRAINING, tokenizer

STEPS = TRAINING | {"learning_rate": 5e-3, "max_steps": 6, "save_steps": 2, "logging_steps": 1, "eval_strategy": "no"}


def pairs(first: int, count: int) -> list[dict]:
    return [
        {
            "id": str(i),
            "prompt": f"Question: what follows {i}?\nAnswer:",
            "chosen": f" {i + 1} follows {i}.\n",
            "rejected": f" Nothing follows {i}.\n",
        }
        for i in range(first, first + count)
    ]


ROWS = {"train": pairs(0, 24), "validation": pairs(100, 4)}


def job(start: Start, work: Path, peft: Peft, name: str = "dpo", log=None, **changes) -> Job:
    tokens = tokenizer_for(start.ref, None, False)
    method = Method(**({"name": name} | STEPS | changes))
    return Job(start, tokens, method, peft, work, seed=3, log=log or (lambda values, step: None))


@pytest.fixture(scope="module", params=["lora", "none"])
def tuned(request, small, tmp_path_factory) -> tuple[Start, Peft]:
    """Where a chain goes on from: an expert tuned on replies, an adapter or a whole model."""
    peft = Peft(name=request.param, r=4)
    rows = {split: [{**row, "completion": row["chosen"]} for row in some] for split, some in ROWS.items()}
    folder, _ = sft.train(rows, job(Start(small), tmp_path_factory.mktemp("sft"), peft, name="sft", max_steps=4))
    return Start(small, folder, adapter=peft.name == "lora"), peft


def whole(start: Start):
    return start.merged("float32")


def gained(model, reference, key: str) -> list[float]:
    """Nats that each training reply gained on the reference."""
    found = []
    for row in ROWS["train"]:
        before = tokenizer()(row["prompt"]).input_ids
        ids = tokenizer()(row["prompt"] + row[key]).input_ids
        with torch.no_grad():
            scores = [one(torch.tensor([ids])).logits[0].log_softmax(-1) for one in (model, reference)]
        places = range(len(before) - 1, len(ids) - 1)
        found.append(sum((scores[0][p, ids[p + 1]] - scores[1][p, ids[p + 1]]).item() for p in places))
    return found


def test_the_reference_is_the_expert_as_it_was_and_the_chosen_replies_gain_on_it(tuned, tmp_path):
    start, peft = tuned
    seen = []
    folder, figures = dpo.train(ROWS, job(start, tmp_path, peft, log=lambda values, step: seen.append(values)))
    assert seen[0]["train/rewards/chosen"] == pytest.approx(0, abs=1e-6), "nothing is gained before the first step"
    assert seen[0]["train/loss"] == pytest.approx(0.6931, abs=1e-4)
    assert figures["rewards/margins"] > 0 and figures["rewards/accuracies"] > 0.5
    after = whole(Start(start.ref, folder, start.adapter))
    chosen, rejected = (gained(after, whole(start), key) for key in ("chosen", "rejected"))
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    assert min(margins) > 0


def test_a_chain_of_adapters_is_one_adapter_over_the_untuned_model(tuned, small, tmp_path):
    start, peft = tuned
    folder, _ = dpo.train(ROWS, job(start, tmp_path, peft))
    kept = {file.name for file in folder.iterdir()}
    assert "ref" not in kept
    if start.adapter:
        before, after = (load_file(place / "adapter_model.safetensors") for place in (start.folder, folder))
        assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
        assert all(before[name].shape == after[name].shape for name in before)
        assert continued(Peft(r=64), folder).r == 4
    else:
        assert "model.safetensors" in kept and "adapter_config.json" not in kept


def test_a_fresh_adapter_is_held_to_the_model_without_it(small, tmp_path):
    seen = []
    _, figures = dpo.train(ROWS, job(Start(small), tmp_path, Peft(r=4), log=lambda values, step: seen.append(values)))
    assert seen[0]["train/rewards/chosen"] == pytest.approx(0, abs=1e-6) and figures["rewards/margins"] > 0


def test_an_adapter_that_is_tuned_on_over_4_bits_is_held_to_itself_as_it_was(tuned, tmp_path):
    pytest.importorskip("bitsandbytes", reason="an optional package")
    start, _ = tuned
    if not start.adapter:
        pytest.skip("a whole model has no adapter to go on with")
    seen = []
    four = Peft(name="qlora", r=4)
    folder, _ = dpo.train(ROWS, job(start, tmp_path, four, log=lambda values, step: seen.append(values)))
    assert seen[0]["train/rewards/chosen"] == pytest.approx(0, abs=2e-3), "TRL tunes the adapter in bfloat16"
    before, after = (load_file(place / "adapter_model.safetensors") for place in (start.folder, folder))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_tuned_with_all_weights_is_merged_first_and_a_whole_model_stays_one(tuned, small, tmp_path):
    start, peft = tuned
    other = Peft(name="none") if peft.name == "lora" else Peft(r=4)
    seen = []
    folder, _ = dpo.train(ROWS, job(start, tmp_path, other, max_steps=2, log=lambda values, step: seen.append(values)))
    assert start.kind(other) == "full" and not (folder / "adapter_config.json").exists()
    assert seen[0]["train/rewards/chosen"] == pytest.approx(0, abs=1e-6)
    after, ids = load_model(ModelRef(model=str(folder))), torch.tensor([tokenizer()("What follows 7?").input_ids])
    assert not torch.allclose(after(ids).logits, whole(start)(ids).logits, atol=1e-3)
    assert not torch.allclose(after(ids).logits, load_model(small)(ids).logits, atol=1e-3)


def killed(warm, start: Start, work: Path, peft: Peft, after: int) -> int:
    """The exit code of this training in a process that is killed, for good, once step `after` was logged."""
    program = (
        "import os, signal; from pathlib import Path; from tests.experts.test_dpo import *\n"
        f"def log(values, step):\n    if step > {after}: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"start = Start(ModelRef(model={start.ref.model!r}), Path({str(start.folder)!r}), {start.adapter})\n"
        f"dpo.train(ROWS, job(start, Path({str(work)!r}), Peft(name={peft.name!r}, r={peft.r}), log=log))\n"
    )
    return warm.run([], program=program).code


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_very_weights_of_one_that_was_not(warm, tuned, tmp_path):
    start, peft = tuned
    uncut, _ = dpo.train(ROWS, job(start, tmp_path / "uncut", peft))
    assert killed(warm, start, tmp_path / "cut", peft, after=4) == -signal.SIGKILL
    folder, figures = dpo.train(ROWS, job(start, tmp_path / "cut", peft))
    assert figures["resumed_from"] == "checkpoint-4" and figures["steps"] == 6
    name = "adapter_model.safetensors" if start.adapter else "model.safetensors"
    mine, other = load_file(folder / name), load_file(uncut / name)
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in other)


def test_the_learning_rate_is_a_tenth_of_the_family_s_unless_it_is_given(small, tmp_path):
    def rate(**given) -> float:
        seen = []
        plain = job(Start(small), tmp_path / str(given), Peft(r=2), log=lambda values, step: seen.append(values))
        fields = {key: value for key, value in STEPS.items() if key != "learning_rate"} | {"max_steps": 1} | given
        one = Job(
            plain.start, plain.tokenizer, Method(name="dpo", **fields), plain.peft, plain.work, log=plain.log,
            defaults={"learning_rate": 0.02},
        )  # fmt: skip
        dpo.train(ROWS, one)
        return seen[0]["train/learning_rate"]

    assert rate() == pytest.approx(0.002) and rate(learning_rate=0.5) == pytest.approx(0.5)
