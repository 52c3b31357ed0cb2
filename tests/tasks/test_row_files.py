from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from proxytune import settings
from proxytune.errors import DataError
from proxytune.models.prompts import text_of
from proxytune.tasks import catalog, rowfiles, sources

PUBLIC = Path(__file__).resolve().parents[3] / "shared" / "data"
FAMILY = settings.Family(
    name="f", small=settings.ModelRef(model="s"), bases={"b": settings.ModelRef(model="b")}, base="b"
)
GOOD = {"prompt": "Say hello.\n", "completion": "Hello."}
TURNS = [{"role": "user", "content": "Hi "}, {"role": "assistant", "content": "Hello."}]


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def load(tmp_path: Path, task: str = "qa", **given) -> sources.Dataset:
    data = settings.Data(source="files", **{key: str(value) for key, value in given.items()})
    return sources.load(data, catalog.get(task), FAMILY, tmp_path / "cache")


def many(count: int) -> list[dict]:
    return [{"prompt": f"Question {i}?\n", "completion": f"Answer {i}."} for i in range(count)]


def test_jsonl_json_and_csv_give_the_same_rows(tmp_path):
    rows = [{"prompt": 'Say "a, b"\nand c.', "completion": "é: a, b\nc"}, GOOD]
    written(tmp_path / "a.jsonl", rows[0], "", rows[1])
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "completion", "note"])
        table.writeheader()
        table.writerows(rows)
    read = [
        rowfiles.read_file(tmp_path / f"a.{kind}", "test", catalog.get("qa"))[0] for kind in ("jsonl", "json", "csv")
    ]
    assert read[0] == read[1] == read[2]
    assert [{key: row[key] for key in GOOD} for row in read[0]] == rows
    assert [row["id"] for row in read[0]] == ["test-0", "test-1"]


def test_messages_become_a_prompt_and_the_last_assistant_turn(tmp_path):
    talk = [{"role": "system", "content": "Be kind."}, *TURNS, {"role": "user", "content": "Bye"}, TURNS[1]]
    path = written(tmp_path / "a.jsonl", {"messages": talk, "id": 7}, {"prompt": TURNS[:1], "completion": TURNS[1:]})
    (first, second), _ = rowfiles.read_file(path, "train", catalog.get("instruction"))
    assert first == {"id": "7", "prompt": talk[:-1], "completion": [TURNS[1]]}
    assert second == {"id": "train-1", "prompt": TURNS[:1], "completion": TURNS[1:]}


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("{nonsense", "not JSON"),
        ("[" * 100_000, "nested too deep"),
        ("[1, 2]", "must be an object, not list"),
        ({"prompt": "a"}, "no completion"),
        ({"completion": "a"}, "neither a prompt nor messages (its keys: completion)"),
        ({"prompt": "a", "completion": " \n"}, "completion is empty"),
        ({"prompt": "", "completion": "a"}, "prompt is empty"),
        ({"prompt": "a ", "completion": "b"}, "ends in a space"),
        ({"prompt": "a", "completion": 4}, "not a string but int"),
        ({"prompt": None, "completion": "a"}, "prompt is not a string but NoneType"),
        ({"prompt": "a", "completion": "\ud800"}, "lone surrogate"),
        ({**GOOD, "id": "\ud800"}, "the id holds half a character"),
        ('{"prompt": "a", "completion": "b", "n": ' + "9" * 5000 + "}", "not JSON"),
        ({"prompt": TURNS[:1], "completion": "Hello."}, "list of messages, but the completion is str"),
        ({"prompt": [], "completion": TURNS[1:]}, "prompt is empty"),
        ({"messages": TURNS[:1]}, "at least two turns"),
        ({"messages": TURNS[::-1]}, "last turn is not the assistant's"),
        ({"messages": [{"role": "usr", "content": "a"}, TURNS[1]]}, "role 'usr'"),
        ({"messages": [{"role": "user"}, TURNS[1]]}, "no role or no content"),
        ({**GOOD, "id": "train-0"}, "already that of another row"),
    ],
)
def test_a_bad_row_is_told_by_file_and_line(tmp_path, bad, told):
    path = written(tmp_path / "rows.jsonl", GOOD, "", bad, GOOD)
    with pytest.raises(DataError) as caught:
        load(tmp_path, train=path)
    assert f"{path}, line 3: " in str(caught.value) and told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_csv_row_is_told_by_the_line_where_it_starts(tmp_path):
    path = written(tmp_path / "rows.csv", "prompt,completion", '"two\nlines",a', "b,", "c,d")
    with pytest.raises(DataError, match=r"rows\.csv, line 4: the completion is empty"):
        load(tmp_path, train=path)
    written(path, "prompt,completion", "a,b,c")
    with pytest.raises(DataError, match="line 2: more fields"):
        load(tmp_path, train=path)
    written(path, "prompt,completion", "a")
    with pytest.raises(DataError, match="line 2: the completion is not a string"):
        load(tmp_path, train=path)
    written(path, "ask,reply", "a,b")
    with pytest.raises(DataError, match=r"line 2: .*keys: ask, reply"):
        load(tmp_path, train=path)


def test_broken_bytes_are_told_by_line(tmp_path):
    for name in ("rows.jsonl", "rows.csv"):
        (tmp_path / name).write_bytes(b"prompt,completion\n\xff\xfe,b\n" if name.endswith("csv") else b"\n\xff\n")
        with pytest.raises(DataError, match="line 2: not UTF-8"):
            load(tmp_path, train=tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", " \n\n"), ("a.json", "[]"), ("a.json", ""), ("a.csv", "prompt,completion\n")]
)
def test_a_file_without_rows_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="holds no rows"):
        load(tmp_path, train=tmp_path / name)


def test_a_file_that_is_not_there_is_answered_with_the_one_that_is(tmp_path):
    written(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"no file .*trian\.jsonl .did you mean 'train\.jsonl'"):
        load(tmp_path, train=tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"no file .*quite-other\.csv .paths start from where you are"):
        load(tmp_path, train=tmp_path / "quite-other.csv")
    with pytest.raises(DataError, match="no form that can be read"):
        load(tmp_path, train=tmp_path / "train.txt")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path, train=tmp_path / "folder.json")
    with pytest.raises(DataError, match="given no file"):
        load(tmp_path)


def test_missing_validation_is_cut_from_train_by_prompt(tmp_path):
    rows = many(400)
    cut = load(tmp_path, train=written(tmp_path / "a.jsonl", *rows, *rows[:50])).rows
    prompts = {split: {row["prompt"] for row in cut[split]} for split in cut}
    assert not prompts["train"] & prompts["validation"] and len(prompts["train"] | prompts["validation"]) == 400
    assert 5 <= len(prompts["validation"]) <= 40
    again = load(tmp_path, train=written(tmp_path / "b.jsonl", *reversed(rows), *many(500)[400:])).rows
    assert prompts["validation"] <= {row["prompt"] for row in again["validation"]}, "depends on itself alone"


def test_two_rows_are_enough_to_cut_from_and_one_is_not(tmp_path):
    rows = load(tmp_path, train=written(tmp_path / "a.jsonl", *many(2))).rows
    assert len(rows["train"]) == len(rows["validation"]) == 1
    with pytest.raises(DataError, match="one prompt only"):
        load(tmp_path, train=written(tmp_path / "a.jsonl", GOOD, {**GOOD, "completion": "Hi."}))


def test_a_held_out_prompt_is_dropped_from_training_and_counted(tmp_path):
    rows = many(10)
    given = {
        split: written(tmp_path / f"{split}.jsonl", *rows[a:b])
        for split, a, b in (("train", 0, 10), ("validation", 6, 9), ("test", 8, 10))
    }
    found = load(tmp_path, **given)
    assert {split: len(kept) for split, kept in found.rows.items()} == {"train": 6, "validation": 2, "test": 2}
    assert found.dropped == {"train": 4, "validation": 1}
    assert found.warnings()[0].startswith(("4 train", "1 validation"))


def test_limits_take_the_first_rows_after_the_overlap_is_gone(tmp_path):
    path, held = written(tmp_path / "a.jsonl", *many(30)), written(tmp_path / "t.jsonl", *many(3))
    data = settings.Data(
        source="files", train=str(path), validation=str(held), test=str(held), limit_train=5, limit_test=2
    )
    found = sources.load(data, catalog.get("qa"), FAMILY, tmp_path)
    assert [row["prompt"] for row in found.rows["train"]] == [f"Question {i}?\n" for i in range(3, 8)]
    assert len(found.rows["test"]) == 2


def test_the_fingerprint_follows_the_rows_and_not_the_file(tmp_path):
    one = load(tmp_path, train=written(tmp_path / "a.jsonl", *many(9)), test=written(tmp_path / "t.jsonl", GOOD))
    same = load(tmp_path, train=written(tmp_path / "b.jsonl", *many(9)), test=tmp_path / "t.jsonl")
    other = load(
        tmp_path, train=tmp_path / "b.jsonl", test=written(tmp_path / "t.jsonl", {**GOOD, "completion": "Hi."})
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.fingerprints["train"] == other.fingerprints["train"]
    assert one.fingerprints["test"] != other.fingerprints["test"]


def test_a_split_that_a_stage_needs_and_nobody_gave_is_asked_for(tmp_path):
    found = load(tmp_path, train=written(tmp_path / "a.jsonl", *many(9)))
    assert found.held("train")
    with pytest.raises(DataError, match=r"no test rows.*data\.test=FILE"):
        found.held("test")


@pytest.mark.skipif(
    not (PUBLIC / "gsm8k" / "test.jsonl").is_file(), reason="the public GSM8K files are not on this machine"
)
def test_the_public_gsm8k_files_are_read_as_they_are(tmp_path):
    found = load(tmp_path, "math", train=PUBLIC / "gsm8k" / "train.jsonl", test=PUBLIC / "gsm8k" / "test.jsonl")
    assert len(found.rows["test"]) == 1319
    assert len(found.rows["train"]) + len(found.rows["validation"]) + sum(found.dropped.values()) == 7473
    exact = catalog.get("math").metrics["exact_match"]
    for row in found.rows["test"]:
        assert row["prompt"].startswith("Question: ") and row["prompt"].endswith("\nAnswer:")
        assert "\n#### " in row["completion"] and exact(row["completion"], row["completion"]) == 1


@pytest.mark.skipif(
    not (PUBLIC / "mbpp" / "mbpp.jsonl").is_file(), reason="the public MBPP file is not on this machine"
)
def test_the_public_mbpp_file_is_read_as_it_is_and_its_solutions_are_valid(tmp_path):
    found = load(tmp_path, "code", test=PUBLIC / "mbpp" / "mbpp.jsonl").held("test")
    valid = catalog.get("code").metrics["valid_function"]
    assert len(found) == 974 and all(valid(row["completion"], row["completion"]) == 1 for row in found)
    assert all(text_of(row["prompt"]).startswith("### Task\n") for row in found)
