from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from proxytune.errors import DataError, RegistryError, TrioError
from proxytune.experts.registry import Registry
from proxytune.settings import Analyze, Data, Evaluate, Sweep
from proxytune.stages import analyze, evaluate, sweep
from proxytune.stages.shared import trio
from tests.models.tiny_family import write_rows

ROW = {"system", "alpha", "n", "loss", "metric", "metric_name", "loss_ci", "metric_ci"}


def run(place, **changes):
    return evaluate.run(place.settings(Evaluate, **changes))


def rows_of(found) -> dict[str, dict]:
    return {row["system"]: row for row in found.summary["rows"]}


def points(place) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (place.outputs / "points").iterdir()}


@pytest.fixture
def no_models(monkeypatch):
    """From here on a test may read points only."""

    def forbid():
        monkeypatch.setattr(evaluate.trios, "load", lambda *_: pytest.fail("a trio was loaded"))
        monkeypatch.setattr(evaluate.alone, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))

    return forbid


def test_the_last_line_is_the_summary_with_the_keys_that_are_promised(place, capsys):
    run(place, alpha=0.5)
    path = Path(capsys.readouterr().out.splitlines()[-1])
    summary = json.loads(path.read_text())
    assert path.name == "summary.json"
    assert summary.keys() >= {"task", "family", "rows", "gap_closed", "command", "commit"}
    assert (summary["task"], summary["family"], summary["command"]) == ("qa", "random", "proxytune of a test")
    assert [row["system"] for row in summary["rows"]] == ["base", "expert", "steered", "tuned"]
    assert all(row.keys() == ROW and row["n"] == 9 for row in summary["rows"])
    assert [row["alpha"] for row in summary["rows"]] == [None, None, 0.5, None]
    assert summary["gap_closed"].keys() == {"loss", "metric"}


def test_steered_at_alpha_zero_has_the_base_s_very_numbers(place):
    found = run(place, alpha=0.0)
    drop = ("id", "loss", "tokens", "text", "finish_reason", "metrics")
    base, steered = (
        [[row[key] for key in drop] for row in found.records[key]] for key in (("base", None), ("steered", 0.0))
    )
    assert base == steered and any(row["text"] for row in found.records["base", None])
    expert = [row["loss"] for row in found.records["expert", None]]
    assert expert != [row["loss"] for row in found.records["base", None]]


def test_a_second_run_reads_its_points_and_loads_no_model(place, no_models):
    first, kept = run(place), points(place)
    no_models()
    assert run(place).summary["rows"] == first.summary["rows"] and points(place) == kept


def test_a_new_alpha_computes_one_point_and_another_dtype_or_length_all(place, no_models):
    run(place, alpha=0.5, generate=False)
    before = set(points(place))
    run(place, alpha=0.75, generate=False)
    assert [name.split("-")[1] for name in set(points(place)) - before] == ["steered"]
    before = set(points(place))
    run(place, alpha=0.75, generate=False, family=place.family.model_copy(update={"dtype": "bfloat16"}))
    assert sorted(name.split("-")[1] for name in set(points(place)) - before) == ["base", "expert", "steered", "tuned"]


def test_without_generation_there_is_a_loss_and_no_metric(place):
    found = run(place, generate=False)
    assert all(row["loss"] > 0 and row["metric"] is None for row in found.summary["rows"])


def test_scores_go_into_the_manifest(place):
    found = run(place, alpha=0.5)
    kept = Registry(place.outputs / "registry").resolve("qa").manifest.scores["test"]
    steered = rows_of(found)["steered"]
    assert (kept["alpha"], kept["n"], kept["loss"]) == (0.5, 9, steered["loss"])


def test_a_kill_between_two_points_leaves_whole_points_and_the_rest_is_computed(warm, place):
    settings = place.settings(Evaluate, alpha=0.5, tuned=None)
    program = (
        "import os, signal\n"
        "from proxytune.settings import Evaluate\n"
        "from proxytune.stages import evaluate\n"
        "replace, points = os.replace, []\n"
        "def killing(source, target):\n"
        "    points.extend([target] if '/points/' in str(target) else [])\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if len(points) == 2 else replace(source, target)\n"
        "os.replace = killing\n"
        f"evaluate.run(Evaluate.model_validate_json({settings.model_dump_json()!r}))\n"
    )
    done = warm.run([], program=program)
    assert done.code == -signal.SIGKILL, done.err
    whole = {name: content for name, content in points(place).items() if name.endswith(".jsonl") and name[0] != "."}
    assert [name.split("-")[1] for name in whole] == ["base"]
    evaluate.run(settings)
    after = {name: content for name, content in points(place).items() if not name.startswith(".")}
    assert len(after) == 3 and whole.items() <= after.items()
    assert all(len([json.loads(line) for line in content.splitlines()]) == 9 for content in after.values())


def test_held_out_rows_alone_are_enough(place, capsys):
    found = run(place, data=Data(source="files", test=place.data.test), generate=False)
    told = [line for line in capsys.readouterr().err.splitlines() if "proxytune: loading" not in line]
    assert rows_of(found)["tuned"]["n"] == 9 and told == []


def test_rows_that_overlap_and_other_training_rows_are_told(place, tmp_path, capsys):
    train = write_rows(tmp_path / "train.jsonl", 195, 20)
    run(place, data=place.data.model_copy(update={"train": train}), generate=False)
    told = capsys.readouterr().err
    assert "proxytune: 9 train rows dropped" in told and "qa@v1 was trained on other rows" in told


def test_a_split_without_rows_is_refused(place):
    with pytest.raises(DataError, match=r"no validation rows.*data\.validation"):
        run(place, data=Data(source="files", test=place.data.test), split="validation")


def test_only_a_tuned_base_that_fits_is_found(place):
    settings = place.settings(Evaluate)
    expert = trio.find(settings)
    found = trio.tuned_base(settings, expert, "auto")
    assert found is not None and found.reference == "qa-tuned@v1"
    lineage = expert.manifest.data.model_copy(update={"fingerprint": "0" * 64})
    other_rows = replace(expert, manifest=expert.manifest.model_copy(update={"data": lineage}))
    assert trio.tuned_base(settings, other_rows, "auto") is None
    other_base = settings.model_copy(update={"base_model": place.family.small})
    assert trio.tuned_base(other_base, expert, "auto") is None
    assert trio.tuned_base(settings, expert, None) is None
    for name, at in (("qa", settings), ("qa-tuned", other_base)):
        with pytest.raises(TrioError, match=r"is not .* tuned directly"):
            trio.tuned_base(at, expert, name)


def test_of_several_tuned_bases_the_newest_is_taken_whatever_its_name(place):
    settings = place.settings(Evaluate)
    registry, expert = Registry(settings.outputs / "registry"), trio.find(settings)
    tuned = trio.tuned_base(settings, expert, "auto")
    assert tuned is not None
    for name, created in (("a-newer", "2999-01-01T00:00:00+00:00"), ("z-older", "1999-01-01T00:00:00+00:00")):
        with registry.staging() as folder:
            shutil.copytree(tuned.folder, folder, dirs_exist_ok=True)
            (folder / "manifest.json").unlink()
            registry.publish(folder, tuned.manifest.model_copy(update={"name": name, "created": created}))
    found = trio.tuned_base(settings, expert, "auto")
    assert found is not None and found.reference == "a-newer@v1"


def test_a_tuned_base_that_was_damaged_is_not_measured(place):
    weights = next((place.outputs / "registry" / "qa-tuned" / "v1").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RegistryError, match=weights.name):
        run(place, generate=False)


def test_a_tuned_base_that_does_not_fit_is_refused_before_anything_is_measured(place):
    with pytest.raises(TrioError, match="tuned directly"):
        run(place, tuned="qa")
    assert not (place.outputs / "points").exists()


def test_an_expert_that_is_not_there_or_was_changed_is_refused(place):
    with pytest.raises(RegistryError, match="did you mean 'qa'"):
        run(place, expert="qq")
    weights = place.outputs / "registry" / "qa" / "v1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(RegistryError, match="damaged"):
        run(place)


def test_threads_are_set_only_where_they_are_asked_for(place, monkeypatch):
    asked = []
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    run(place, generate=False)
    run(place, generate=False, threads=3)
    assert asked == [3]


@pytest.mark.parametrize(
    ("stage", "kind", "changes"),
    [
        (evaluate, Evaluate, {"data": Data(source="files", test="absent.jsonl")}),
        (sweep, Sweep, {"data": Data(source="files", validation="absent.jsonl")}),
        (analyze, Analyze, {"data": Data(source="files", test="absent.jsonl")}),
        (analyze, Analyze, {"replies": Path("absent.jsonl")}),
    ],
    ids=["evaluate", "sweep", "analyze", "analyze-replies"],
)
def test_rows_that_cannot_be_read_leave_no_run_behind(place, stage, kind, changes):
    with pytest.raises(DataError, match="absent"):
        stage.run(place.settings(kind, **changes))
    assert not (place.outputs / "runs").exists()
