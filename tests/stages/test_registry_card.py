"""The model card of an expert that was swept and evaluated for real."""

from __future__ import annotations

from proxytune.experts.card import card
from proxytune.experts.registry import Registry
from proxytune.settings import Evaluate, Sweep
from proxytune.stages import evaluate, sweep


def test_a_card_has_the_alpha_curve_of_a_sweep_and_the_table_of_an_evaluation(place):
    found = sweep.run(place.settings(Sweep, alphas=[0.0, 1.0], generate=False))
    evaluate.run(place.settings(Evaluate, expert="qa@best", generate=False))
    expert = Registry(place.outputs / "registry").resolve("qa@best")
    text = card(expert, "my-org/qa")
    measured, chosen = text.partition("## Measured on test rows")[2].split("## Alpha")
    for system in ("base", "expert", "steered", "tuned"):
        (line,) = [line for line in measured.splitlines() if line.startswith(f"| {system} |")]
        assert "| 9 |" in line and "[" in line, "rows, and an interval"
    assert f"{expert.manifest.alpha:.4g} was best by loss" in chosen
    for row in found.summary["rows"]:
        if row["system"] == "steered":
            assert f"| {row['alpha']:.4g} | {row['loss']:.4g} | - |" in chosen
