"""What killed writers, other writers and careless hands leave in a registry: it is mended, passed over or named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from proxytune.errors import RegistryError
from proxytune.experts.manifest import FILENAME
from proxytune.experts.registry import ALIASES, COUNTER, Registry
from proxytune.files import read_json
from tests.experts.test_registry import draft, publish, refusal


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def test_what_a_dead_writer_staged_goes_when_the_next_one_begins(registry):
    dead = registry.root / ".staging" / "tmpdead" / "model"
    dead.mkdir(parents=True)
    (dead / "model.safetensors").write_bytes(b"half")
    (registry.root / ".staging" / "note").write_text("not a folder")
    with registry.staging() as own:
        assert own.is_dir() and not dead.parent.exists()
    assert sorted(path.name for path in (registry.root / ".staging").iterdir()) == [".lock", "note"]


def test_a_number_that_was_given_and_not_counted_is_counted_and_never_given_again(registry):
    first = publish(registry)
    (registry.root / "code" / COUNTER).unlink()  # killed between the two
    assert registry.settle(first) == first
    assert read_json(registry.root / "code" / COUNTER) == {"last": 1}
    registry.remove("code@v1")
    assert publish(registry).version == 2


def test_settling_an_older_version_does_not_turn_the_counter_back(registry):
    first, _ = publish(registry), publish(registry)
    registry.settle(first)
    assert publish(registry).version == 3


def test_a_tag_on_a_version_whose_folder_was_deleted_says_so(registry):
    publish(registry), publish(registry)
    registry.tag("code@v1", "best")
    shutil.rmtree(registry.root / "code" / "v1")
    assert "code@best means v1, which is gone (tag another" in refusal(RegistryError, registry.resolve, "code@best")
    assert registry.resolve("code").version == 2


def test_a_manifest_with_a_changed_byte_is_refused_by_its_checksum(registry):
    path = publish(registry).folder / FILENAME
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    assert "its content changed" in refusal(RegistryError, registry.resolve, "code")


def test_a_version_removed_while_it_is_looked_at_is_no_damage(registry, monkeypatch):
    publish(registry), publish(registry)
    load = registry._load

    def removed_first(name: str, version: int):
        if version == 1:
            shutil.rmtree(registry.root / name / "v1", ignore_errors=True)
        return load(name, version)

    monkeypatch.setattr(registry, "_load", removed_first)
    assert [expert.version for expert in registry.experts()] == [2]
    assert "removed just now" in refusal(RegistryError, load, "code", 1)


@pytest.mark.parametrize("content", ["{", '{"best": "three"}', "[3]"])
def test_a_broken_list_of_tags_is_named(registry, content):
    publish(registry)
    (registry.root / "code" / ALIASES).write_text(content)
    assert ALIASES in refusal(RegistryError, registry.resolve, "code@best")


def test_what_a_killed_publisher_half_wrote_is_left_out(registry):
    with registry.staging() as folder:
        (folder / "model.safetensors").write_bytes(b"whole")
        (folder / ".manifest.json.abc.tmp").write_bytes(b"half")
        assert list(registry.publish(folder, draft()).manifest.files) == ["model.safetensors"]
