"""One bit flipped, or a file cut short: seen before the file is used, and the file is named."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxytune.errors import ProxytuneError, StorageError
from proxytune.experts.checkpoints import is_complete, last_complete
from proxytune.experts.registry import Registry
from proxytune.files import Journal, read_checked
from tests.faults.conftest import LONG
from tests.faults.place import Place

PLACES = 200 if LONG else 40


@dataclass(frozen=True)
class Kept:
    """What a trained and measured place has on disk: a version, a point, a point's part, a checkpoint."""

    registry: Registry
    version: Path
    point: Path
    part: Path
    checkpoint: Path


@pytest.fixture(scope="module")
def kept(place: Place, tmp_path_factory) -> Kept:
    folder = tmp_path_factory.mktemp("kept")

    def killed(state: str, stage: str, write: str, which: int) -> None:
        arguments = place.stage(stage)
        seen = place.whole(state, arguments).seen
        at = [n for n, name in enumerate(seen, 1) if write in name][which]
        place.reset(state)
        place.run(arguments, at=at)

    killed("trained", "evaluate", ".part", -1)
    shutil.copytree(place.folder / "outputs", folder / "measured")
    killed("empty", "expert", "/finished", 0)
    shutil.copytree(place.folder / "outputs" / "training", folder / "training")
    return Kept(
        Registry(folder / "measured" / "registry"),
        folder / "measured" / "registry" / "qa" / "v1",
        next((folder / "measured" / "points").glob("*.jsonl")),
        next((folder / "measured" / "points").glob("*.part")),
        max(folder.glob("training/*/checkpoints/checkpoint-*")),
    )


def damages(files: list[Path], seed: str) -> Iterator[tuple[Path, str]]:
    """Files in turn, damaged at random and whole again: which one, and how."""
    chance = random.Random(seed)
    for number in range(PLACES):
        path = files[number % len(files)]
        whole = path.read_bytes()
        at = chance.randrange(len(whole))
        if cut := number % 4 == 3:
            path.write_bytes(whole[:at])
        else:
            bit = 1 << chance.randrange(8)
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        yield path, f"{path.name} {'cut' if cut else f'bit {bit} flipped'} at {at} of {len(whole)}"
        path.write_bytes(whole)


def missed(files: list[Path], use: Callable[[Path], object]) -> list[str]:
    """Damages that were not refused by an error that names the file."""
    found = []
    for path, how in damages(files, files[0].name):
        try:
            use(path)
            found.append(how)
        except ProxytuneError as error:
            if path.name not in str(error):
                found.append(f"{how}: {error}")
    return found


def test_of_a_registered_expert_every_damage_is_seen(kept):
    files = [path for path in sorted(kept.version.iterdir()) if path.is_file()]
    assert len(files) >= 4
    assert missed(files, lambda path: kept.registry.verify(kept.registry.resolve("qa"))) == []


@pytest.mark.parametrize("name", ["manifest.json", "adapter_model.safetensors"])
def test_of_the_files_that_decide_every_damage_is_seen(kept, name):
    assert missed([kept.version / name], lambda path: kept.registry.verify(kept.registry.resolve("qa"))) == []


def test_of_a_point_every_damage_is_seen(kept):
    assert len(read_checked(kept.point)) == 5
    assert missed([kept.point], read_checked) == []


def test_of_a_journal_a_torn_end_is_mended_and_any_other_damage_is_seen(kept):
    rows = Journal(kept.part).rows
    ends = [n for n, byte in enumerate(kept.part.read_bytes(), 1) if byte == ord("\n")]
    for _, how in damages([kept.part], "part"):
        cut = len(kept.part.read_bytes()) < ends[-1]
        try:
            left = Journal(kept.part).rows
        except StorageError as error:
            assert not cut and kept.part.name in str(error), how
            continue
        assert left == rows[: len(left)], how
        assert cut or how.endswith(f"at {ends[-1] - 1} of {ends[-1]}"), how


def test_a_checkpoint_with_any_damage_does_not_count(kept):
    assert is_complete(kept.checkpoint)
    files = [path for path in sorted(kept.checkpoint.iterdir()) if path.is_file()]
    assert [how for _, how in damages(files, "checkpoint") if is_complete(kept.checkpoint)] == []
    assert is_complete(kept.checkpoint)


def test_of_two_checkpoints_the_damaged_one_is_passed_over(kept, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(kept.checkpoint.parent, folder)
    newest = last_complete(folder)
    assert newest is not None
    (newest / "adapter_model.safetensors").write_bytes(b"")
    earlier = last_complete(folder)
    assert earlier is not None and earlier != newest


def test_the_command_refuses_a_damaged_expert_and_a_damaged_point_in_one_line(place):
    place.reset("trained")
    arguments = place.stage("evaluate")
    assert place.run(arguments)[0].code == 0
    point = next((place.folder / "outputs" / "points").glob("*.jsonl"))
    point.write_bytes(point.read_bytes().replace(b"loss", b"lass", 1))
    ended, _ = place.run(arguments)
    assert ended.code == 7 and f"{point.name} is damaged" in ended.err and "Traceback" not in ended.err

    weights = place.folder / "outputs" / "registry" / "qa" / "v1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    ended, units = place.run(place.stage("decode"))
    assert ended.code == 6 and str(weights) in ended.err and len(ended.err.splitlines()) == 1 and not units
