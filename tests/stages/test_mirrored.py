"""The offline W&B runs of `expert` and `sweep`, read back by wandb itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxytune.settings import Expert, Sweep, Tracker
from tests.stages.conftest import STEPS, Place
from tests.tracking.surroundings import clean_environment

PROGRAM = (
    "import os; from proxytune import settings; from proxytune.stages import expert, sweep\n"
    "from proxytune.tracking import mirror; mirror.INIT_SECONDS = mirror.FINISH_SECONDS = 120.0\n"
    "os.environ.clear(); os.environ.update({environment!r})\n"
    "expert.run(settings.Expert.model_validate_json({expert!r}))\n"
    "sweep.run(settings.Sweep.model_validate_json({sweep!r}))\n"
)


@pytest.fixture(scope="module")
def outputs(warm, trained: Place, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mirrored")
    tracker = Tracker(name="wandb", project="tests", group="first-try", tags=["mine"])
    method = STEPS | {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 6}
    tuned = trained.settings(Expert, tracker=tracker, outputs=folder / "outputs", method=method, sample_steps=6)
    swept = trained.settings(Sweep, tracker=tracker, outputs=folder / "outputs", alphas=[0.0, 1.0])
    told = {"expert": tuned.model_dump_json(), "sweep": swept.model_dump_json()}
    environment = clean_environment(folder, WANDB_MODE="offline")
    done = warm.run([], program=PROGRAM.format(environment=environment, **told))
    assert done.code == 0, done.err
    return folder / "outputs"


def read_back(outputs: Path, stage: str) -> dict[str, Any]:
    """The run of a stage: the run itself, its history, summary, config and artifacts, as wandb reads them."""
    (folder,) = (outputs / "wandb").glob(f"offline-run-*-{stage}-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    environment = clean_environment(outputs.parent)
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in shown.splitlines()]

    def of(kind: str) -> Iterator[Any]:
        return (record[kind] for record in records if record["type"] == kind)

    return {
        "run": next(of("run")),
        "history": [item["item"] for item in of("history")],
        "summary": {key: value for item in of("summary") for key, value in item["update"].items()},
        "config": {key: value for item in of("config") for key, value in item["update"].items()},
        "artifacts": {artifact["type"]: artifact for artifact in of("artifact")},
    }


def tables(history: list[dict[str, Any]]) -> dict[str, int]:
    """Rows of each table."""
    return {
        key.removesuffix(".nrows"): value for row in history for key, value in row.items() if key.endswith(".nrows")
    }


def test_an_expert_s_run_has_its_curve_its_artifact_and_where_that_came_from(outputs, trained):
    found = read_back(outputs, "expert")
    assert (found["run"]["job_type"], found["run"]["run_group"]) == ("expert", "first-try")
    assert {"qa", "random", "mine"} <= set(found["run"]["tags"])
    curve = [(row["step"], row["train/loss"]) for row in found["history"] if "train/loss" in row]
    assert [step for step, _ in curve] == [2, 4, 6, 8, 10, 12] and curve[-1][1] < curve[0][1]
    assert [row["step"] for row in found["history"] if "validation/loss" in row] == [6, 12]
    assert found["summary"]["training/steps"] == 12
    assert tables(found["history"]) == {"samples": 18}, "of three systems, on three prompts, twice"
    model, rows = found["artifacts"]["model"], found["artifacts"]["dataset"]
    assert model["name"] == "qa" and "local-v1" in model["aliases"] and rows["name"] == "qa-rows"
    folder = (outputs / "registry" / "qa" / "v1").as_uri()
    assert all(entry["ref"].startswith(folder) for entry in model["manifest"]["contents"])
    assert json.loads(model["metadata"])["anti"]["model"] == trained.family.small.model
    assert [used["name"] for used in found["config"]["uses"]] == ["qa-rows"]


def test_a_sweep_s_run_has_its_tables_its_curve_and_its_expert(outputs):
    found = read_back(outputs, "sweep")
    assert (found["run"]["job_type"], found["run"]["run_group"]) == ("sweep", "first-try")
    assert tables(found["history"]) == {
        "evaluation": 4,
        "generations": 8,
        "alpha_loss_table": 2,
        "alpha_exact_match_table": 2,
        "alpha_kl_base_table": 2,
        "alpha_kl_expert_table": 2,
    }
    assert (
        found["config"]["_wandb.visualize.alpha_loss"]["panel_config"]["stringSettings"]["title"]
        == "loss against alpha"
    )
    summary = json.loads(next(outputs.glob("sweeps/*/summary.json")).read_text())
    losses = {row["alpha"]: row["loss"] for row in summary["rows"] if row["system"] == "steered"}
    assert found["summary"]["steered/alpha_1/loss"] == pytest.approx(losses[1.0])
    (used,) = found["config"]["uses"]
    assert (used["name"], used["alias"]) == ("qa", "local-v1")
    assert found["artifacts"]["result"]["name"] == "qa-validation-summary"


def test_the_mirror_writes_under_outputs_only(outputs):
    assert (outputs / "wandb").is_dir()
    assert [path for path in outputs.parent.rglob("*wandb*") if outputs not in path.parents] == []
