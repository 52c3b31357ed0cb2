from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from proxytune.analysis import divergence as divergences
from proxytune.errors import DataError, SettingsError
from proxytune.experts.registry import Registry
from proxytune.settings import DecodeStage, Demo, Evaluate, Sweep
from proxytune.stages import decode, demo, evaluate, sweep
from tests.models.tiny_family import with_long_row

ALPHAS = [0.0, 0.5, 1.0]


def run(place, **changes):
    return sweep.run(place.settings(Sweep, **({"alphas": ALPHAS, "generate": False} | changes)))


def steered(found) -> dict[float, float]:
    return {row["alpha"]: row["loss"] for row in found.summary["rows"] if row["system"] == "steered"}


def points(place) -> set[str]:
    return {file.name.split("-")[1] + file.name.split("-")[2] for file in (place.outputs / "points").iterdir()}


def test_the_lowest_validation_loss_is_kept_and_used_where_alpha_is_left_open(place, pictures, capsys):
    found = run(place)
    losses = steered(found)
    best = min(losses, key=losses.__getitem__)
    assert list(losses) == ALPHAS and found.summary["chosen"] == best
    expert = Registry(place.outputs / "registry").resolve("qa@best")
    assert (expert.version, expert.manifest.alpha) == (1, best)
    assert expert.manifest.scores["selection"]["loss"] == losses[best]
    lines = capsys.readouterr().out.splitlines()
    assert Path(lines[-1]) == found.path and Path(lines[-2].removeprefix("curve: ")).stat().st_size > 1000
    (record,) = decode.run(place.settings(DecodeStage, prompt="Say 1", expert="qa@best"))
    assert record["alpha"] == best
    assert evaluate.run(place.settings(Evaluate, expert="qa@best", generate=False)).summary["chosen"] == best


def test_the_curve_s_numbers_are_those_of_one_evaluation_at_a_time(place):
    swept = run(place, generate=True)
    alone = evaluate.run(place.settings(Evaluate, alpha=0.5, split="validation"))
    row = next(row for row in swept.summary["rows"] if row["alpha"] == 0.5)
    assert row == next(row for row in alone.summary["rows"] if row["system"] == "steered")


def test_without_memory_for_a_batch_a_smaller_one_finds_the_same_curve(place, scarce, capsys):
    whole = run(place)
    for file in [*(place.outputs / "points").iterdir(), *(place.outputs / "analysis").iterdir()]:
        file.unlink()
    scarce(2)
    found = run(place)
    assert capsys.readouterr().err.count("going on with one row at a time") == 2  # steered, its divergence
    assert steered(found) == pytest.approx(steered(whole), rel=1e-5)
    for one, other in zip(whole.summary["curves"], found.summary["curves"], strict=True):
        for point, its in zip(one["points"], other["points"], strict=True):
            assert point["value"] == pytest.approx(its["value"], rel=1e-3, abs=1e-6)


def test_divergences_that_a_killed_sweep_left_are_not_computed_again(place, monkeypatch):
    given = {"score_batch_size": 3, "divergence_rows": 8}
    whole = run(place, **given)
    for file in (place.outputs / "analysis").iterdir():
        file.unlink()
    measure, looked = divergences.divergences, []

    def divergences_of(mixture, rows, alphas, **how):
        looked.append(len(rows))
        if len(looked) == 3:
            raise KeyboardInterrupt
        yield from measure(mixture, rows, alphas, **how)

    monkeypatch.setattr(divergences, "divergences", divergences_of)
    with pytest.raises(KeyboardInterrupt):
        run(place, **given)
    assert run(place, **given).summary["curves"] == whole.summary["curves"]
    assert looked == [3, 3, 2, 2] and not list((place.outputs / "analysis").glob("*.part"))


def test_a_widened_sweep_computes_its_new_alphas_only(place, monkeypatch):
    first = run(place)
    before = points(place)
    scored = []
    compute = evaluate.compute
    monkeypatch.setattr(evaluate, "compute", lambda *args: scored.append((args[1].name, args[2])) or compute(*args))
    wide = run(place, alphas=[0.25, *ALPHAS, 2.0])
    assert scored == [("steered", [(0.25,), (2.0,)])]
    assert len(points(place) - before) == 2 and steered(first).items() <= steered(wide).items()
    assert wide.path == first.path
    monkeypatch.setattr(evaluate.trios, "load", lambda *_: pytest.fail("a trio was loaded"))
    assert steered(run(place)) == steered(first)


def test_a_sweep_tells_every_curve_how_sure_its_alpha_is_and_how_far_it_moves_the_base(place):
    found = run(place, divergence_rows=3)
    curves = {curve["measure"]: curve["points"] for curve in found.summary["curves"]}
    assert list(curves) == ["loss", "kl_base", "kl_expert"]
    assert [point["value"] for point in curves["loss"]] == list(steered(found).values())
    assert curves["kl_base"][0]["value"] == 0 and all(point["value"] > 0 for point in curves["kl_base"][1:])
    best = found.summary["best"]
    assert best["alpha"] == found.summary["chosen"] and sum(one["share"] for one in best["shares"]) == pytest.approx(1)
    kept = {file.name for file in (place.outputs / "analysis").iterdir()}
    assert len(kept) == len(ALPHAS)
    assert json.loads(found.path.read_text())["curves"] == found.summary["curves"]
    run(place, alphas=[*ALPHAS, 2.0], divergence_rows=3)
    assert kept < {file.name for file in (place.outputs / "analysis").iterdir()}
    assert "kl_base" not in {one["measure"] for one in run(place, divergence_rows=0).summary["curves"]}


def test_a_row_longer_than_a_context_is_left_out_of_every_curve(place, tmp_path):
    longer = place.data.model_copy(update={"validation": with_long_row(place.data.validation, tmp_path)})
    whole = {curve["measure"]: curve for curve in run(place).summary["curves"]}
    found = {curve["measure"]: curve for curve in run(place, data=longer).summary["curves"]}
    assert list(found) == list(whole) == ["loss", "kl_base", "kl_expert"]
    for name, curve in found.items():
        values = [point["value"] for point in whole[name]["points"]]
        assert [point["value"] for point in curve["points"]] == pytest.approx(values, rel=1e-4)
    assert [one["measure"] for one in run(place, data=longer, divergence_rows=1).summary["curves"]] == ["loss"]


@pytest.mark.parametrize("measure", [run, lambda place, **how: evaluate.run(place.settings(Evaluate, **how))])
def test_rows_that_are_all_longer_than_a_context_are_refused(place, tmp_path, measure):
    data = place.data.model_copy(update={"validation": with_long_row(place.data.validation, tmp_path)})
    with pytest.raises(DataError, match=r"all of the 1 rows are longer"):
        measure(place, data=data.model_copy(update={"limit_validation": 1}), split="validation", generate=False)


def test_test_rows_choose_nothing(place, capsys):
    found = run(place, split="test")
    registry = Registry(place.outputs / "registry")
    assert registry.resolve("qa").manifest.alpha is None and "best" not in registry.tags("qa")
    assert found.summary["chosen"] == 1.0  # what an expert without a chosen alpha is steered with
    assert "no alpha was chosen" in capsys.readouterr().out
    assert not list(place.outputs.glob("sweeps/*/best.json"))


def records(metrics: dict[float, tuple[float, float]]):
    return {("base", None): []} | {
        ("steered", alpha): [{"loss": loss, "tokens": 2, "metrics": {"own": metric, "other": 1 - metric}}]
        for alpha, (loss, metric) in metrics.items()
    }


def test_the_best_is_by_loss_or_by_metric_and_of_equals_the_one_nearest_to_zero():
    found = records({-1.0: (3.0, 0.9), 0.0: (3.0, 0.5), 0.5: (2.0, 0.4), 2.0: (2.0, 0.9)})
    assert sweep.best(found, "loss") == 0.5
    assert sweep.best(found, "metric") == -1.0


def test_choosing_by_a_metric_that_is_not_measured_is_refused(place):
    with pytest.raises(SettingsError, match="generate=true"):
        run(place, select="metric")


def test_the_demo_runs_every_stage_once_and_ends_with_the_test_table(place, monkeypatch, capsys):
    training = {"name": "sft", "max_steps": 2, "eval_strategy": "no"}
    settings = place.settings(Demo, method=training, alphas=[0.0, 1.0], examples=2, tracker={"name": "none"})
    found = demo.run(settings)
    out = capsys.readouterr().out
    assert Path(out.splitlines()[-1]) == found.path and found.summary["split"] == "test"
    assert [row["system"] for row in found.summary["rows"]] == ["base", "expert", "steered", "tuned"]
    registry = Registry(place.outputs / "registry")
    assert found.summary["expert"] == "qa@v2" == registry.resolve("qa@best").reference
    assert found.summary["chosen"] == registry.resolve("qa@best").manifest.alpha
    monkeypatch.setattr(demo.expert, "run", lambda *_: pytest.fail("it was tuned again"))
    again = demo.run(settings)
    assert json.loads(again.path.read_text())["rows"] == found.summary["rows"]


def test_the_demo_tunes_the_base_that_it_steers(place, monkeypatch):
    asked = {}
    monkeypatch.setattr(demo.expert, "run", lambda part: SimpleNamespace(reference=asked.setdefault(part.model, part)))
    other = place.family.small
    for model in ("small", "base"):
        demo._trained(place.settings(Demo, base_model=other), model)
    assert asked["small"].family == place.family and asked["base"].family.base_ref == other


def test_sweeps_of_other_experts_beside_the_first_keep_folders_of_their_own(place):
    beside = [{"expert": "qa", "alpha": 1.0}, {"expert": "qa@v1", "alpha": 0.4}]
    settings = [place.settings(Sweep, steering=some) for some in ([], beside[:1], beside, [beside[0]] * 2)]
    expert = sweep.trios.find(settings[0])
    alone, same, *others = (sweep.sweep_folder(each, expert) for each in settings)
    assert alone == same and len({alone, *others}) == 3
