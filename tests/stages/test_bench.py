"""The bench times what it names: the same work by each contender, on random models, a family's or a registered trio."""

from __future__ import annotations

import json

import pytest
import torch

from proxytune.settings import Bench
from proxytune.stages import bench

SMALL = {"tokens": 6, "prompt_tokens": 10, "turns": 1, "batch_sizes": [2], "acceptances": [], "threads": 0}


def settings(place, **changes) -> Bench:
    shapes = {"base": [2, 32, 64, 2], "small": [1, 16, 32, 2], "vocabulary": 64}
    return Bench(**({"family": place.family, "outputs": place.outputs, "dtype": "float32"} | SMALL | shapes | changes))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "random"),
        ({"trio": "family"}, "random"),  # what the family is called
        ({"trio": "family", "expert": "qa@v1"}, "qa@v1"),
    ],
)
def test_every_contender_is_timed_beside_another_of_the_same_run(place, capsys, changes, name):
    found = bench.run(settings(place, acceptances=[0.8], drafters=["expert", "ngram"], **changes))
    (file,) = (place.outputs / "bench").glob("*.json")
    assert json.loads(file.read_text()) == json.loads(json.dumps(found)) and found["trio"].startswith(f"{name}: base")
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) == 14 and all(row["beside"] in rows and row["seconds"] > 0 for row in rows.values())
    told = {name.partition(",")[2].strip(): row["acceptance"] for name, row in rows.items() if "acceptance" in row}
    assert {"expert drafts, batch 2", "acceptance 0.8 imposed, batch 2"} <= told.keys()
    assert all(0 <= share <= 1 for share in told.values()) and found["flips"]["positions"] == 40
    assert "obvious loop, batch 2" in capsys.readouterr().out


def test_the_prompts_of_trained_models_are_what_their_base_says(place):
    asked = settings(place, trio="family")
    mixture, _ = bench.trio(asked)
    rows = bench.prompts(asked, mixture, 3)
    assert rows == bench.prompts(asked, mixture, 3) and rows[:2] == bench.prompts(asked, mixture, 2)
    assert len({tuple(row["base"]) for row in rows}) == 3
    assert all(row["base"] == row["expert"] == row["anti"] and len(row["base"]) == 10 for row in rows)


def test_all_write_the_same_tokens(place, monkeypatch):
    """What the ratio is of is one thing: the loop that one writes first says what the engine says, drafts or none."""
    asked = settings(place)
    mixture, _ = bench.trio(asked)
    rows = bench.prompts(asked, mixture, 2)
    said: list[list[list[int]]] = []
    whole = bench.Engine.run

    def run(self, requests):
        replies = dict(whole(self, requests))
        said.append([list(replies[place].token_ids) for place in sorted(replies)])
        return iter(replies.items())

    monkeypatch.setattr(bench.Engine, "run", run)
    contenders = {c.name: c for c in bench.batches(asked, mixture, rows)}
    for name in ("engine, no drafts, batch 2", "engine, expert drafts, batch 2"):
        contenders[name].work()
    assert said[0] == said[1] and [len(reply) for reply in said[0]] == [6, 6]
    ids = torch.tensor([row["base"] for row in rows])
    obvious = bench.obvious(mixture, ids, 6)
    assert obvious.tolist() == said[0]
