from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from proxytune.errors import DataError
from proxytune.experts import corpus
from proxytune.experts.pretrain import Phase, Schedule
from proxytune.settings import Pretrain
from proxytune.stages import pretrain
from proxytune.tasks.arithmetic_prose import TABLES, WIDE

BRIEF = Schedule(
    phases=(Phase(3, 40, 1, WIDE, 20), Phase(2, 20, 2, TABLES, 20)), window=64, batch=2, warmup_steps=1, compiled=False
)


@pytest.fixture
def few_documents(monkeypatch):
    monkeypatch.setattr(
        corpus, "standard_library", lambda: iter(f"def f{i}(x):\n    return x + {i}\n" * 40 for i in range(200))
    )


def test_both_siblings_are_trained_on_the_same_text_and_a_second_run_finds_them_done(
    tmp_path, few_documents, monkeypatch
):
    settings = Pretrain(out=tmp_path / "tiny", outputs=tmp_path / "outputs")
    figures = pretrain.run(settings, BRIEF)
    assert figures["small"]["tokens"] == figures["base"]["tokens"] == BRIEF.steps * BRIEF.window * BRIEF.batch
    assert figures["base"]["parameters"] > 8 * figures["small"]["parameters"]
    for name in ("small", "base"):
        assert {w.dtype for w in load_file(tmp_path / "tiny" / name / "model.safetensors").values()} == {torch.bfloat16}
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny" / name)
        assert tokenizer.tokenize("1234") == list("1234")
        assert tokenizer.decode(tokenizer("  if é:\n").input_ids) == "  if é:\n"
    monkeypatch.setattr("proxytune.experts.pretrain.train", lambda *_, **__: pytest.fail("trained again"))
    assert pretrain.run(settings, BRIEF) == figures


def test_extra_text_that_is_not_there_is_told_before_anything_is_trained(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        pretrain.run(Pretrain(out=tmp_path, outputs=tmp_path, extra=[tmp_path / "none.txt"]), BRIEF)
    assert list(tmp_path.iterdir()) == []
