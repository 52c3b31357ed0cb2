"""NaN, infinity and other numbers that a model may give: the row stops, and its place is named."""

from __future__ import annotations

import pytest

BROKEN = """
from transformers import LlamaForCausalLM
forward, calls = LlamaForCausalLM.forward, []
def broken(self, *args, **kwargs):
    found = forward(self, *args, **kwargs)
    if self.config.hidden_size == {width}:
        found.logits[..., -1, 40] = float("{number}")
    return found
LlamaForCausalLM.forward = broken
"""
BASE, SMALL = 32, 16


@pytest.mark.parametrize("stage", ["decode", "evaluate"])
@pytest.mark.parametrize(("width", "number"), [(BASE, "nan"), (BASE, "inf"), (SMALL, "nan"), (SMALL, "inf")])
def test_a_number_that_is_none_stops_with_its_place(place, stage, width, number):
    place.reset("trained")
    ended, _ = place.run(place.stage(stage), program=BROKEN.format(width=width, number=number))
    (last,) = ended.err.splitlines()[-1:]
    assert ended.code == 4 and "position" in last and "Traceback" not in ended.err, ended.err[-800:]
    measured = {path.name.split("-")[1] for path in (place.folder / "outputs" / "points").glob("*.jsonl")}
    assert measured <= ({"base"} if width == SMALL else set())
