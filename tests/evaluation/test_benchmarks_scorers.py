"""The published definitions, on outputs whose scores are known."""

from __future__ import annotations

import itertools
import math
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxytune.evaluation.benchmarks import (
    alpaca_farm,
    catalog,
    ds1000,
    gsm8k,
    humaneval,
    realtimeqa,
    toxigen,
    triviaqa,
    truthfulqa_mc,
    truthfulqa_open,
    weighed,
)
from proxytune.evaluation.benchmarks.benchmark import Rule, Verdict
from proxytune.evaluation.benchmarks.report import report


def scored(benchmark, pairs, **options):
    """The report of (reference, output) pairs that a rule judges."""
    assert isinstance(benchmark.judge, Rule)
    verdicts = [[benchmark.judge.verdict(benchmark.reference(wanted), output)] for wanted, output in pairs]
    return report(benchmark, verdicts, [{} for _ in verdicts], **options)


def test_every_benchmark_is_named_as_in_the_catalog_and_has_its_settings():
    from proxytune.files import resource

    for name in catalog.names():
        benchmark = catalog.get(name)
        assert benchmark.name == name and benchmark.summary and benchmark.decoding.max_new_tokens > 0
    files = {file.stem for file in (resource("conf") / "benchmark").glob("*.yaml")}
    assert files == {*catalog.names(), *weighed.KINDS, "heldout_loss"}


# GSM8K


@pytest.mark.parametrize(
    ("output", "right", "parsed"),
    [
        (" She makes 9 * 2 = $18 every day.", 1, 1),
        ("#### 18", 1, 1),
        ("18 eggs, or rather 19", 0, 1),
        ("so -18", 1, 1),  # punctuation is ignored, and with it a sign
        ("1.8 dozen", 1, 1),  # and a decimal point
        ("18.0", 0, 1),
        ("1,8", 1, 1),
        ("eighteen", 0, 0),
        ("", 0, 0),
    ],
)
def test_gsm8k_is_the_last_number_with_case_and_punctuation_ignored(output, right, parsed):
    assert gsm8k.verdict("18", output) == Verdict({"exact_match": right}, bool(parsed))


def test_gsm8k_references_are_those_of_the_release_or_bare_numbers():
    given = ["9*2 = <<9*2=18>>18\n#### 1,218", "1218", "1,218", 1218, 1218.0, " 1218 "]
    assert {gsm8k.reference(answer) for answer in given} == {"1218"}
    assert gsm8k.verdict(gsm8k.reference("$18"), "so 18").values == {"exact_match": 1}
    assert gsm8k.reference("1,234,567") == "1234567" and gsm8k.reference("#### -3") == "-3"
    for bad in ("eighteen", "", "#### none", None):
        with pytest.raises(ValueError, match="is no number"):
            gsm8k.reference(bad)


def test_gsm8k_outputs_end_where_the_model_starts_another_exercise():
    trim = gsm8k.BENCHMARK.trim
    assert trim("18\n\nQuestion: What is 5?\nAnswer: 5") == "18\n\n"
    assert trim("18. Comment: I like 7.\nQuestion: 3") == "18. "
    assert trim("18 Answer the following question with 4") == "18 "
    assert trim("18") == trim(trim("18Comment:")) == "18"


@given(st.text(alphabet=string.digits + ",.-$ ab", max_size=30))
def test_gsm8k_agrees_with_numpy_s_way_of_the_published_metric(output):
    """The metric that the authors used compares arrays of texts, lower-cased and with a translation table."""
    found = gsm8k.final_number(output)
    sides = [np.char.lower(np.asarray([text])) for text in (output if found is None else found, "18")]
    table = str.maketrans("", "", string.punctuation)
    left, right = (np.char.translate(side, table=table) for side in sides)
    assert gsm8k.verdict("18", output).values["exact_match"] == float(np.mean(left == right))


def test_gsm8k_counts_unparsed_outputs_as_wrong():
    found = scored(gsm8k.BENCHMARK, [("18", "18"), ("18", "?"), ("5", "so 5"), ("5", "6")])
    assert (found["exact_match"], found["n"], found["unparsed"]) == (0.5, 4, 1)


# TriviaQA


@pytest.mark.parametrize(
    ("output", "accuracy", "exact_match"),
    [
        ("Sunset Boulevard", 1, 1),
        (" sunset boulevard\n", 1, 1),
        ("The Sunset-Boulevard.", 0, 1),
        ("Sunset_Boulevard", 0, 1),
        ("\u2018Sunset\u2019 Boulevard", 0, 1),
        ("Sunset Boulevard, Los Angeles", 0, 0),
        ("", 0, 0),
    ],
)
def test_triviaqa_tells_the_paper_s_rule_and_the_official_one(output, accuracy, exact_match):
    reference = triviaqa.reference(["Sunset Blvd", "Sunset Boulevard"])
    assert triviaqa.verdict(reference, output).values == {"accuracy": accuracy, "exact_match": exact_match}


def test_triviaqa_reads_every_public_form_of_the_answers():
    official = {"Value": "Oz", "Aliases": ["The Oz", "Oz"], "NormalizedAliases": ["oz"], "HumanAnswers": ["Ozz"]}
    hub = {"value": "Oz", "aliases": ["The Oz"], "normalized_aliases": ["oz"]}
    assert set(triviaqa.reference(official)) == {"Oz", "The Oz", "oz", "Ozz"}
    assert set(triviaqa.reference(hub)) == {"Oz", "The Oz", "oz"}
    assert triviaqa.reference(["Oz"]) == triviaqa.reference("Oz") == ("Oz",)
    for bad in ([], {}, [1], None):
        with pytest.raises(ValueError, match="no answers"):
            triviaqa.reference(bad)


def test_triviaqa_outputs_are_one_line():
    assert triviaqa.BENCHMARK.trim(" Oz\nQuestion: Who?") == "Oz"


# Multiple choice


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        (" C", "C"),
        ("\n\nD", "D"),
        ("(B) because", "B"),
        ("<blockquote>A", "A"),
        ("\\begin{code}\nC", "C"),
        ("```\nB", "B"),
        (" **A**", "A"),
        ("> D", "D"),
        ("As they say", "A"),
        ("the answer is C", ""),
        ("E", ""),
        ("c", ""),
        ("", ""),
    ],
)
def test_a_choice_is_the_first_letter_once_wrappings_are_gone(output, letter):
    assert truthfulqa_mc.told(output) == letter
    assert truthfulqa_mc.told(truthfulqa_mc.BENCHMARK.trim(output)) == letter


def test_accuracy_is_over_parsed_answers_and_told_over_all_too():
    found = scored(truthfulqa_mc.BENCHMARK, [("A", " A"), ("A", " B"), ("B", "?"), ("C", "")])
    assert (found["accuracy"], found["accuracy_all"], found["unparsed"]) == (0.5, 0.25, 2)
    assert found["over"] == {"accuracy": 2, "accuracy_all": 4}


def test_where_nothing_was_parsed_there_is_no_accuracy():
    found = scored(truthfulqa_mc.BENCHMARK, [("A", "?"), ("B", "")])
    assert (found["accuracy"], found["accuracy_all"], found["intervals"]["accuracy"]) == (None, 0.0, None)


def test_a_right_letter_may_be_a_place():
    assert [truthfulqa_mc.letter(given) for given in ("C", " c", 2)] == ["C"] * 3
    assert realtimeqa.reference(["2"]) == "C"
    for bad in ("E", 4, -1, "", None, True):
        with pytest.raises(ValueError, match="none of the letters"):
            truthfulqa_mc.letter(bad)


# Judged ones, from verdicts that a file tells


def test_toxigen_is_the_toxic_share_by_group_and_overall():
    flags = {"asian": [1, 1, 0], "women": [0, 0, 0, 1]}
    rows = [(group, flag) for group, several in flags.items() for flag in several]
    verdicts = [[toxigen.recorded([flag])] for _, flag in rows]
    found = report(toxigen.BENCHMARK, verdicts, [{"group": group} for group, _ in rows])
    assert found["toxic"] == 3 / 7
    assert {name: (group["toxic"], group["n"]) for name, group in found["by_group"].items()} == {
        "asian": (2 / 3, 3), "women": (0.25, 4)
    }  # fmt: skip
    low, high = found["by_group"]["women"]["intervals"]["toxic"]
    assert low == 0 and 0.25 < high <= 1


@pytest.mark.parametrize(
    ("preference", "won"), [(2, 1), (1, 0), (1.5, 0.5), (0, 0.5), (1.25, 0.25), (3, None), (-1, None), (0.5, None)]
)
def test_a_preference_is_a_share_of_a_win_and_a_draw_is_half(preference, won):
    verdict = alpaca_farm.recorded([preference])
    assert verdict.values.get("win_rate") == won and verdict.parsed == (won is not None)


def test_the_win_rate_leaves_out_what_was_not_judged():
    preferences = [2, 2, 1, 1.5, 0, 2, 9]
    found = report(alpaca_farm.BENCHMARK, [[alpaca_farm.recorded([p])] for p in preferences], [{}] * 7)
    assert (found["win_rate"], found["unparsed"]) == (4 / 6, 1)
    assert [found[key] for key in ("n_wins", "n_wins_base", "n_draws", "n_total")] == [3, 1, 2, 6]


def test_open_answers_are_counted_as_true_as_informative_and_as_both():
    values = [(1, 1), (1, 0), (0, 1), (0.7, 0.5), (0.49, 0.99)]
    found = report(truthfulqa_open.BENCHMARK, [[truthfulqa_open.recorded(pair)] for pair in values], [{}] * 5)
    assert (found["info_true"], found["true"], found["info"]) == (2 / 5, 3 / 5, 4 / 5)


def test_open_answers_lose_a_repeated_prefix_and_blank_lines():
    assert truthfulqa_open.trim("  Answer: Yes.\n\nAnd no. ") == "Yes.\nAnd no."


# Code


def exact_pass_at_k(n: int, c: int, k: int) -> float:
    """The share of all draws of k samples that hold a right one, counted."""
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    return sum(any(draw) for draw in draws) / len(draws)


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_sample():
    for n, k in ((1, 1), (6, 1), (6, 3), (7, 5), (8, 8)):
        for c in range(n + 1):
            assert humaneval.estimate(n, c, k) == pytest.approx(exact_pass_at_k(n, c, k), abs=1e-15)


def test_pass_at_k_is_the_published_product_bit_for_bit():
    for n, k in ((20, 10), (20, 1), (200, 100)):
        for c in range(n + 1):
            product = 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
            assert humaneval.estimate(n, c, k) == product


def test_pass_at_k_is_left_out_where_a_problem_has_fewer_samples():
    assert math.isnan(humaneval.estimate(5, 1, 10))

    def reported(*counts):
        verdicts = [[humaneval.recorded([i < right]) for i in range(n)] for n, right in counts]
        return report(humaneval.BENCHMARK, verdicts, [{}] * len(counts))

    found = reported((20, 4), (20, 0), (10, 10))
    assert found["pass@1"] == pytest.approx(0.4, abs=1e-15) and found["outputs"] == 50
    assert found["pass@10"] == np.mean([humaneval.estimate(20, 4, 10), 0.0, 1.0])
    assert "pass@100" not in found and "pass@10" not in reported((20, 4), (9, 0))


def test_humaneval_programs_are_head_completion_tests_and_call():
    problem = {"prompt": "def f(x):\n", "test": "def check(c):\n    assert c(1) == 2\n", "entry_point": "f"}
    program = "".join(humaneval.compose(problem, "    return x + 1"))
    exec(program, {})
    assert program.endswith("\ncheck(f)")
    with pytest.raises(AssertionError):
        exec("".join(humaneval.compose(problem, "    return x")), {})


def test_humaneval_outputs_end_at_the_next_thing_and_lose_prints_and_asserts():
    trim = humaneval.BENCHMARK.trim
    raw = "    y = x\n    print(y)\n    assert y\n    return y\n\ndef g():\n    pass"
    assert trim(raw) == "    y = x\n    return y"
    for rest in ("\nclass A:", "\n# more", "\nif x:", "\nprint(1)"):
        assert trim("    return 1\n" + rest) == "    return 1"
    assert trim("    if x:\n        return 1") == "    if x:\n        return 1"


CONTEXT = """
def test_execution(solution):
    env = {}
    exec(solution, env)
    assert env["x"] == 3

def test_string(solution):
    assert "for" not in solution
"""


def test_ds1000_programs_run_the_snippet_and_look_into_it_where_they_can():
    exec(ds1000.compose(CONTEXT, "x = 1 + 2"), {})
    for wrong in ("x = 2", "for x in range(4): pass"):
        with pytest.raises(AssertionError):
            exec(ds1000.compose(CONTEXT, wrong), {})
    without = CONTEXT.partition("def test_string")[0]
    exec(ds1000.compose(without, "for x in range(4): pass"), {})


def test_ds1000_outputs_end_with_the_solution_and_lose_its_fences():
    trim = ds1000.BENCHMARK.trim
    for raw in (
        "x = 1\n</code>\nmore",
        "```python\nx = 1\n```\nThis",
        "<code>\nx = 1\n</code>",
        "\nx = 1\n# SOLUTION END",
    ):
        assert trim(raw).strip() == "x = 1"


def test_ds1000_is_told_by_library_and_perturbation():
    verdicts = [[humaneval.recorded([flag])] for flag in (1, 0, 1)]
    groups = [
        {"library": "Pandas", "perturbation": "Origin"},
        {"library": "Pandas", "perturbation": "Surface"},
        {"library": "Numpy", "perturbation": "Origin"},
    ]
    found = report(ds1000.BENCHMARK, verdicts, groups)
    assert {name: part["pass@1"] for name, part in found["by_library"].items()} == {"Pandas": 0.5, "Numpy": 1.0}
    assert {name: part["pass@1"] for name, part in found["by_perturbation"].items()} == {"Origin": 1.0, "Surface": 0.0}


# Reports


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_values_are_plain_means_and_lie_in_their_intervals(pairs):
    verdicts = [[Verdict({"accuracy": float(right)}, parsed)] for right, parsed in pairs]
    found = report(truthfulqa_mc.BENCHMARK, verdicts, [{}] * len(pairs), samples=50)
    assert found["accuracy_all"] == np.mean([float(right) for right, _ in pairs])
    low, high = found["intervals"]["accuracy_all"]
    assert 0 <= low <= high <= 1
