"""One bit flipped, or a file cut short: seen before the file is used, and the file is named.

Not looked at: a run's tables, metrics and pictures, and replies of `decode`, which are for people and decide nothing.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxytune.errors import ProxytuneError, StorageError
from proxytune.experts.checkpoints import is_complete, last_complete
from proxytune.experts.registry import Registry
from proxytune.files import Journal, read_checked, read_json, read_jsonl
from tests.faults.conftest import LONG
from tests.faults.place import Place

PLACES = 200 if LONG else 40


@dataclass(frozen=True)
class Kept:
    """outputs: a trained, tagged and measured place. part: a point's part. checkpoint: the second of a training."""

    outputs: Path
    part: Path
    checkpoint: Path

    @property
    def registry(self) -> Registry:
        return Registry(self.outputs / "registry")


@pytest.fixture(scope="module")
def kept(place: Place, tmp_path_factory) -> Kept:
    folder = tmp_path_factory.mktemp("kept")

    def killed(name: str, write: str, which: int, into: Path) -> Path:
        at = [n for n, seen in enumerate(place.whole(name).ended.seen, 1) if write in seen][which]
        place.run(place.begin(name), at=at)
        return Path(shutil.copytree(place.folder / "outputs", into))

    part = next(killed("evaluate", ".part", -1, folder / "cut").glob("points/*.part"))
    training = killed("expert", "/finished.json", 0, folder / "trained") / "training"
    place.reset("decoded")
    for words in (place.words("tag"), place.words("evaluate"), place.words("analyze")):
        assert place.run(words)[0].code == 0
    outputs = Path(shutil.copytree(place.folder / "outputs", folder / "outputs"))
    shutil.copy(next(training.glob("*/figures.json")), outputs)
    return Kept(outputs, part, max(training.glob("*/checkpoints/checkpoint-*")))


def verified(kept: Kept, path: Path) -> None:
    kept.registry.verify(kept.registry.resolve("qa"))


# What is read again, and how. Of what lies in folders here, each file in turn.
READ: dict[str, Callable[[Kept, Path], object]] = {
    "registry/qa/v1/*": verified,
    "registry/qa/v1/manifest.json": verified,
    "registry/qa/v1/adapter_model.safetensors": verified,
    "registry/qa/aliases.json": lambda kept, path: kept.registry.tags("qa"),
    "registry/qa/counter.json": lambda kept, path: kept.registry.settle(kept.registry.resolve("qa@v1")),
    "points/*.jsonl": lambda kept, path: read_checked(path),
    "analysis/tokens-*.jsonl": lambda kept, path: read_checked(path),
    "runs/evaluate-*/scores.jsonl": lambda kept, path: read_jsonl(path),
    "runs/evaluate-*/rows/*.jsonl": lambda kept, path: read_jsonl(path),
    "runs/evaluate-*/summary.json": lambda kept, path: read_json(path),
    "runs/*/config.json": lambda kept, path: read_json(path),
    "runs/*/run.json": lambda kept, path: read_json(path),
    "runs/*/tokens.json": lambda kept, path: read_json(path),
    "figures.json": lambda kept, path: read_json(path),
}


def damages(files: list[Path], seed: str) -> Generator[tuple[Path, str]]:
    """Files in turn, damaged at random and whole again: which one, and how. A last line's end says nothing."""
    chance = random.Random(seed)
    for number in range(PLACES):
        path = files[number % len(files)]
        whole = path.read_bytes()
        at = chance.randrange(len(whole) - whole.endswith(b"\n"))
        if cut := number % 4 == 3:
            path.write_bytes(whole[:at])
        else:
            bit = 1 << chance.randrange(8)
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        try:
            yield path, f"{path.name} {'cut' if cut else f'bit {bit} flipped'} at {at} of {len(whole)}"
        finally:  # also where a test fails here
            path.write_bytes(whole)


@pytest.mark.parametrize("where", READ)
def test_every_damage_is_refused_and_the_file_is_named(kept, where, record_property):
    files = [path for path in sorted(kept.outputs.glob(where)) if path.is_file()]
    for path in files:
        READ[where](kept, path)
    missed = []
    with closing(damages(files, where)) as each:
        for path, how in each:
            try:
                READ[where](kept, path)
                missed.append(how)
            except ProxytuneError as error:
                if path.name not in str(error):
                    missed.append(f"{how}: {error}")
    record_property("refused", f"{PLACES - len(missed)} of {PLACES}")
    assert missed == []


@pytest.mark.crash
@pytest.mark.parametrize("where", ["registry/qa/aliases.json", "registry/qa/counter.json", "figures.json"])
def test_every_bit_and_every_cut_of_a_small_file_is_seen(kept, where, record_property):
    path = kept.outputs / where
    whole = path.read_bytes()
    text = whole.removesuffix(b"\n")  # a last line's end says nothing
    damaged = [text[:at] for at in range(len(text))]
    damaged += [
        text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1 :] for at in range(len(text)) for bit in range(8)
    ]
    missed = []
    try:
        for changed in damaged:
            path.write_bytes(changed)
            try:
                READ[where](kept, path)
                missed.append(changed)
            except ProxytuneError as error:
                assert path.name in str(error)
    finally:
        path.write_bytes(whole)
    record_property("refused", f"{len(damaged) - len(missed)} of {len(damaged)}")
    assert missed == []


def test_of_a_journal_a_torn_end_is_mended_and_any_other_damage_is_seen(kept):
    rows = Journal(kept.part).rows
    ends = [n for n, byte in enumerate(kept.part.read_bytes(), 1) if byte == ord("\n")]
    with closing(damages([kept.part], "part")) as each:
        for _, how in each:
            cut = len(kept.part.read_bytes()) < ends[-1]
            try:
                left = Journal(kept.part).rows
            except StorageError as error:
                assert not cut and kept.part.name in str(error), how
                continue
            assert left == rows[: len(left)] and cut, how


def test_a_checkpoint_with_any_damage_does_not_count(kept, record_property):
    assert is_complete(kept.checkpoint)
    files = [path for path in sorted(kept.checkpoint.iterdir()) if path.is_file()]
    with closing(damages(files, "checkpoint")) as each:
        missed = [how for _, how in each if is_complete(kept.checkpoint)]
    record_property("refused", f"{PLACES - len(missed)} of {PLACES}")
    assert missed == [] and is_complete(kept.checkpoint)


def test_of_two_checkpoints_the_damaged_one_is_passed_over(kept, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(kept.checkpoint.parent, folder)
    newest = last_complete(folder)
    assert newest is not None
    (newest / "adapter_model.safetensors").write_bytes(b"")
    earlier = last_complete(folder)
    assert earlier is not None and earlier != newest


def test_the_command_refuses_a_damaged_expert_and_a_damaged_point_in_one_line(place):
    arguments = place.begin("evaluate")
    assert place.run(arguments)[0].code == 0
    point = next((place.folder / "outputs" / "points").glob("*.jsonl"))
    point.write_bytes(point.read_bytes().replace(b"loss", b"lass", 1))
    ended, _ = place.run(arguments)
    assert ended.code == 7 and f"{point.name} is damaged" in ended.err and "Traceback" not in ended.err

    weights = place.folder / "outputs" / "registry" / "qa" / "v1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    ended, units = place.run(place.words("decode"))
    assert ended.code == 6 and str(weights) in ended.err and len(ended.err.splitlines()) == 1 and not units
