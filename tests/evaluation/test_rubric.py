from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxytune.errors import SettingsError
from proxytune.evaluation.rubric import QUESTION, Rubric, score, verdict


@pytest.mark.parametrize(
    ("said", "points"),
    [
        *((f"It is fine.\nScore: {n}", float(n)) for n in range(6)),
        ("Score: 4", 4.0),
        ("score:4", 4.0),
        ("SCORE : 3", 3.0),
        ("**Score:** 4", 4.0),
        ("**Score: 4**", 4.0),
        ("Score: 4.5", 4.5),
        ("Score: 4.", 4.0),
        ("Score: 4/5", 4.0),
        ("Score: 4 / 5 points", 4.0),
        ("Score: 4 out of 5", 4.0),
        ("Score: 2 points, because much is missing.", 2.0),
        ("Total score: 1\n\nThat is all.", 1.0),
        ('End with "Score: n". Score: 2\nThen again:\nScore: 3', 3.0),
    ],
)
def test_a_score_is_read_however_it_is_set_out(said, points):
    assert score(said) == points


@pytest.mark.parametrize(
    "said",
    [
        "",
        "I give it 4 points.",
        "Score:",
        "Score: four",
        "Score: n",
        "Score: <points>",
        "Score: 7/5",
        "Score: 6",
        "Score: 45",
        "Score: 5.5",
        "Score: -1",
        "Score: 4/10",
        "Score: 4/50",
        "Score: 4 out of 10",
        "Score: 3 or 4",
        "Score: 3-4",
        "Score: 3, 4 and 5",
        "Score: 4\nNo, I was wrong.\nScore: n",
        "Underscore: 4",
    ],
)
def test_what_is_no_clear_score_from_0_to_5_is_no_judgement(said):
    assert score(said) is None


@given(st.text(max_size=80), st.sampled_from([0.0, 1.0, 2.5, 5.0]))
def test_a_verdict_is_read_as_it_was_meant_whatever_comes_before(reason, points):
    assert score(verdict(reason, points)) == points


@given(st.text(max_size=60))
def test_whatever_is_said_the_score_is_none_or_in_range(said):
    for text in (said, f"Score: {said}"):
        found = score(text)
        assert found is None or 0 <= found <= 5


def test_a_question_holds_instruction_and_reply_as_they_are():
    asked = Rubric().question(" Do {response}. ", "Yes: {instruction}\n")
    assert "Instruction:\nDo {response}.\n" in asked and "Reply:\nYes: {instruction}\n" in asked
    assert score(asked) is None and QUESTION.count("- ") == 5, "five points, and the question is no answer"


def test_a_template_that_hides_what_is_judged_is_refused(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("How good is {response}?")
    with pytest.raises(SettingsError, match=r"own\.txt lacks \{instruction\}"):
        Rubric(path)
    path.write_text("{instruction} -> {response}?")
    assert Rubric(path).question("a", "b") == "a -> b?"
