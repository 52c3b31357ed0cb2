from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines import cli
from proxytune.errors import DataError, ModelError, ProxytuneError, SettingsError, StorageError
from proxytune.experts import twin as twins
from proxytune.files import hash_file
from proxytune.models.identity import identify
from proxytune.models.loading import load_model, load_tokenizer
from proxytune.models.vocabulary import shared
from proxytune.settings import Healing, ModelRef, Tracker, Twin, load
from proxytune.stages import twin
from proxytune.tracking import record
from tests.experts.test_twin import BASE, prose
from tests.models.tiny_family import save_llama

HEAL = Healing(steps=6, batch_size=4, learning_rate=2e-3, warmup_steps=1, save_steps=2)


def settings(folder: Path, **changes) -> Twin:
    """A twin of a random model of two layers; its text is an almanac, half of it in each form."""
    texts = [folder / "almanac.txt", folder / "questions.jsonl"]
    if not texts[0].exists():
        save_llama(folder / "model", seed=1)
        towns = prose(160)
        texts[0].write_text("\n\n".join(towns[:80]), "utf-8")
        rows = [{"question": town, "answer": "SECRET"} for town in towns[80:]]
        texts[1].write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    values = {
        "base": ModelRef(model=str(folder / "model")), "layers": 1, "text": texts, "window": 32, "held_out": 0.1,
        "heal": HEAL, "outputs": folder / "outputs", "tracker": Tracker(name="local"), "command": "proxytune of a test",
    }  # fmt: skip
    return Twin(**(values | changes))


def test_a_twin_of_the_embedded_base_is_a_model_folder_that_fits_its_base(tmp_path, capsys):
    given = settings(tmp_path, base=BASE, layers=3, name="half")
    made = twin.run(given)
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(made.folder) == str(tmp_path / "outputs" / "twins" / "half")
    ref = ModelRef(model=str(made.folder))
    models = {"base": load_model(BASE), "small": load_model(ref)}
    tokenizers = {"base": load_tokenizer(BASE), "small": load_tokenizer(ref)}
    assert models["small"].config.num_hidden_layers == 3
    assert tokenizers["small"].chat_template == tokenizers["base"].chat_template
    assert shared({name: (tokenizers[name].get_vocab(), 2048) for name in models}).foreign == ()
    assert torch.equal(models["small"].get_input_embeddings().weight, models["base"].get_input_embeddings().weight)
    told = made.recipe["held_out"]["perplexity"]
    assert told["base"] < told["healed"] < told["cut"]
    for name in ("base", "cut", "healed"):
        assert f"{told[name]:,.2f}" in out


def test_the_recipe_says_how_a_twin_was_made_and_nothing_of_where(tmp_path):
    made = twin.run(settings(tmp_path))
    recipe = json.loads((made.folder / "twin.json").read_text())
    assert recipe == made.recipe
    ref = ModelRef(model=str(tmp_path / "model"))
    assert recipe["base"] == identify(ref, load_tokenizer(ref)).model_dump()
    small = ModelRef(model=str(made.folder))
    assert recipe["weights"] == identify(small, load_tokenizer(small)).weights
    assert recipe["text"] == [
        {"file": name, "sha256": hash_file(tmp_path / name), "paragraphs": 80}
        for name in ("almanac.txt", "questions.jsonl")
    ]
    assert recipe["layers"]["of"] == len(recipe["layers"]["influence"]) == 2
    assert recipe["layers"]["kept"] == twins.most_influential(recipe["layers"]["influence"], 1)
    assert recipe["healing"]["tokens"] == 6 * 4 * 32 and recipe["healing"]["curve"][-1][0] == 6
    assert recipe["settings"]["heal"]["learning_rate"] == 2e-3
    del recipe["base"]
    assert str(tmp_path) not in json.dumps(recipe)


def test_a_twin_leaves_a_record_and_no_working_files_and_can_be_read_by_all(tmp_path):
    made = twin.run(settings(tmp_path))
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    told = json.loads((run / "run.json").read_text())
    assert (told["stage"], told["status"]) == ("twin", "finished") and "perplexity/healed" in told["summary"]
    losses = [json.loads(line)["heal/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6
    left = [path for path in (tmp_path / "outputs" / "training").rglob("*") if path.suffix != ".lock"]
    assert left == []
    assert {file.stat().st_mode & 0o777 for file in made.folder.iterdir()} == {0o644}


def test_the_same_settings_find_the_twin_and_others_do_not_overwrite_it(tmp_path, monkeypatch):
    made = twin.run(settings(tmp_path))
    monkeypatch.setattr(twins, "heal", lambda *_, **__: pytest.fail("healed again"))
    assert twin.run(settings(tmp_path)).recipe == made.recipe
    with pytest.raises(StorageError, match="is there already, made in another way"):
        twin.run(settings(tmp_path, seed=1))
    assert json.loads((made.folder / "twin.json").read_text()) == made.recipe


def test_a_twin_whose_weights_changed_is_refused_and_its_working_files_go_where_a_kill_left_them(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(record.Run, "summary", lambda *_: 1 / 0)  # just after it was published
        with pytest.raises(ZeroDivisionError):
            twin.run(settings(tmp_path))
    assert list((tmp_path / "outputs" / "training").glob("twin-*/"))
    made = twin.run(settings(tmp_path))
    assert not list((tmp_path / "outputs" / "training").glob("twin-*/"))
    weights = made.folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(StorageError, match=r"is damaged: its weights are not those of its twin\.json"):
        twin.run(settings(tmp_path))


def test_a_run_that_was_stopped_measures_nothing_twice_and_ends_in_the_same_weights(tmp_path, monkeypatch):
    whole = twin.run(settings(tmp_path, outputs=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(twins, "learning_rate", lambda step, how: 1 / 0 if step == 5 else learning_rate(step, how))
        with pytest.raises(ZeroDivisionError):
            twin.run(settings(tmp_path))
    assert not (tmp_path / "outputs" / "twins").exists()
    monkeypatch.setattr(twins, "influence", lambda *_: pytest.fail("measured again"))
    resumed = twin.run(settings(tmp_path))
    mine, theirs = (load_file(made.folder / "model.safetensors") for made in (resumed, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert resumed.recipe["healing"]["curve"] == whole.recipe["healing"]["curve"]
    assert resumed.recipe["held_out"] == whole.recipe["held_out"]


learning_rate = twins.learning_rate


def test_no_steps_leave_the_twin_as_it_was_cut(tmp_path):
    made = twin.run(settings(tmp_path, heal=Healing(steps=0)))
    told = made.recipe["held_out"]["loss"]
    assert told["healed"] == told["cut"] and made.recipe["healing"]["curve"] == []


def test_text_is_split_by_the_hash_of_a_paragraph_and_rows_give_their_question_alone(tmp_path):
    given = settings(tmp_path)
    whole, one = twin.read_text(given.text, 0.3), twin.read_text(given.text[:1], 0.3)
    assert len(whole.training) + len(whole.held_out) == 160 and not set(whole.training) & set(whole.held_out)
    assert set(one.held_out) == set(whole.held_out) & set(prose(80)) and 10 < len(one.held_out) < 40
    assert not [text for text in (*whole.training, *whole.held_out) if "SECRET" in text]
    twice = twin.read_text([given.text[0], given.text[0]], 0.3)
    assert (twice.training, twice.held_out) == (one.training, one.held_out)


@pytest.mark.parametrize(
    "changes, error, told",
    [
        ({"base": ModelRef(model="nowhere/to-be-found")}, ModelError, "cannot load the model nowhere/to-be-found"),
        ({"layers": 2}, SettingsError, r"layers=2: .* has 2 layers \(keep between 1 and 1\)"),
        ({"window": 4096}, SettingsError, r"window=4096: .* has 2048 positions"),
        ({"held_out": 1e-9}, DataError, "the text held out fills no window of 32 tokens"),
        ({"name": "../up"}, SettingsError, r"name=\.\./up cannot name a folder"),
        ({"text": []}, DataError, r"no text to heal on \(text=\[FILE"),
        ({"text": ["none.txt"]}, DataError, r"none\.txt cannot be read: No such file"),
        ({"text": ["."]}, DataError, "cannot be read: Is a directory"),
    ],
)
def test_what_will_not_do_is_one_line_and_leaves_no_twin(tmp_path, changes, error, told):
    with pytest.raises(error, match=told) as raised:
        twin.run(settings(tmp_path, **changes))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "outputs" / "twins").exists()


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("rows.jsonl", b'{"text": "a"}\n{"text": ', r"rows\.jsonl, line 2: not JSON"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}', r"rows\.jsonl, line 2: the text holds half a character"),
        ("rows.jsonl", b'{"text": "a"}\n\n{"answer": "b"}\n', r"line 3: the row has no text \(one of text, question"),
        ("rows.jsonl", b'{"prompt": [{"role": "user"}]}\n', "line 1: the row has no text"),
        ("rows.jsonl", b"[1]\n", "line 1: the row has no text"),
        ("plain.txt", b"\xff\xfe", r"plain\.txt: not UTF-8"),
        ("plain.txt", b" \n\n \n", "holds no text"),
        ("table.csv", b"text\na\n", r"table\.csv is in no form that can be read"),
    ],
)
def test_a_broken_file_is_told_by_its_name_and_line(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ProxytuneError, match=told):
        twin.read_text([tmp_path / name], 0.1)


def test_a_text_of_one_s_own_names_the_folder(tmp_path):
    assert twin.name_of(settings(tmp_path, base=ModelRef(model="org/Model-7B"), layers=10)) == "Model-7B-10-layers"
    assert twin.name_of(settings(tmp_path, base=BASE, layers=2)) == "embedded-base-2-layers"
    assert twin.name_of(settings(tmp_path, base=ModelRef(model="some/folder/"), layers=2)) == "folder-2-layers"


@pytest.mark.parametrize(
    "given, model, revision",
    [
        (["base=org/name"], "org/name", None),
        (["base=./a folder", "base.revision=main"], "./a folder", "main"),
        (["base={model: org/name, revision: abc}"], "org/name", "abc"),
        ([], "embedded:base", None),
    ],
)
def test_base_names_the_model_in_short_or_in_whole(monkeypatch, given, model, revision):
    seen = []
    monkeypatch.setattr("pipelines.twin.run", seen.append)
    assert cli.main(["twin", *given]) == 0
    assert load(Twin, seen[0]).base == ModelRef(model=model, revision=revision)
    assert seen[0]["command"].startswith("proxytune twin") and "base.model" not in seen[0]["command"]
