from __future__ import annotations

import pytest

from proxytune.errors import DataError
from proxytune.experts import dpo, sft, tuning
from proxytune.experts.starting import Start
from proxytune.experts.tuning import Job
from proxytune.experts.turns import as_taken
from proxytune.models import prompts
from proxytune.settings import Method, Peft
from tests.models.test_prompts import OWN, refusing, said
from tests.models.tiny_family import TRAINING

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}
REPLY = [{"role": "assistant", "content": "Yes."}]


def row(*turns, **replies) -> dict:
    return {"id": "a", "prompt": list(turns)} | (replies or {"completion": REPLY})


class Reached(Exception):
    pass


@pytest.mark.parametrize("kind, replies", [("sft", ["completion"]), ("dpo", ["chosen", "rejected"])])
def test_what_an_expert_is_trained_on_is_what_it_is_asked_with(small, tmp_path, kind, replies):
    own = refusing("system")
    job = Job(Start(small), own, Method(name=kind, **TRAINING), Peft(r=4), tmp_path / "work")
    rows = {"train": [row(SYSTEM, USER, **dict.fromkeys(replies, REPLY))], "validation": []}
    read = []

    def trainer(model, config, fitted):
        made = {"sft": sft, "dpo": dpo}[kind].trainer(model, config, fitted, job)
        first = made.train_dataset[0]
        read.append(first["prompt_ids"] if kind == "dpo" else first["input_ids"])
        raise Reached

    with pytest.raises(Reached):
        tuning.run(job, rows, trainer)
    asked = prompts.encode([SYSTEM, USER], own, "chat")
    assert said(asked) == "<|user|>\nBe brief.\n\nHello?<|end|>\n<|assistant|>\n"
    assert read[0][: len(asked)] == asked


def test_rows_that_a_template_takes_and_texts_stay_as_they_are():
    text = {"id": "t", "prompt": "One?\n", "completion": "Two."}
    rows = {"train": [row(SYSTEM, USER)], "validation": []}
    assert as_taken(rows, OWN) == rows and as_taken({"train": [text]}, OWN) == {"train": [text]}


@pytest.mark.parametrize("refused", ["user", "assistant"])
def test_a_row_that_a_template_refuses_all_the_same_is_named(refused):
    rows = {"train": [{"id": "t", "prompt": "a", "completion": "b"}, row(USER)]}
    with pytest.raises(DataError, match=rf"train row 2 \(id 'a'\): the chat template of .* refuses .*: no {refused}"):
        as_taken(rows, refusing(refused))
