from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest

from proxytune.analysis import canvas, curve_figures, curves
from proxytune.evaluation.intervals import Measured
from tests.analysis.test_tables_figures import make

N = 60
IDS = [str(i) for i in range(N)]


def records(losses: dict[float, float], noise: float = 0.0) -> dict:
    random = np.random.default_rng(1)

    def rows(loss: float, metric: float) -> list[dict]:
        return [
            {
                "id": id,
                "loss": 10 * (loss + noise * random.normal()),
                "tokens": 10,
                "metrics": {"own": float(i < metric * N), "other": 0.5},
            }
            for i, id in enumerate(IDS)
        ]

    return {("base", None): rows(3.0, 0.1), ("expert", None): rows(2.0, 0.3)} | {
        ("steered", alpha): rows(loss, 0.1 * alpha) for alpha, loss in losses.items()
    }


def apart(alphas) -> dict:
    return {a: [{"id": id, "kl_base": 10 * a, "kl_expert": 5.0, "tokens": 10} for id in IDS] for a in alphas}


def test_every_measure_has_a_curve_with_the_levels_of_the_others():
    found = curves.told(records({0.0: 3.0, 1.0: 2.0}), apart([0.0, 1.0]), "loss", samples=50)
    by_name = {curve["measure"]: curve for curve in found["curves"]}
    assert list(by_name) == ["loss", "own", "other", "kl_base", "kl_expert"]
    assert [point["value"] for point in by_name["loss"]["points"]] == pytest.approx([3, 2])
    assert by_name["loss"]["levels"] == pytest.approx({"base": 3.0, "expert": 2.0}) and by_name["loss"]["better"] == -1
    assert [point["value"] for point in by_name["kl_base"]["points"]] == [0, 1] and by_name["kl_base"]["better"] == 0
    low, high = by_name["own"]["points"][1]["ci"]
    assert low <= by_name["own"]["points"][1]["value"] <= high


def test_an_alpha_that_is_always_best_is_certain_and_equals_go_to_the_one_nearest_to_zero():
    sure = curves.told(records({0.0: 3.0, 1.0: 2.0, 2.0: 2.5}), {}, "loss", samples=200)["best"]
    assert (sure["alpha"], sure["ci"], sure["by"]) == (1.0, [1.0, 1.0], "loss")
    assert {one["alpha"]: one["share"] for one in sure["shares"]} == {0.0: 0, 1.0: 1, 2.0: 0}
    same = Measured(IDS, np.ones(N), np.ones(N))
    assert curves.best({-2.0: same, 0.5: same, 1.0: same}, 1, samples=50)["alpha"] == 0.5


def test_alphas_that_cannot_be_told_apart_share_the_best():
    found = curves.told(records({0.5: 2.0, 1.0: 2.0, 1.5: 2.0, 2.0: 9.0}, noise=0.5), {}, "loss", samples=500)["best"]
    shares = {one["alpha"]: one["share"] for one in found["shares"]}
    assert sum(shares.values()) == pytest.approx(1) and shares[2.0] == 0
    assert sum(share > 0.01 for share in shares.values()) > 1 and found["ci"][0] < found["ci"][1]
    assert f"{found['alpha']:g} in" in curves.best_line(found)


def test_by_metric_more_is_better_and_test_rows_choose_nothing():
    given = records({0.0: 1.0, 1.0: 2.0, 3.0: 9.0})
    assert curves.told(given, {}, "metric", samples=50)["best"]["alpha"] == 3.0
    assert "best" not in curves.told(given, {}, None, samples=50)


def test_a_summary_without_curves_makes_them_of_its_rows():
    summary = make(alphas=(0.0, 0.5, 1.0), chosen=0.5)
    found = {curve["measure"]: curve for curve in curves.curves_of(summary)}
    assert list(found) == ["loss", "exact_match"]
    assert [p["value"] for p in found["loss"]["points"]] == [
        row["loss"] for row in summary["rows"] if row["system"] == "steered"
    ]


@pytest.fixture
def whole() -> dict:
    summary = make(alphas=(0.0, 0.5, 1.0), chosen=0.5)
    given = records({0.0: 3.0, 0.5: 2.0, 1.0: 2.5})
    return summary | curves.told(given, apart([0.0, 0.5, 1.0]), "loss", samples=50)


def test_every_curve_and_trade_off_is_drawn_and_told_in_words(whole, tmp_path):
    drawn = {panel.name: panel for panel in curve_figures.panels(whole)}
    assert {
        "alpha-loss",
        "alpha-own",
        "alpha-divergence",
        "trade-kl_base-loss",
        "trade-own-other",
        "alpha-best",
    } <= set(drawn)
    assert "alpha 0.5: 2.000" in drawn["alpha-loss"].alt
    curve_figures.alpha_curve(whole, tmp_path / "curve.png")
    assert matplotlib.image.imread(tmp_path / "curve.png").shape[1] == 980 * 2


def test_a_panel_in_a_page_has_no_colour_of_its_own_and_no_ids_of_another(whole):
    (one, two, *_) = (canvas.svg(panel) for panel in curve_figures.panels(whole))
    assert one.startswith('<svg role="img" aria-label="') and "var(--steered)" in one and ">alpha</text>" in one
    assert not [
        mark for mark in ("#0072b2", "#222222", "<script", "<style", "http://www.w3.org/1999/02") if mark in one
    ]
    ids = [set(part.split('"')[0] for part in text.split(' id="')[1:]) for text in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    assert all(f'id="{used}"' in one for used in [part.split('"')[0] for part in one.split('href="#')[1:]])
