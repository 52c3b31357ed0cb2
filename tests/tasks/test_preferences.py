from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from proxytune import settings
from proxytune.errors import DataError
from proxytune.tasks import catalog, preferences, sources

PUBLIC = Path(__file__).resolve().parents[3] / "shared" / "data"
FAMILY = settings.Family(
    name="f", small=settings.ModelRef(model="s"), bases={"b": settings.ModelRef(model="b")}, base="b"
)
TEXTS = {"prompt": "Say hello.\n", "chosen": "Hello.", "rejected": "No."}
ASK, HELLO, NO = (
    {"role": role, "content": said} for role, said in (("user", "Hi"), ("assistant", "Hello."), ("assistant", "No."))
)


def load(tmp_path: Path, *lines: object, pairs: bool = True, **given) -> sources.Dataset:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    data = settings.Data(source="files", train=str(path), **given)
    return sources.load(data, catalog.get("qa"), FAMILY, tmp_path / "cache", pairs=pairs)


def many(count: int) -> list[dict]:
    return [{**TEXTS, "prompt": f"Question {i}?\n"} for i in range(count)]


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": [ASK], "chosen": [HELLO], "rejected": [NO]},
        {"chosen": [ASK, HELLO], "rejected": [ASK, NO]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello."},
            "rejected": {"from": "gpt", "value": "No."},
        },
    ],
    ids=["prompt", "dialogues", "hh", "conversations"],
)
def test_four_forms_of_messages_give_the_same_row(raw):
    assert preferences.read({**raw, "id": 7}) == {"id": "7", "prompt": [ASK], "chosen": [HELLO], "rejected": [NO]}


def test_a_dialogue_of_several_turns_parts_at_the_last_reply():
    row = preferences.read({"chosen": [ASK, HELLO, ASK, HELLO], "rejected": [ASK, HELLO, ASK, NO]})
    assert row["prompt"] == [ASK, HELLO, ASK] and row["rejected"] == [NO]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"prompt": "a", "chosen": "b"}, "no rejected reply (its keys: prompt, chosen)"),
        ({**TEXTS, "chosen": " "}, "the chosen reply is empty"),
        ({**TEXTS, "rejected": ""}, "the rejected reply is empty"),
        ({**TEXTS, "prompt": "a "}, "the prompt ends in a space"),
        ({**TEXTS, "rejected": TEXTS["chosen"]}, "the chosen and the rejected reply are the same"),
        ({"prompt": [ASK], "chosen": [HELLO], "rejected": [{**NO, "role": "asistant"}]}, "the role 'asistant'"),
        ({"prompt": [ASK], "chosen": [HELLO], "rejected": [ASK]}, "the last turn is not the assistant's"),
        ({"prompt": [ASK], "chosen": [HELLO], "rejected": "No."}, "but the rejected reply is str"),
        ({"chosen": [ASK, HELLO, ASK, HELLO], "rejected": [ASK, NO]}, "part before the last reply"),
        ({"chosen": "Hello.", "rejected": "No."}, "no dialogue of Human: and Assistant: turns"),
        ({"conversations": [{"from": "bot", "value": "x"}], "chosen": HELLO, "rejected": NO}, "a turn is from 'bot'"),
        ({"prompt": [ASK], "chosen": [HELLO], "rejected": [NO]}, "some rows are texts and some are messages"),
    ],
)
def test_a_bad_pair_is_told_by_file_and_line(tmp_path, bad, told):
    with pytest.raises(DataError) as caught:
        load(tmp_path, TEXTS, bad, many(1)[0])
    assert f"{tmp_path / 'pairs.jsonl'}, line 2: " in str(caught.value) and told in str(caught.value)


def test_all_bad_rows_are_named_or_left_out_and_counted(tmp_path):
    rows = [*many(30), {**TEXTS, "chosen": ""}, {**TEXTS, "prompt": "a "}, *many(40)[30:], {"prompt": 1}]
    with pytest.raises(DataError, match=r"line 31: .*empty; 2 more rows are bad: line 32, line 43 .*bad_rows=skip"):
        load(tmp_path, *rows)
    found = load(tmp_path, *rows, bad_rows="skip")
    assert len(found.rows["train"]) + len(found.rows["validation"]) == 40 and found.skipped == {"train": 3}
    assert found.warnings() == ["3 train rows skipped: not usable for this task"]


def test_pairs_are_rows_of_the_chosen_reply_where_one_reply_is_wanted(tmp_path):
    found = load(tmp_path, *many(9), pairs=False).rows["train"]
    assert {row["completion"] for row in found} == {"Hello."} and "rejected" not in found[0]


def test_test_rows_stay_what_the_task_measures_on(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"prompt": "Now?\n", "completion": "Yes."}) + "\n")
    found = load(tmp_path, *many(9), test=str(path))
    assert found.rows["test"][0]["completion"] == "Yes." and found.rows["train"][0]["chosen"] == "Hello."


def test_built_in_pairs_prefer_a_row_s_own_reply_to_another_s(built_in):
    for name, splits in built_in.items():
        rows = splits["train"]
        made = preferences.made_of(rows)
        assert len(made) == len(rows), name
        replies = [row["completion"] for row in rows]
        for row, pair in zip(rows[:200], made[:200], strict=True):
            assert (pair["id"], pair["prompt"], pair["chosen"]) == (row["id"], row["prompt"], row["completion"])
            assert pair["rejected"] != pair["chosen"] and pair["rejected"] in replies
        assert preferences.made_of(rows[::-1]) == made[::-1], "not by their order"


def test_rows_with_the_same_reply_make_no_pairs():
    rows = [{"id": str(i), "prompt": f"{i}?\n", "completion": "Yes."} for i in range(3)]
    assert preferences.made_of(rows) == []


def test_a_task_without_public_pairs_says_so(tmp_path):
    with pytest.raises(DataError, match=r"qa has no public preference rows .*data=files"):
        sources.load(settings.Data(source="hub"), catalog.get("qa"), FAMILY, tmp_path, pairs=True)


@pytest.mark.skipif(not (PUBLIC / "hh_rlhf").is_dir(), reason="the public hh-rlhf file is not on this machine")
def test_the_public_hh_file_is_read_packed_and_its_nine_bad_rows_are_named(tmp_path):
    file = PUBLIC / "hh_rlhf" / "harmless-base-test.jsonl.gz"
    data = settings.Data(source="files", train=str(file))
    with pytest.raises(DataError, match=r"line \d+: .*; 8 more rows are bad: line \d+"):
        sources.load(data, catalog.get("instruction"), FAMILY, tmp_path, pairs=True)
    found = sources.load(
        data.model_copy(update={"bad_rows": "skip"}), catalog.get("instruction"), FAMILY, tmp_path, pairs=True
    )
    assert found.skipped == {"train": 9}
    assert sum(map(len, found.rows.values())) + sum(found.dropped.values()) == 2312 - 9
    assert all(row["prompt"][-1]["role"] == "user" for row in found.rows["train"])


@pytest.mark.skipif(not (PUBLIC / "llamafactory_demo").is_dir(), reason="LLaMA-Factory's pairs are not on this machine")
def test_the_public_llamafactory_pairs_are_read_as_they_are(tmp_path):
    data = settings.Data(source="files", train=str(PUBLIC / "llamafactory_demo" / "dpo_en_demo.json"))
    found = sources.load(data, catalog.get("instruction"), FAMILY, tmp_path, pairs=True)
    assert sum(map(len, found.rows.values())) + sum(found.dropped.values()) == 300


def test_a_packed_file_that_is_cut_is_told(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(TEXTS).encode())[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        sources.load(settings.Data(source="files", train=str(path)), catalog.get("qa"), FAMILY, tmp_path, pairs=True)
