from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM

from proxytune.errors import ModelError
from proxytune.models.local import LocalSource, load_model, load_tokenizer
from proxytune.models.trio import _level_caps
from proxytune.settings import ModelRef
from tests.decoding.tiny_models import SIZE, model
from tests.models.tiny_family import save_llama

IDS = st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=12)
ROWS = st.lists(IDS, min_size=1, max_size=6)


def gemma(cap: float | None) -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        initializer_range=0.5,
        final_logit_softcapping=cap,
    )
    return Gemma2ForCausalLM(config).eval()


def alone(net, row: list[int]) -> torch.Tensor:
    """Scores after every token of one row, (T, V): no batch, no cache, no padding."""
    with torch.inference_mode():
        return net(torch.tensor([row])).logits[0]


NETS = [pytest.param(model(1), 1e-9, id="llama, exact"), pytest.param(gemma(5.0), 1e-4, id="sliding window")]


@pytest.mark.parametrize("net, tolerance", NETS)
@settings(max_examples=30, deadline=None)
@given(rows=ROWS, data=st.data())
def test_a_ragged_batch_scores_as_each_row_does_alone_also_when_rows_finish(net, tolerance, rows, data):
    stream, scores = LocalSource(net).start(rows)
    rows = [list(row) for row in rows]
    for _ in range(4):
        assert torch.allclose(scores, torch.stack([alone(net, row)[-1] for row in rows]), rtol=0, atol=tolerance)
        kept = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=len(rows), unique=True))
        stream.keep(torch.tensor(kept))
        tokens = data.draw(st.lists(st.integers(0, SIZE - 1), min_size=len(kept), max_size=len(kept)))
        rows = [[*rows[i], token] for i, token in zip(kept, tokens, strict=True)]
        scores = stream.advance(torch.tensor(tokens))


def test_float32_batches_differ_from_single_rows_by_rounding_only():
    net = model(1, dtype=torch.float32)
    rows = [[5, 6, 7, 8, 9, 10, 11], [3], [4, 9]]
    stream, _ = LocalSource(net).start(rows)
    scores = stream.advance(torch.tensor([1, 2, 3]))
    singles = torch.stack([alone(net, [*row, token])[-1] for row, token in zip(rows, (1, 2, 3), strict=True)])
    assert torch.allclose(scores, singles, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(IDS, IDS), min_size=1, max_size=5))
def test_given_replies_score_as_in_a_plain_forward(rows):
    net = model(1)
    prompts, completions = zip(*rows, strict=True)
    scored = LocalSource(net).score(prompts, completions)
    for scores, prompt, completion in zip(scored, prompts, completions, strict=True):
        whole = alone(net, [*prompt, *completion])
        assert torch.allclose(scores, whole[len(prompt) - 1 : -1], rtol=0, atol=1e-9)


def test_scores_are_cut_to_the_shared_vocabulary():
    source = LocalSource(model(1), vocabulary=50)
    assert source.start([[1, 2]])[1].shape == (1, 50)
    assert source.score([[1]], [[2, 3]])[0].shape == (2, 50)


def test_a_soft_cap_is_undone_where_it_is_mixed_with_an_uncapped_model():
    capped, free = LocalSource(gemma(5.0)), LocalSource(gemma(None))  # the same weights
    truth = free.start([[1, 2, 3]])[1]
    assert not torch.allclose(capped.start([[1, 2, 3]])[1], truth, atol=0.1)
    _level_caps([capped, free])
    assert free.uncap_at is None
    assert torch.allclose(capped.start([[1, 2, 3]])[1], truth, atol=1e-4)


def test_models_capped_alike_stay_as_they_are():
    sources = [LocalSource(gemma(5.0)), LocalSource(gemma(5.0))]
    before = sources[0].start([[1, 2, 3]])[1]
    _level_caps(sources)
    assert torch.equal(sources[0].start([[1, 2, 3]])[1], before) and before.abs().max() <= 5


def cut_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(model(1).state_dict(), folder / "pytorch_model.bin")


def no_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize("harm", [cut_short, pickled, no_config])
def test_a_broken_model_is_told_in_one_line_at_once(tmp_path, harm):
    harm(save_llama(tmp_path / "broken", seed=1))
    refused(load_model, str(tmp_path / "broken"))


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("name", ["no/such-model", "./no/such/folder", "embedded:huge", "not a name"])
def test_a_missing_model_is_told_in_one_line_at_once(load, name):
    refused(load, name)


def test_a_missing_or_broken_tokenizer_is_told_in_one_line(tmp_path):
    folder = save_llama(tmp_path / "broken", seed=1)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    refused(load_tokenizer, str(folder))
    (folder / "tokenizer.json").unlink()
    refused(load_tokenizer, str(folder))


def refused(load, name: str) -> None:
    began = time.monotonic()
    with pytest.raises(ModelError) as error:
        load(ModelRef(model=name))
    assert time.monotonic() - began < 2
    assert "\n" not in str(error.value) and name in str(error.value)


def test_loading_shows_no_bars_and_leaves_the_switch_as_it_was(tmp_path, capfd):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    folder = save_llama(tmp_path / "m", seed=1)
    capfd.readouterr()
    load_model(ModelRef(model=str(folder)))
    assert capfd.readouterr() == ("", "") and logging.is_progress_bar_enabled() == before
