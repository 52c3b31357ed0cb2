from __future__ import annotations

import dataclasses
import json
import time

import pytest

from proxytune import settings
from proxytune.errors import DataError, SettingsError
from proxytune.models import online
from proxytune.tasks import catalog, sources
from proxytune.tasks.task import SPLITS, HubData

REF = settings.ModelRef(model="m")
TINY = settings.Family(name="tiny", small=REF, bases={"b": REF}, base="b", data="builtin")
REAL = settings.Family(name="real", small=REF, bases={"b": REF}, base="b")
BUILT_IN = settings.Data(source="builtin")


def counted(name: str):
    """A real task, and a list that grows whenever its rows are made anew."""
    task, made = catalog.get(name), []
    return dataclasses.replace(task, builtin=lambda: made.append(1) or task.builtin()), made


def test_built_in_rows_come_whole_with_ids_and_fingerprints(tmp_path):
    found = sources.load(settings.Data(), catalog.get("math"), TINY, tmp_path)
    assert found.source == "builtin" and list(found.rows) == list(SPLITS)
    assert found.rows == catalog.get("math").builtin()
    assert set(found.fingerprints) == set(SPLITS) and not found.dropped and not found.warnings()


def test_built_in_rows_are_made_once_and_then_read(tmp_path):
    task, made = counted("qa")
    first, second = (sources.load(BUILT_IN, task, TINY, tmp_path) for _ in range(2))
    assert first == second and len(made) == 1


@pytest.mark.parametrize("damage", ["", "{}", "[]", "null", "{ torn", '{"hash": "x", "rows": {}}', b"\xff\xfe"])
def test_a_damaged_cache_is_made_anew(tmp_path, damage):
    task, made = counted("qa")
    first = sources.load(BUILT_IN, task, TINY, tmp_path)
    (cached,) = tmp_path.iterdir()
    cached.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert sources.load(BUILT_IN, task, TINY, tmp_path) == first and len(made) == 2
    assert sources.load(BUILT_IN, task, TINY, tmp_path) == first and len(made) == 2


def test_a_changed_row_in_the_cache_is_noticed(tmp_path):
    task, made = counted("qa")
    first = sources.load(BUILT_IN, task, TINY, tmp_path)
    (cached,) = tmp_path.iterdir()
    kept = json.loads(cached.read_text())
    kept["rows"]["test"][0]["completion"] = " something else\n"
    cached.write_text(json.dumps(kept))
    assert sources.load(BUILT_IN, task, TINY, tmp_path) == first and len(made) == 2


def test_limits_change_the_fingerprint_of_their_split_only(tmp_path):
    whole = sources.load(BUILT_IN, catalog.get("qa"), TINY, tmp_path)
    data = settings.Data(source="builtin", limit_train=7, limit_validation=3)
    some = sources.load(data, catalog.get("qa"), TINY, tmp_path)
    assert some.rows["train"] == whole.rows["train"][:7] and len(some.rows["validation"]) == 3
    assert some.fingerprints["test"] == whole.fingerprints["test"]
    assert some.fingerprints["train"] != whole.fingerprints["train"] and some.fingerprint != whole.fingerprint


def test_a_built_in_prompt_in_two_splits_is_a_bug(tmp_path):
    row = {"id": "a", "prompt": "p", "completion": "c"}
    task = dataclasses.replace(catalog.get("qa"), builtin=lambda: {split: [row] for split in SPLITS})
    with pytest.raises(AssertionError, match="two splits"):
        sources.load(BUILT_IN, task, TINY, tmp_path)


@pytest.mark.parametrize("given", [{"train": "a.jsonl"}, {"test": "a.jsonl"}, {"revision": "v1"}])
def test_a_setting_that_would_be_ignored_is_refused(tmp_path, given):
    with pytest.raises(SettingsError, match=f"data.{next(iter(given))} is not read from data=builtin"):
        sources.load(settings.Data(**given), catalog.get("qa"), TINY, tmp_path)


@pytest.fixture
def public(tmp_path, monkeypatch):
    """A folder that `datasets` reads as it reads a set on the hub, and a maker of tasks whose rows lie there."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "set"
    folder.mkdir()

    def task(name: str = "math", **hub_data):
        base = catalog.get(name)
        return dataclasses.replace(base, hub=dataclasses.replace(base.hub, path=str(folder), name=None, **hub_data))

    return folder, task


def asked(a: int, b: int) -> str:
    rows = ({"question": f"How many are {i} and 0?", "answer": f"#### {i}" if i != 3 else ""} for i in range(a, b))
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_public_set_is_sliced_mapped_and_kept_apart(tmp_path, public):
    folder, task = public
    (folder / "train.jsonl").write_text(asked(0, 40))
    (folder / "test.jsonl").write_text(asked(38, 50))
    found = sources.load(settings.Data(), task(), REAL, tmp_path)
    assert found.source == "hub" and found.skipped == {"train": 1} and found.dropped == {"validation": 2}
    assert {split: len(kept) for split, kept in found.rows.items()} == {"train": 37, "validation": 0, "test": 12}
    assert found.rows["train"][0]["id"] == "train-0" and found.rows["test"][0]["id"] == "test-0"


def test_only_the_asked_for_training_rows_are_mapped(tmp_path, public):
    folder, task = public
    (folder / "train.jsonl").write_text(asked(0, 40))
    (folder / "test.jsonl").write_text(asked(38, 50))
    mapped = []
    chosen = task(to_row=lambda row: mapped.append(row) or catalog.get("math").hub.to_row(row))
    found = sources.load(settings.Data(source="hub", limit_train=5, limit_test=4), chosen, REAL, tmp_path)
    assert [row["id"] for row in found.rows["train"]] == ["train-0", "train-1", "train-2", "train-4"]
    assert found.skipped == {"train": 1} and any("1 train rows skipped" in line for line in found.warnings())
    assert len(found.rows["test"]) == 4 and len(mapped) == 5 + 2 + 12


def test_a_streamed_set_is_read_from_all_its_files_in_turn(tmp_path, public):
    folder, task = public
    (folder / "data").mkdir()
    for part in range(2):
        (folder / "data" / f"train-0000{part}-of-00002.jsonl").write_text(asked(100 * part + 10, 100 * part + 40))
    slices = {"train": "train[8:40]", "validation": "train[4:8]", "test": "train[0:4]"}
    found = sources.load(settings.Data(limit_train=6), task(streamed=True, splits=slices), REAL, tmp_path)
    numbers = [
        int(row["completion"].split()[-1]) for split in ("test", "validation", "train") for row in found.rows[split]
    ]
    assert sorted(numbers) == [*range(10, 17), *range(110, 117)]
    assert {split: len(kept) for split, kept in found.rows.items()} == {"train": 6, "validation": 4, "test": 4}


def test_a_set_that_fits_no_task_is_told_as_such(tmp_path, public):
    folder, task = public
    (folder / "train.jsonl").write_text('{"other": 1}\n' * 40)
    (folder / "test.jsonl").write_text('{"other": 1}\n' * 4)
    with pytest.raises(DataError, match=r"no row of .* can be used for math"):
        sources.load(settings.Data(), task(), REAL, tmp_path)


def test_a_set_that_is_not_there_is_told_in_one_line(tmp_path, public):
    _, task = public
    with pytest.raises(DataError, match=r"cannot read .* from the hub") as caught:
        sources.load(settings.Data(), task(), REAL, tmp_path)
    assert "\n" not in str(caught.value) and "data=builtin" in str(caught.value)


def test_offline_the_hub_is_given_up_at_once(tmp_path, monkeypatch):
    from datasets import config
    from huggingface_hub import constants

    for module in (config, constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot read openai/gsm8k.*data=builtin, or data=files"):
        sources.load(settings.Data(), catalog.get("math"), REAL, tmp_path)


def test_a_hub_that_does_not_answer_is_given_up_in_seconds(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nothing listens
    start = time.monotonic()
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9 does not answer.*HF_HUB_OFFLINE=1"):
        sources.load(settings.Data(), catalog.get("math"), REAL, tmp_path)
    assert time.monotonic() - start < online.PROBE_SECONDS + 20  # its client alone tries for minutes


@pytest.mark.parametrize("name", catalog.names())
def test_every_public_set_names_all_splits(name):
    public: HubData = catalog.get(name).hub
    assert set(public.splits) == set(SPLITS)
