from __future__ import annotations

import pytest

from proxytune.errors import DataError
from proxytune.experts.lengths import fit, told
from tests.models.tiny_family import tokenizer

OWN = tokenizer()


def row(name: str, prompt: str, completion: str) -> dict:
    return {"id": name, "prompt": prompt, "completion": completion}


def tokens(text: str) -> int:
    return len(OWN(text).input_ids)


SHORT = row("a", "One?\n", "Two.")
LONG_REPLY = row("b", "One?\n", "Two. " * 40)
LONG_PROMPT = row("c", "One? " * 40 + "\n", "Two.")
ROWS = {"train": [SHORT, LONG_REPLY, LONG_PROMPT, LONG_REPLY | {"id": "d"}], "validation": [SHORT, LONG_PROMPT]}


def ids(rows: dict[str, list[dict]]) -> dict[str, str]:
    return {split: "".join(one["id"] for one in some) for split, some in rows.items()}


def test_rows_are_cut_by_the_trainer_or_left_out_and_counted():
    kept, counts = fit(ROWS, OWN, 40, "truncate")
    assert ids(kept) == {"train": "abd", "validation": "a"}, "nothing of a reply is left behind such a prompt"
    assert counts == {"train_cut": 2, "train_dropped": 1, "validation_dropped": 1}
    assert told(counts, 40)[:2] == [
        "2 train rows cut to max_length=40 tokens",
        "1 train rows dropped: more than max_length=40 tokens",
    ]
    kept, counts = fit(ROWS, OWN, 40, "drop")
    assert ids(kept) == {"train": "a", "validation": "a"}
    assert counts == {"train_dropped": 3, "validation_dropped": 1}


def test_rows_that_are_too_long_are_named_by_number():
    with pytest.raises(DataError) as caught:
        fit(ROWS, OWN, 40, "fail")
    count = tokens(LONG_REPLY["prompt"] + LONG_REPLY["completion"]) + 1
    assert f"train row 2 (id 'b') has {count} tokens, more than max_length=40; so have rows 3, 4" in str(caught.value)


def test_a_row_that_just_fits_is_whole():
    exact = tokens(SHORT["prompt"] + SHORT["completion"]) + 1  # the end of the reply is a token
    assert fit({"train": [SHORT], "validation": []}, OWN, exact, "fail")[1] == {}
    with pytest.raises(DataError, match="train row 1"):
        fit({"train": [SHORT], "validation": []}, OWN, exact - 1, "fail")
    assert fit(ROWS, OWN, None, "fail") == (ROWS, {})


def test_the_longer_of_two_replies_counts():
    pair = {"id": "p", "prompt": "One?\n", "chosen": "Two.", "rejected": "Two. " * 40}
    with pytest.raises(DataError, match="train row 1"):
        fit({"train": [pair], "validation": []}, OWN, 40, "fail")


def test_messages_are_measured_as_the_chat_template_writes_them():
    turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    chat = {"id": "m", "prompt": turns[:1], "completion": turns[1:]}
    exact = len(OWN.apply_chat_template(turns, tokenize=True, return_dict=False))
    assert fit({"train": [chat], "validation": []}, OWN, exact, "fail")[1] == {}
    with pytest.raises(DataError, match=f"has {exact} tokens"):
        fit({"train": [chat], "validation": []}, OWN, exact - 1, "fail")


def test_nothing_left_to_train_on_is_refused():
    with pytest.raises(DataError, match="every train row has more than max_length=3"):
        fit(ROWS, OWN, 3, "drop")
