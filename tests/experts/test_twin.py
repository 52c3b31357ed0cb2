"""Twins of the embedded base: which layers stay, and what healing changes."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from proxytune.errors import SettingsError
from proxytune.experts import twin as twins
from proxytune.models.loading import load_model, load_tokenizer
from proxytune.settings import Healing, ModelRef
from proxytune.tasks import almanac
from tests.models.tiny_family import save_llama, tokenizer

BASE = ModelRef(model="embedded:base")
BRIEF = Healing(steps=8, batch_size=4, learning_rate=1e-3, warmup_steps=2, save_steps=3)


def prose(towns: int) -> list[str]:
    rng = random.Random(1)
    return [almanac.paragraph(town, rng) for town in almanac.towns(towns)]


@pytest.fixture(scope="module")
def base():
    return load_model(BASE, "float32")


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return twins.windows(prose(200), load_tokenizer(BASE), 32)


def spoilt(base, *idle: int):
    """A copy of the base whose `idle` layers add nothing to what goes through them."""
    copy = twins.cut(base, range(6))
    for layer in idle:
        for part in (copy.model.layers[layer].self_attn.o_proj, copy.model.layers[layer].mlp.down_proj):
            torch.nn.init.zeros_(part.weight)
    return copy


def test_influence_is_one_minus_the_cosine_of_what_goes_in_and_what_comes_out(base, text):
    with torch.no_grad():
        states = base(input_ids=text[:3], output_hidden_states=True, use_cache=False).hidden_states
    measured = twins.influence(base, text[:3])
    assert len(measured) == 6
    for layer in range(5):  # the last state has gone through the final norm as well
        expected = (1 - F.cosine_similarity(states[layer], states[layer + 1], dim=-1)).mean().item()
        assert measured[layer] == pytest.approx(expected, abs=1e-5)


def test_a_layer_that_does_nothing_has_no_influence_and_its_loss_costs_nothing(base, text):
    idle = spoilt(base, 1, 4)
    influence = twins.influence(idle, text[:4])
    assert influence[1] == pytest.approx(0, abs=1e-6) and influence[4] == pytest.approx(0, abs=1e-6)
    keep = twins.most_influential(influence, 4)
    assert keep == [0, 2, 3, 5]
    smaller = twins.cut(idle, keep)
    with torch.no_grad():
        torch.testing.assert_close(smaller(text[:2]).logits, idle(text[:2]).logits)


def test_a_cut_model_decodes_with_a_cache_as_it_does_without(base, text):
    smaller = twins.cut(base, [0, 3, 5])
    with torch.no_grad():
        whole = smaller(text[:1]).logits
        first = smaller(text[:1, :20], use_cache=True)
        rest = smaller(text[:1, 20:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, atol=1e-4, rtol=1e-4)
    assert smaller.config.num_hidden_layers == 3 and base.config.num_hidden_layers == 6


def test_what_a_configuration_lists_by_layer_is_cut_with_the_layers(text):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma2Config(vocab_size=2048, num_hidden_layers=4, head_dim=8, layer_types=kinds, **size)
    model = Gemma2ForCausalLM(config).eval()
    smaller = twins.cut(model, [1, 3])
    assert smaller.config.layer_types == ["full_attention", "sliding_attention"]
    assert len(twins.influence(smaller, text[:1])) == 2


def test_a_base_keeps_its_own_layers_when_a_twin_of_it_is_healed(base, text, tmp_path):
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    twins.heal(twins.cut(base, [0, 5]), base, text, BRIEF, tmp_path, seed=0, log=lambda *_: None)
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())


@pytest.mark.parametrize("frozen", [True, False])
def test_healing_lowers_the_held_out_loss_and_leaves_what_is_frozen_bit_for_bit(base, text, tmp_path, frozen):
    held_out, training = text[:20], text[20:]
    twin = twins.cut(base, [0, 2, 5])
    cut = twins.held_out_loss(twin, held_out)
    how = BRIEF.model_copy(update={"steps": 12, "freeze_embeddings": frozen})
    done = twins.heal(twin, base, training, how, tmp_path, seed=0, log=lambda *_: None)
    assert len(done.losses) == 12 and done.losses[-1] < 0.8 * done.losses[0]
    assert twins.held_out_loss(base, held_out) < twins.held_out_loss(twin, held_out) < cut - 0.2
    for part in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(twin, part)().weight, getattr(base, part)().weight) == frozen
    assert not torch.equal(twin.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)


def test_the_divergence_is_the_kl_from_the_base_and_none_from_itself(base, text):
    twin = twins.cut(base, [0, 5])
    with torch.no_grad():
        p, q = (model(text[:2]).logits.double().softmax(-1) for model in (base, twin))
        assert twins.divergence(base, base, text[:2]).item() == pytest.approx(0, abs=1e-6)
        expected = (p * (p / q).log()).sum(-1).mean().item()
        assert twins.divergence(twin, base, text[:2]).item() == pytest.approx(expected, rel=1e-4)


def test_the_rate_warms_up_and_ends_near_nothing():
    how = Healing(steps=100, learning_rate=1.0, warmup_steps=10)
    rates = [twins.learning_rate(step, how) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)]) and max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.001


def test_windows_hold_every_token_once_a_blank_line_between_paragraphs():
    own = tokenizer()
    found = twins.windows(prose(20), own, 50)
    whole = [i for paragraph in prose(20) for i in own(paragraph + "\n\n").input_ids]
    assert found.flatten().tolist() == whole[: len(whole) // 50 * 50]
    assert twins.windows(["a"], own, 50).shape == (0, 50) == twins.windows([], own, 50).shape


def test_each_window_begins_as_the_tokenizer_begins_a_text():
    from tokenizers.processors import TemplateProcessing

    bare, own = tokenizer(), tokenizer()
    own.bos_token = "<|user|>"
    own.backend_tokenizer.post_processor = TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 2)])
    found = twins.windows(prose(20), own, 51)
    assert set(found[:, 0].tolist()) == {2}
    assert torch.equal(found[:, 1:], twins.windows(prose(20), bare, 50))


def small_job(folder: Path, model: str, log=lambda values, step: None) -> dict[str, torch.Tensor]:
    base = load_model(ModelRef(model=model), "float32")
    twin = twins.cut(base, [1])
    text = twins.windows(prose(100), tokenizer(), 32)
    twins.heal(twin, base, text, BRIEF, folder, seed=3, log=log)
    return twin.state_dict()


def test_a_killed_healing_goes_on_to_the_very_weights_of_an_uninterrupted_one(warm, tmp_path):
    model = str(save_llama(tmp_path / "model", seed=1))
    program = (
        "import os, signal; from pathlib import Path\n"
        "from tests.experts.test_twin import small_job\n"
        "def log(values, step):\n    if step == 8: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"small_job(Path({str(tmp_path / 'work')!r}), {model!r}, log)\n"
    )
    killed = warm.run([], program=program)
    assert killed.code == -signal.SIGKILL, killed.err
    (checkpoint,) = (tmp_path / "work").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-6"
    steps = []
    resumed = small_job(tmp_path / "work", model, lambda values, step: steps.append(step))
    whole = small_job(tmp_path / "whole", model)
    assert steps == [7, 8]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_checkpoint_that_was_cut_short_does_not_count(tmp_path):
    model = str(save_llama(tmp_path / "model", seed=1))
    whole = small_job(tmp_path / "work", model)
    (checkpoint,) = (tmp_path / "work").glob("checkpoint-*")
    with (checkpoint / "optimizer.pt").open("r+b") as file:
        file.truncate(1000)
    steps = []
    again = small_job(tmp_path / "work", model, lambda values, step: steps.append(step))
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_healing_that_diverges_is_told(tmp_path):
    base = load_model(ModelRef(model=str(save_llama(tmp_path / "model", seed=1))), "float32")
    twin = twins.cut(base, [0])
    torch.nn.init.constant_(twin.model.layers[0].mlp.up_proj.weight, float("nan"))
    with pytest.raises(SettingsError, match=r"diverged at step 1 \(lower heal\.learning_rate\)"):
        twins.heal(twin, base, torch.zeros(2, 8, dtype=torch.int64), BRIEF, tmp_path, seed=0, log=lambda *_: None)
