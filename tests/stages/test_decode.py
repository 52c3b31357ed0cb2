from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from proxytune.errors import DataError, StorageError
from proxytune.files import Journal
from proxytune.settings import Decode, DecodeStage, ModelRef
from proxytune.stages import decode
from proxytune.stages.shared import trio as trios
from tests.models.tiny_family import tokenizer

ASKED = "Question: what follows 7?\nAnswer:"
SAMPLED = Decode(max_new_tokens=12, temperature=1.0, seed=4)


def run(place, **changes):
    return decode.run(place.settings(DecodeStage, **({"alpha": 1.0} | changes)))


def test_one_prompt_streams_what_its_record_says(place, capsys):
    (record,) = run(place, prompt=ASKED, decode=SAMPLED)
    captured = capsys.readouterr()
    assert captured.out == record["text"] + "\n" and record["text"]
    assert "replies: " in captured.err


def test_a_stop_string_is_not_shown_while_it_streams(place, capsys):
    (whole,) = run(place, prompt=ASKED, decode=SAMPLED)
    stop = whole["text"][4:7]
    capsys.readouterr()
    (record,) = run(place, prompt=ASKED, decode=SAMPLED, task={"name": "qa", "stop": [stop]})
    assert record["text"] == whole["text"][: whole["text"].index(stop)] and record["finish_reason"] == "stop"
    assert capsys.readouterr().out == record["text"] + "\n"


def test_the_jsonl_holds_the_documented_keys(place, tmp_path):
    out = tmp_path / "new" / "replies.jsonl"
    records = run(place, prompt=ASKED, out=out)
    (kept,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert kept == records[0]
    assert kept.keys() >= {"id", "prompt", "text", "token_ids", "alpha", "finish_reason", "models"}
    assert kept["models"] == {
        "base": place.family.base_ref.model, "expert": "qa@v1", "anti": place.family.small.model,
    }  # fmt: skip
    assert (kept["alpha"], kept["prompt"], kept["system"]) == (1.0, ASKED, "steered")
    ids = [i for i in kept["token_ids"] if i != tokenizer().eos_token_id]
    assert tokenizer().decode(ids, skip_special_tokens=True) == kept["text"]


def test_greedy_is_the_same_twice_and_a_seed_gives_its_text_again(place):
    def texts(**changes):
        return [row["token_ids"] for row in run(place, prompt=ASKED, **changes)]

    assert texts() == texts()
    other = SAMPLED.model_copy(update={"seed": 5})
    assert texts(decode=SAMPLED) == texts(decode=SAMPLED) != texts(decode=other)


def test_prompts_come_from_jsonl_text_and_stdin(place, tmp_path, monkeypatch):
    jsonl, text = tmp_path / "p.jsonl", tmp_path / "p.txt"
    rows = [{"id": "a", "prompt": "One\u2028two"}, {"messages": [{"role": "user", "content": "Three"}]}]
    jsonl.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    text.write_text("First line\n\nThird line\r\n")
    assert [(r["id"], r["prompt"]) for r in run(place, prompts=str(jsonl))] == [
        ("a", "One\u2028two"),
        ("3", rows[1]["messages"]),
    ]
    assert [(r["id"], r["prompt"]) for r in run(place, prompts=str(text))] == [("1", "First line"), ("3", "Third line")]
    for named in ({}, {"prompts": "-"}):
        monkeypatch.setattr("sys.stdin", io.StringIO("Two\nlines\n"))
        assert [r["prompt"] for r in run(place, **named)] == ["Two\nlines"]


def test_replies_of_another_base_in_the_same_place_are_not_gone_on_with(place, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Say 1\nQ\nWho?\n")
    folder = Path(shutil.copytree(place.family.base_ref.model, tmp_path / "base"))
    given = {
        "prompts": str(prompts),
        "base_model": ModelRef(model=str(folder)),
        "decode": Decode(max_new_tokens=6, batch_size=1),
    }
    with monkeypatch.context() as patch:
        append = Journal.append
        patch.setattr(Journal, "append", lambda self, row: append(self, row) or 1 / (row["place"] < 1))
        with pytest.raises(ZeroDivisionError):
            run(place, **given)
    weights = load_file(folder / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    trios._load.cache_clear()
    again = run(place, **given)
    for journal in (place.outputs / "cache" / "replies").iterdir():
        journal.unlink()
    assert again == run(place, **given)


def test_a_prompt_says_the_same_alone_and_among_others(place, tmp_path):
    many = tmp_path / "many.txt"
    many.write_text("Something quite a bit longer than the rest of it\nSay 1\nQ\n")
    batched = run(place, prompts=str(many))
    singly = run(place, prompts=str(many), decode=Decode(max_new_tokens=6, batch_size=1))
    assert [row["token_ids"] for row in batched] == [row["token_ids"] for row in singly]


def test_compare_shows_all_three_and_alpha_zero_says_what_the_base_says(place, capsys):
    records = run(place, prompt=ASKED, compare=True, alpha=0.0)
    assert [row["system"] for row in records] == ["base", "expert", "steered"]
    assert records[0]["token_ids"] == records[2]["token_ids"] != records[1]["token_ids"]
    assert [row["alpha"] for row in records] == [None, None, 0.0]
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("base", "expert", "steered"))


BROKEN = [
    ("", "is empty"),
    ("\n \n", "is empty"),
    ('{"prompt": "a"}\n{"prompt": ', "line 2 is not a prompt"),
    ('{"prompt": "a"}\n\n{"text": "b"}', "line 3 is not a prompt"),
    ('{"prompt": ""}', "line 1 is not a prompt"),
    ('{"prompt": 5}', "line 1 is not a prompt"),
    ('"prompt"', "line 1 is not a prompt"),
    ('{"messages": [{"content": "no role"}]}', "line 1 is not a prompt"),
    ('{"messages": [{"role": "user"}]}', "line 1 is not a prompt"),
    ('{"prompt": "  "}', "is empty"),
    ('{"prompt": "a"}\n{"prompt": "b \\ud800"}', "line 2 holds half a character"),
    ('{"messages": [{"role": "user", "content": "\\udc00"}]}', "line 1 holds half a character"),
    ('{"id": "\\ud800", "prompt": "a"}', "line 1 holds half a character"),
    ('{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}', "line 2: the id '1' is already that of another prompt"),
    ("[" * 5000, "line 1 is not a prompt"),
]


UNNAMED = '{"id": null, "prompt": "a"}\n\n{"prompt": "b"}\n{"id": "", "prompt": "c"}\n'


def test_rows_without_an_id_are_called_by_their_lines_however_the_file_is_called(tmp_path):
    for name in ("prompts.jsonl", "prompts.JSONL"):
        (tmp_path / name).write_text(UNNAMED, "utf-8-sig")
        rows = decode.read_prompts(None, str(tmp_path / name))
        assert [(row["id"], row["prompt"]) for row in rows] == [("1", "a"), ("3", "b"), ("4", "c")]


@pytest.mark.parametrize("content, told", BROKEN)
def test_a_broken_row_is_told_by_its_line_before_any_model_is_loaded(place, tmp_path, monkeypatch, content, told):
    monkeypatch.setattr(decode.trios, "load", lambda *_: pytest.fail("a model was loaded"))
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=told):
        run(place, prompts=str(path))
    assert not (place.outputs / "runs").exists()


@pytest.mark.parametrize(
    "errors, told", [("strict", "is not UTF-8 text"), ("surrogateescape", "holds half a character")]
)
def test_bytes_that_are_not_utf_8_are_told(monkeypatch, errors, told):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8", errors))
    with pytest.raises(DataError, match=f"standard input {told}"):
        decode.read_prompts(None, None)
    with pytest.raises(DataError, match="the prompt holds half a character"):  # as a command line has it
        decode.read_prompts("caf\udce9", None)


def test_no_prompt_two_prompts_and_a_missing_file_are_told(place, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(DataError, match="there is no prompt"):
        run(place)
    with pytest.raises(DataError, match="both"):
        run(place, prompt="a", prompts="b")
    with pytest.raises(DataError, match="cannot read"):
        run(place, prompts=str(tmp_path / "none.txt"))
    with pytest.raises(DataError, match="the prompt is empty"):
        run(place, prompt=" ")


def test_prompts_that_end_in_a_space_are_told_and_taken(tmp_path, capsys):
    assert decode.read_prompts("One ", None)[0]["prompt"] == "One "
    assert "the prompt ends in a space" in capsys.readouterr().err
    (tmp_path / "p.txt").write_text("One\nTwo \nThree\t\n")
    decode.read_prompts(None, str(tmp_path / "p.txt"))
    assert "2 of 3 prompts end in a space" in capsys.readouterr().err
    decode.read_prompts("One", None)
    assert capsys.readouterr().err == ""


def test_an_out_that_is_a_folder_is_told_before_any_model_is_loaded(place, tmp_path, monkeypatch):
    monkeypatch.setattr(decode.trios, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(StorageError, match="cannot write"):
        run(place, prompt=ASKED, out=tmp_path)
    assert not (place.outputs / "runs").exists()
