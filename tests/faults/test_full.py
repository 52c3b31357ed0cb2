"""No space left, or no memory: one line, and what was done before is there when there is room again."""

from __future__ import annotations

import pytest

from pipelines import exits
from proxytune.errors import ModelError
from proxytune.stages.shared.room import in_smaller_batches
from tests.faults.place import COMMANDS, Place, Whole
from tests.faults.test_kill import ALL, points
from tests.faults.writes import GROWING
from tests.models.tiny_family import save_llama

# So many MiB more than a run begins with.
LIMIT = """
import resource
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + ({room} << 20), resource.RLIM_INFINITY))
"""
# From the n-th forward of a model on there is no memory for more than so many rows.
SCARCE = """
from transformers import LlamaForCausalLM
forward, calls = LlamaForCausalLM.forward, []
def scarce(self, *args, **kwargs):
    calls.append(0)
    if len(calls) >= {call} and len(kwargs["input_ids"]) > {rows}:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return forward(self, *args, **kwargs)
LlamaForCausalLM.forward = scarce
"""


@pytest.mark.parametrize("name", ALL)
def test_a_disk_that_fills_up_at_a_write_is_one_line_and_spoils_nothing(place: Place, name, record_property):
    whole = place.whole(name)
    moments = points(whole, GROWING)
    faults = {f"{at} {whole.ended.seen[at - 1]}": filled_up(place, name, whole, at) for at in moments}
    broken = {where: found for where, found in faults.items() if found}
    record_property("full disks", len(moments))
    record_property("lost, changed or badly told", len(broken))
    assert broken == {}


def filled_up(place: Place, name: str, whole: Whole, at: int) -> list[str]:
    """What is wrong after a disk that was full from a moment on, and had room again for a second run."""
    arguments = place.begin(name)
    full, _ = place.run(arguments, at=at, fault="full")
    told = [line for line in full.err.splitlines() if line.startswith("proxytune: no space left")]
    if full.code != 7 or len(told) != 1 or "Traceback" in full.err:
        return [f"ended with {full.code}: {full.err[-600:]}"]
    again, _ = place.run(arguments)
    if again.code not in COMMANDS[name].again:
        return [f"the second run ended with {again.code}: {again.err[-600:]}"]
    return place.differences(whole)


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


@pytest.mark.parametrize("room", [32, 100, *(pytest.param(room, marks=pytest.mark.crash) for room in (16, 64, 160))])
def test_without_memory_to_load_a_model_it_stops_with_a_line_and_leaves_all_as_it_was(place: Place, room):
    """Less than the weights take, and less than they and their copy do."""
    large = save_llama(place.given / "large", seed=3, hidden=1024, rows=2112)  # 84 MB
    words = [*place.begin("decode"), f"base_model={{model: {large}}}"]
    before = place.tree()
    ended, units = place.run(words, program=LIMIT.format(room=room))
    assert ended.code == 4 and f"not enough memory for the model {large}" in ended.err.splitlines()[-1], ended.err
    assert "Traceback" not in ended.err and not units and place.tree() == before


@pytest.mark.parametrize("name", ["decode", "evaluate"])
def test_without_memory_for_a_batch_a_smaller_one_says_the_same(place: Place, name):
    whole = place.whole(name)
    # two: expert and anti are read as two rows of one model for each row
    ended, _ = place.run(place.begin(name), program=SCARCE.format(call=1, rows=2))
    assert ended.code == 0, ended.err
    assert "out of memory; going on with one row at a time" in ended.err
    tree = place.tree()
    for key in (key for key in whole.tree if key.startswith(("points/", "replies"))):
        for one, other in zip(whole.tree[key], tree[key], strict=True):
            assert one.get("text") == other.get("text")
            assert one.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-5)


@pytest.mark.parametrize("name", ["decode", "evaluate", pytest.param("sweep", marks=pytest.mark.crash)])
def test_without_memory_for_one_row_it_stops_with_a_line_and_goes_on_from_what_it_had(place: Place, name):
    whole = place.whole(name)
    left: list[int] = []
    for call in (1, 2, 6, 14):
        ended, before = place.run(place.begin(name), program=SCARCE.format(call=call, rows=0))
        assert ended.code == 4 and "out of memory with one row at a time" in ended.err.splitlines()[-1], ended.err
        assert "Traceback" not in ended.err
        again, after = place.run(place.words(name))
        assert again.code == 0 and place.differences(whole) == []
        assert (before + after)["r"] == whole.units["r"], "no reply is written twice"
        left.append(before.total())
    assert left[0] == 0 and left[-1] > 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["python", "cuda", "cublas", "cpu"],
)
def test_memory_that_ran_out_is_told_alike_whoever_wanted_it(error):
    failure = exits.of(error)
    assert failure.code == 4 and failure.text.startswith("proxytune: out of memory")


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
