"""No space left, or no memory: one line, and what was done before is there when there is room again."""

from __future__ import annotations

import pytest

from pipelines import exits
from proxytune.errors import ModelError
from proxytune.stages.room import in_smaller_batches
from tests.faults.test_kill import SHORT, job, points

# The n-th forward of a model finds no memory, and so does every one with more than `rows` rows.
SCARCE = """
from transformers import LlamaForCausalLM
forward = LlamaForCausalLM.forward
def scarce(self, *args, **kwargs):
    if len(kwargs["input_ids"]) > {rows}:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return forward(self, *args, **kwargs)
LlamaForCausalLM.forward = scarce
"""


@pytest.mark.parametrize("stage", SHORT)
def test_a_disk_that_fills_up_at_a_write_is_one_line_and_spoils_nothing(place, stage):
    state, arguments = job(place, stage)
    whole = place.whole(state, arguments)
    broken = {}
    for at in points(whole):
        place.reset(state)
        full, _ = place.run(arguments, at=at, fault="full")
        said = [line for line in full.err.splitlines() if line.startswith("proxytune: no space left")]
        if full.code not in (0, 7) or len(said) != (full.code == 7) or "Traceback" in full.err:
            broken[at, whole.seen[at - 1]] = [full.code, full.err[-600:]]
            continue
        again, _ = place.run(arguments)
        if again.code or (full.code and place.tree() != whole.tree):
            broken[at, whole.seen[at - 1]] = [again.code, again.err[-600:]]
    assert broken == {}


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "outputs/x"),
        Exception("No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ],
    ids=["python", "safetensors", "torch"],
)
def test_a_full_disk_is_told_alike_whoever_wrote(error):
    failure = exits.of(error)
    assert failure.code == 7 and failure.text.startswith("proxytune: no space left on the disk")


@pytest.mark.parametrize("stage", ["decode", "evaluate"])
def test_without_memory_for_a_batch_a_smaller_one_says_the_same(place, stage):
    state, arguments = job(place, stage)
    whole = place.whole(state, arguments)
    place.reset(state)
    ended, _ = place.run(arguments, program=SCARCE.format(rows=3))
    assert ended.code == 0, ended.err
    assert "out of memory; going on with 1 rows at a time" in ended.err
    tree = place.tree()
    names = [name for name in whole.tree if name.startswith(("points/", "replies"))]
    for name in names:
        for one, other in zip(whole.tree[name], tree[name], strict=True):
            assert one.get("text") == other.get("text")
            assert one.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-5)


def test_without_memory_for_one_row_it_stops_with_a_line(place):
    state, arguments = job(place, "decode")
    place.reset(state)
    ended, units = place.run(arguments, program=SCARCE.format(rows=0))
    assert ended.code == 4 and "out of memory with one row at a time" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err and not units


def test_batches_are_halved_and_other_errors_are_not_swallowed():
    tried = []

    def work(rows: int) -> str:
        tried.append(rows)
        if rows > 5:
            raise MemoryError
        return "done"

    assert in_smaller_batches(work, 24) == "done" and tried == [24, 12, 6, 3]
    with pytest.raises(ModelError, match="one row at a time"):
        in_smaller_batches(lambda rows: exec("raise MemoryError"), 4)
    with pytest.raises(RuntimeError, match="shapes"):
        in_smaller_batches(lambda rows: exec("raise RuntimeError('shapes')"), 4)
