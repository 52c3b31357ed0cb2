from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxytune.tasks import catalog, code, instruction, math, qa

SCORERS = [
    pytest.param(scorer, id=f"{name}-{metric}")
    for name in catalog.names()
    for metric, scorer in catalog.get(name).metrics.items()
]
FUNCTION = "def f(a, b=2):\n    return a + b\n"


@pytest.mark.parametrize("score", SCORERS)
@given(reference=st.text(max_size=60))
def test_a_reference_scores_one_against_itself(score, reference):
    assert score(reference, reference) == 1


@pytest.mark.parametrize("score", SCORERS)
@given(reference=st.text(max_size=60), output=st.text(max_size=60))
def test_a_score_lies_between_nothing_and_one(score, reference, output):
    assert 0 <= score(reference, output) <= 1


@pytest.mark.parametrize("name", catalog.names())
def test_every_built_in_reference_scores_one_and_an_empty_answer_less(built_in, name):
    for row in built_in[name]["test"][::20]:
        completion = row["completion"]
        reference = completion if isinstance(completion, str) else completion[0]["content"]
        for score in catalog.get(name).metrics.values():
            assert score(reference, reference) == 1 and score(reference, "") < 0.1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7", "7"),
        ("#### 1,234", "1234"),
        ("it costs $80,000.50 in all", "80000.50"),
        ("about .5 of it", ".5"),
        ("it fell to -2.5", "-2.5"),
        ("it fell to -3", "3"),  # the paper's pattern takes a sign before a decimal point only
        ("18 eggs.", "18"),
        ("12 a day, then 13, then none", "13"),
        ("no number here", None),
        ("", None),
    ],
)
def test_the_final_number_is_the_one_that_the_paper_takes(text, number):
    assert math.final_number(text) == number


@pytest.mark.parametrize(
    ("reference", "output", "expected"),
    [
        ("6*3 = <<6*3=18>>18\n#### 18", " They sell 6*3 = 18.\n#### 18", 1),
        ("#### 18", "The answer is 18.0", 1),
        ("#### 70,000", "70000", 1),
        ("#### -10", "#### -10", 1),
        ("#### 18", "#### 19", 0),
        ("#### 18", "18 is what 6*3 makes, of 20", 0),
        ("#### 18", "eighteen", 0),
    ],
)
def test_math_compares_the_last_numbers_as_numbers(reference, output, expected):
    assert math.exact_match(reference, output) == expected


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("def f(a, b=2):\n    pass", 1),
        ("def f(a, b=3):\n    return a + b", 0),
        ("def g(a, b=2):\n    return a + b", 0),
        ("def f(a, b=2):\n    return (a", 0),
        ("def f(a, b=2):\n    return a\nprint(f(1))", 0),
        ("def f(a, b=2):\n    return a\ndef g(): pass", 0),
        ("f = 1", 0),
        ("", 0),
    ],
)
def test_a_valid_function_has_the_asked_name_and_arguments_and_stands_alone(output, expected):
    assert code.valid_function(FUNCTION, output) == expected


def test_a_reference_with_an_import_allows_one():
    reference = "import re\n" + FUNCTION
    assert code.valid_function(reference, "import os\n" + FUNCTION) == 1
    assert code.valid_function(reference, FUNCTION) == 1
    assert code.valid_function(reference, "import re") == 0


def test_edit_similarity_is_the_share_of_matching_characters():
    assert code.edit_similarity("abcd", "abcd\n\n") == 1
    assert code.edit_similarity("abcd", "abxx") == pytest.approx(0.5)
    assert code.edit_similarity("abcd", "xyz") == 0


def test_qa_reads_the_first_line_without_case_and_punctuation():
    assert qa.exact_match(" Ashford lies on the river Ure.\n", "ashford lies on the River Ure\nQuestion: more?") == 1
    assert qa.exact_match(" Ashford lies on the river Ure.\n", "Ashford lies on the river Ask.") == 0


def test_rouge_l_is_the_longest_common_subsequence_against_both_lengths():
    assert instruction.rouge_l("the cat sat on the mat", "The cat on the mat!") == pytest.approx(2 * 5 / 11)
    assert instruction.rouge_l("a b c", "c b a") == pytest.approx(1 / 3)
    assert instruction.rouge_l("a b", "x y") == 0
