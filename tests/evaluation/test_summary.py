import json

import numpy as np
import pytest

from proxytune.errors import DataError
from proxytune.evaluation.summary import Scores, build, verdict

N = 200
TOKENS = np.random.default_rng(0).integers(10, 60, N)
DIFFICULTY = np.random.default_rng(1).normal(0, 0.3, N)


def scores(system, loss, metric=None, alpha=None, ids=None) -> Scores:
    """Rows with this loss per token, and the first `metric` of them answered rightly."""
    hits = None if metric is None else (np.arange(N) < metric * N).astype(float)
    ids = ids or [f"row-{i}" for i in range(N)]
    return Scores(system, alpha, TOKENS * (loss + DIFFICULTY), TOKENS, hits, "exact_match", ids)


BASE, EXPERT, TUNED = scores("base", 2.0, 0.2), scores("expert", 1.9, 0.3), scores("tuned", 1.5, 0.6)
STEERED = scores("steered", 1.6, 0.5, alpha=1.0)


def summary(*given, **options):
    return build("code", "tiny", list(given), expert="code@v1", split="test", samples=300, **options)


def test_summary_has_exactly_the_documented_keys_and_survives_json():
    made = summary(TUNED, STEERED, BASE, EXPERT, command="proxytune evaluate", commit="abc")
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert set(made) == {
        *("task", "family", "expert", "split", "rows", "chosen", "differences", "gap_closed", "verdict", "level"),
        *("command", "commit", "rows_fingerprint"),
    }
    keys = {"system", "alpha", "n", "loss", "metric", "metric_name", "loss_ci", "metric_ci"}
    assert all(set(row) == keys for row in made["rows"])
    keys = {"of", "against", "loss", "loss_ci", "metric", "metric_ci", "excludes_zero"}
    assert all(set(one) == keys for one in made["differences"])
    assert {name: set(gap) for name, gap in made["gap_closed"].items()} == {
        "loss": {"value", "ci", "unstable", "backwards"},
        "metric": {"value", "ci", "unstable", "backwards"},
    }


def test_rows_come_in_one_order_with_loss_per_token_and_counts():
    made = summary(TUNED, STEERED, BASE, EXPERT)
    assert [row["system"] for row in made["rows"]] == ["base", "expert", "steered", "tuned"]
    base = made["rows"][0]
    assert base["loss"] == pytest.approx(BASE.loss.sum() / TOKENS.sum())
    assert (base["n"], base["metric"], base["alpha"], base["metric_name"]) == (N, 0.2, None, "exact_match")
    assert base["loss_ci"][0] < base["loss"] < base["loss_ci"][1]


def test_differences_and_gap_are_steered_minus_the_other():
    made = summary(BASE, EXPERT, STEERED, TUNED)
    by_name = {one["against"]: one for one in made["differences"]}
    assert by_name["base"]["loss"] == pytest.approx(-0.4) and by_name["expert"]["loss"] == pytest.approx(-0.3)
    assert by_name["base"]["metric"] == pytest.approx(0.3) and by_name["expert"]["metric"] == pytest.approx(0.2)
    assert by_name["base"]["excludes_zero"] == {"loss": True, "metric": True}
    assert made["gap_closed"]["loss"]["value"] == pytest.approx(0.8)
    assert made["gap_closed"]["metric"]["value"] == pytest.approx(0.75)


def test_a_sweep_has_one_row_an_alpha_and_is_judged_at_the_chosen_one():
    swept = [scores("steered", 2.0 - alpha, 0.3, alpha) for alpha in (1.0, 0.25, 0.5)]
    made = summary(BASE, *swept, chosen=0.5)
    assert [row["alpha"] for row in made["rows"]] == [None, 0.25, 0.5, 1.0]
    assert made["chosen"] == 0.5
    assert made["differences"][0]["loss"] == pytest.approx(-0.5)
    assert "alpha 0.5 beats base on loss" in made["verdict"]


def test_a_sweep_without_a_chosen_alpha_is_refused():
    swept = [scores("steered", 2.0, alpha=alpha) for alpha in (0.5, 1.0)]
    with pytest.raises(AssertionError, match="which alpha"):
        summary(BASE, *swept)
    with pytest.raises(AssertionError, match="alpha 3 was chosen"):
        summary(BASE, *swept, chosen=3)


def test_without_generation_metric_is_null_and_without_tuned_the_gap_is_empty():
    made = summary(scores("base", 2.0), scores("expert", 1.9), scores("steered", 1.6, alpha=1.0))
    assert made["rows"][0]["metric"] is None and made["rows"][0]["metric_ci"] is None
    assert made["differences"][0]["metric"] is None and made["differences"][0]["excludes_zero"]["metric"] is False
    assert made["gap_closed"] == {}
    assert made["verdict"] == "Steering at alpha 1 beats base and expert on loss (95% paired intervals)."


def test_numbers_that_do_not_exist_become_null():
    same = summary(scores("base", 2.0, 0.2), scores("steered", 1.9, 0.3, alpha=1.0), scores("tuned", 2.0, 0.2))
    assert same["gap_closed"]["loss"] == {
        "value": None, "ci": [None, None], "unstable": True, "backwards": False
    }  # fmt: skip
    json.dumps(same, allow_nan=False)


def test_rows_in_another_order_are_refused():
    with pytest.raises(AssertionError, match="other rows"):
        summary(BASE, scores("steered", 1.0, alpha=1.0, ids=[f"row-{N - i}" for i in range(N)]))


def test_an_evaluation_of_no_rows_is_the_users_error():
    nothing = np.array([])
    with pytest.raises(DataError):
        summary(Scores("base", None, nothing, nothing, None, "exact_match", []))


def difference(against, loss, metric, sure=(True, True)):
    excludes = {"loss": sure[0], "metric": sure[1]}
    return {"of": "steered", "against": against, "loss": loss, "metric": metric, "excludes_zero": excludes}


@pytest.mark.parametrize(
    ("differences", "sentence"),
    [
        (
            [difference("base", -1, 0.1), difference("expert", -1, 0.1)],
            "Steering at alpha 1 beats base and expert on loss and exact match",
        ),
        (
            [difference("base", -1, 0.1), difference("expert", 0.5, 0.1, (True, False))],
            (
                "Steering at alpha 1 beats base on loss and exact match; "
                "it is worse than expert on loss and cannot be told from expert on exact match"
            ),
        ),
        (
            [difference("base", 0.2, -0.1), difference("expert", -1, 0.1)],
            (
                "Steering at alpha 1 does not help: it is worse than base on loss and exact match; "
                "it beats expert on loss and exact match"
            ),
        ),
        (
            [difference("base", -0.2, 0.1, (False, False)), difference("expert", -1, 0.1, (False, False))],
            "Steering at alpha 1 does not help: it cannot be told from base and expert on loss and exact match",
        ),
    ],
)
def test_verdict_says_what_the_intervals_say(differences, sentence):
    assert verdict(differences, 1.0, "exact_match") == f"{sentence} (95% paired intervals)."


def test_a_tuned_base_that_is_worse_than_the_base_leaves_no_gap_to_close():
    made = summary(BASE, STEERED, scores("tuned", 2.5, 0.6))["gap_closed"]
    assert made["loss"]["backwards"] and not made["metric"]["backwards"] and not made["loss"]["unstable"]
