from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from proxytune.errors import DataError
from proxytune.experts import corpus
from proxytune.experts.pretrain import Phase, Schedule, train
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


def test_a_checkpoint_that_a_kill_left_broken_is_passed_over(tmp_path, few_documents):
    documents = list(corpus.standard_library())
    own = corpus.train_tokenizer(documents, 300)
    figures = train("small", documents, own, BRIEF, tmp_path, report=lambda figures: None)
    weights = (tmp_path / "small" / "model.safetensors").read_bytes()
    (last,) = (tmp_path / "small-checkpoints").iterdir()
    assert last.name == f"checkpoint-{BRIEF.steps}"
    written = (last / "model.safetensors").stat().st_mtime_ns
    broken = shutil.copytree(last, last.with_name("checkpoint-9"))
    (broken / "model.safetensors").write_bytes(b"")
    shutil.rmtree(tmp_path / "small")
    assert train("small", documents, own, BRIEF, tmp_path, report=lambda figures: None) == figures
    assert (tmp_path / "small" / "model.safetensors").read_bytes() == weights
    assert (last / "model.safetensors").stat().st_mtime_ns == written, "it went on from there"


def test_extra_text_that_is_not_there_is_told_before_anything_is_trained(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        pretrain.run(Pretrain(out=tmp_path, outputs=tmp_path, extra=[tmp_path / "none.txt"]), BRIEF)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def read(few_documents, monkeypatch):
    """The documents of each training that would have been."""
    found = []

    def train(name, documents, tokenizer, schedule, folder, report):
        found.append(documents)
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "weights").write_text(f"{name} of {len(documents)}")
        return {"name": name}

    monkeypatch.setattr("proxytune.experts.pretrain.train", train)
    monkeypatch.setattr(corpus, "train_tokenizer", lambda texts, vocabulary: None)
    return found


@pytest.mark.parametrize(
    "row, told",
    [
        (b"hello", "line 2: not JSON"),
        (b'{"text": "\xff"}', "line 2: not UTF-8"),
        (b'{"title": "a"}', "line 2: the row has no text"),
        (b'["a"]', "line 2: the row has no text"),
        (b'{"text": 3}', "line 2: the text is not a string but int"),
        (b'{"question": "\\ud800"}', "line 2: the text holds half a character"),
    ],
)
def test_a_bad_row_of_extra_text_is_named_and_nothing_of_the_text_is_kept(tmp_path, read, row, told):
    path = tmp_path / "more.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + row + b"\n")
    with pytest.raises(DataError, match=rf"more\.jsonl,? {told}"):
        pretrain.run(Pretrain(out=tmp_path / "tiny", outputs=tmp_path / "outputs", extra=[path]), BRIEF)
    assert not list(tmp_path.rglob("*.gz"))


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"{}" + data, lambda data: b""])
def test_gathered_text_that_was_damaged_is_named(tmp_path, damage):
    path = tmp_path / "documents.jsonl.gz"
    corpus.write_documents(path, ["one", ""])
    assert corpus.read_documents(path) == ["one", ""]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"documents\.jsonl\.gz"):
        corpus.read_documents(path)


def test_extra_text_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "more.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"more\.txt: not UTF-8"):
        list(corpus.extra(tmp_path / "more.txt"))


def test_a_row_of_extra_text_may_hold_a_line_separator(tmp_path):
    rows = [{"text": "one\u2028line"}, {"question": "two?"}]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    assert list(corpus.extra(tmp_path / "more.jsonl")) == ["one\u2028line", "two?"]


def test_other_extra_text_is_read_though_the_file_has_the_same_name(tmp_path, read):
    path = tmp_path / "more.txt"
    settings = Pretrain(out=tmp_path / "tiny", outputs=tmp_path / "outputs", extra=[path])
    for text in ("one", "two"):
        path.write_text(text)
        pretrain.run(settings, BRIEF)
        pretrain.run(settings, BRIEF)
    assert [documents[-1] for documents in read] == ["one", "one", "two", "two"]


def test_text_that_was_gathered_in_part_is_gathered_anew(tmp_path, read, monkeypatch):
    settings = Pretrain(out=tmp_path / "tiny", outputs=tmp_path / "outputs")

    def interrupted():
        yield "one"
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(corpus, "standard_library", interrupted)
        pretrain.run(settings, BRIEF)
    pretrain.run(settings, BRIEF)
    assert [len(documents) for documents in read] == [200, 200]


def test_weights_that_a_kill_kept_from_their_place_are_put_there_by_the_next_run(tmp_path, read, monkeypatch):
    settings = Pretrain(out=tmp_path / "tiny", outputs=tmp_path / "outputs")
    (tmp_path / "tiny" / "small").mkdir(parents=True)
    for name, text in (("weights", "shipped"), ("training.json", "{}")):
        (tmp_path / "tiny" / "small" / name).write_text(text)

    def interrupted(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pretrain, "_install", interrupted)
        pretrain.run(settings, BRIEF)
    figures = pretrain.run(settings, BRIEF)
    assert (tmp_path / "tiny" / "small" / "weights").read_text() == "small of 200"
    assert json.loads((tmp_path / "tiny" / "small" / "training.json").read_text()) == figures["small"]
    assert len(read) == 2, "what was trained is not trained again"
