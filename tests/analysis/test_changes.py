from __future__ import annotations

import math

import numpy as np
import pytest

from proxytune.analysis.changes import sign_flip, summarise
from proxytune.analysis.token_tables import overall, tokens
from proxytune.errors import DataError
from tests.analysis.test_tables_figures import printed

WORDS = {"1": "7", "2": "*", "3": " =", "4": "49", "5": "\n", "6": "[bold]"}


def record(id: str, ids: list[int], base: list[float], steered: list[float], liked: list[int]) -> dict:
    """liked: what the base likes best at each position, with probability .5; steered likes what was said."""

    def logs(values: list[float]) -> list[float]:
        return [math.log(value) for value in values]

    flat = [[math.log(0.5)]] * len(ids)
    return {
        "id": id,
        "prompt": "",
        "ids": ids,
        "pieces": [WORDS[str(i)] for i in ids],
        "logprobs": {"base": logs(base), "expert": logs(steered), "anti": logs(base), "steered": logs(steered)},
        "ranks": {"base": [1 if a == b else 2 for a, b in zip(ids, liked, strict=True)], "steered": [1] * len(ids)},
        "kl": [0.1] * len(ids),
        "top": {"base": [[i] for i in liked], "steered": [[i] for i in ids]},
        "top_logprobs": {"base": flat, "steered": flat},
        "instead": logs([0.2] * len(ids)),
        "words": WORDS,
    }


SUM = [1, 2, 1, 3, 4, 5]  # 7*7 =49


def some(count: int = 6) -> list[dict]:
    """Sums whose left side gains 0.4 a token, the right side 0.1, the rest nothing."""
    base = [0.2, 0.2, 0.2, 0.5, 0.5, 0.5]
    gains = [0.4, 0.4, 0.4, 0.0, 0.1, 0.0]
    steered = [b + g for b, g in zip(base, gains, strict=True)]
    return [record(f"r{i}", SUM, base, steered, [6, 2, 6, 3, 4, 5]) for i in range(count)]


def test_what_changed_is_counted():
    found = summarise([*some(), {"id": "empty", "prompt": "", "ids": [], "pieces": []}], "math", min_uses=6)
    assert (found["replies"], found["tokens"]) == (6, 36)
    assert found["overall"]["changed"]["value"] == pytest.approx(2 / 6)
    assert found["overall"]["gain"]["value"] == pytest.approx(1.3 / 6)
    assert found["overall"]["base_agrees"]["value"] == pytest.approx(4 / 6)
    by_class = {one["class"]: one for one in found["by_class"]}
    assert {name: one["tokens"] for name, one in by_class.items()} == {"left": 18, "right": 6, "other": 12}
    assert by_class["left"]["gain"]["value"] == pytest.approx(0.4)
    assert by_class["left"]["steered"] == pytest.approx(0.6)
    assert [(one["from"], one["to"]) for one in found["by_position"]] == [(1, 1), (2, 2), (3, 4), (5, 6)]
    assert sum(one["tokens"] for one in found["by_position"]) == 36


def test_kinds_are_compared_within_replies_with_a_corrected_test():
    found = summarise(some(12), "math", min_uses=6)["differences"]
    one = next(one for one in found if {one["of"], one["against"]} == {"left", "right"})
    sign = 1 if one["of"] == "left" else -1
    assert one["value"] == pytest.approx(sign * 0.3) and one["replies"] == 12
    assert one["p"] < 0.01 and all(one["p"] <= one["p_holm"] <= 1 for one in found)


def test_tokens_are_told_by_how_far_they_moved_and_only_with_enough_uses():
    found = summarise(some(), "math", min_uses=6)
    assert [one["token"] for one in found["promoted"]] == ["7", "*", "49"]
    assert [(one["uses"], round(one["change"], 6)) for one in found["promoted"]] == [(12, 0.4), (6, 0.4), (6, 0.1)]
    lost = {one["token"]: one for one in found["demoted"]}
    assert lost["[bold]"]["uses"] == 12 and lost["[bold]"]["change"] == pytest.approx(-0.3)
    assert found["promoted"][0]["contexts"][0] == ["", "7", "*7 =49\n"] and len(found["promoted"][0]["contexts"]) == 3
    assert summarise(some(), "math", min_uses=13)["promoted"] == []


def test_the_sign_flip_test_is_right_about_chance_and_about_a_side():
    random = np.random.default_rng(0)
    chance = [sign_flip(random.normal(size=12), seed, flips=500) for seed in range(200)]
    assert np.mean(np.array(chance) < 0.1) == pytest.approx(0.1, abs=0.06)
    assert sign_flip(np.full(5, 0.3)) == pytest.approx(2 / 32, abs=0.01)  # all of one sign, or all of the other
    assert sign_flip(np.zeros(5)) == 1


def test_replies_without_a_token_are_refused():
    with pytest.raises(DataError, match="every reply is empty"):
        summarise([{"id": "a", "prompt": "", "ids": [], "pieces": []}], "text", min_uses=1)


def test_the_terminal_tells_every_part_and_no_text_is_markup():
    found = summarise(some(), "math", min_uses=6)
    summary = found | {"task": "math", "family": "tiny", "system": "steered", "alpha": 1.0, "expert": "math@v1"}
    text = printed(tokens(summary), width=160)
    for word in ("left", "right", "most promoted", "most demoted", "[bold]", "⏎", "3-4", "p = "):
        assert word in text
    assert "33.3%" in overall(summary)
