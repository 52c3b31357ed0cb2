from __future__ import annotations

import re

import pytest

from proxytune import files
from proxytune.errors import SettingsError
from proxytune.models.prompts import text_of
from proxytune.tasks import catalog, code, rows, sampling, stdlib
from proxytune.tasks.task import SPLITS

MADE_UP = {
    "instruction": "73efed1c1822850de3b6ca3850b1921ce67c19ecd5f17cde3042b8fc1857c00b",
    "math": "8a40aa0c6dbf9b275551110fa738a3aac6dad0a1ae6ce30ca67e200dfc9f388e",
    "qa": "841505851bc348fe469913ba5cd0b9107e64684578c3536d340f46e3df5afd8e",
}


def assert_disjoint(parts: dict[str, set]) -> None:
    assert all(parts.values())
    assert len(set().union(*parts.values())) == sum(map(len, parts.values()))


@pytest.mark.parametrize("name", catalog.names())
def test_there_are_enough_rows_to_measure_on(built_in, name):
    sizes = {split: len(built_in[name][split]) for split in SPLITS}
    assert sizes["test"] >= 500 and sizes["validation"] >= 150 and sizes["train"] >= 300


@pytest.mark.parametrize("name", catalog.names())
def test_every_built_in_row_would_pass_as_a_row_from_outside(built_in, name):
    for split in SPLITS:
        for row in built_in[name][split]:
            assert rows.checked(row) == row
        assert len({row["id"] for row in built_in[name][split]}) == len(built_in[name][split])


@pytest.mark.parametrize("name", catalog.names())
def test_no_prompt_stands_in_two_splits(built_in, name):
    assert_disjoint({split: {text_of(row["prompt"]) for row in built_in[name][split]} for split in SPLITS})


def test_no_code_body_stands_in_two_splits(built_in):
    assert_disjoint({s: {stdlib.body_key(row["completion"]) for row in built_in["code"][s]} for s in SPLITS})


def test_no_module_is_in_two_splits(built_in):
    packages = {s: {row["id"].partition(":")[0].partition(".")[0] for row in built_in["code"][s]} for s in SPLITS}
    assert_disjoint(packages)


def test_no_town_is_asked_about_in_two_splits(built_in):
    assert_disjoint({s: {row["id"].partition("-")[0] for row in built_in["qa"][s]} for s in SPLITS})


def test_no_pair_of_factors_is_in_two_splits_in_either_order(built_in):
    def pairs(split):
        found = (re.search(r"<<(\d+)\*(\d+)=", row["completion"]) for row in built_in["math"][split])
        return {tuple(sorted(map(int, match.groups()))) for match in found}

    assert_disjoint({split: pairs(split) for split in SPLITS})


def test_no_town_or_pair_of_factors_is_in_two_splits_of_instruction(built_in):
    def subjects(split):
        for row in built_in["instruction"][split]:
            reply = text_of(row["completion"])
            factors = re.match(r"(\d+) times (\d+) is", reply)
            if factors:
                yield tuple(sorted(map(int, factors.groups())))
            yield from re.findall(r"^(\w+) is a town|market in (\w+)", reply)

    assert_disjoint({split: set(subjects(split)) for split in SPLITS})


@pytest.mark.parametrize("name", sorted(MADE_UP))
def test_made_up_rows_are_those_that_the_shipped_weights_were_measured_on(built_in, name):
    assert files.hash_json(built_in[name]) == MADE_UP[name]


@pytest.mark.parametrize("name", sorted(MADE_UP))
def test_rows_are_the_same_when_asked_for_again(built_in, name):
    assert catalog.get(name).builtin() == built_in[name]


def test_code_rows_are_real_functions_that_score_as_valid(built_in):
    for row in built_in["code"]["test"]:
        assert code.valid_function(row["completion"], row["completion"]) == 1
        assert '"""' not in row["completion"].partition("\n")[2][:8], "the docstring belongs to the prompt"


def test_a_function_is_split_by_its_package_alone():
    assert stdlib.split_of("json") == stdlib.split_of("json.decoder")
    assert {stdlib.split_of(name) for name in ("json", "argparse", "decimal", "ast", "email", "http")} <= set(SPLITS)


def test_the_quick_walk_meets_the_functions_that_ast_walk_meets_in_its_order():
    import ast
    import inspect
    import typing

    nested = "try:\n def a(): pass\nexcept E:\n def b(): pass\nelse:\n def c(): pass\nfinally:\n def d(): pass\n"
    chosen = "match x:\n case 1:\n  def e(): pass\nfor i in y:\n def f():\n  async def g():\n   def h(): pass\n"
    for source in (nested + chosen, inspect.getsource(typing)):
        tree = ast.parse(source)
        assert list(stdlib._definitions(tree)) == [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]


def test_keys_fall_into_splits_in_the_stated_shares():
    drawn = [sampling.split_of(f"key {i}") for i in range(5000)]
    shares = {split: drawn.count(split) / len(drawn) for split in SPLITS}
    assert shares == pytest.approx({"train": 0.4, "validation": 0.2, "test": 0.4}, abs=0.03)


def test_a_misspelt_task_is_answered_with_the_right_one():
    with pytest.raises(SettingsError, match=r"'maths'.*did you mean 'math'"):
        catalog.get("maths")
    assert {"code", "instruction", "math", "qa"} <= set(catalog.names())
    assert all(catalog.get(name).name == name for name in catalog.names())
