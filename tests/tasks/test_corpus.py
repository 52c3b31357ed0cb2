"""What the embedded family was pre-trained on holds nothing of what it is measured on."""

from __future__ import annotations

import ast
from collections import defaultdict

import pytest

from proxytune.experts import corpus
from proxytune.experts.pretrain import PHASES
from proxytune.models.prompts import text_of
from proxytune.tasks import stdlib

TRIVIAL = 40  # characters: `return name.lower().replace('-', '_')` is anybody's


@pytest.fixture(scope="module")
def library(built_in) -> list[str]:
    return list(corpus.standard_library())


@pytest.fixture(scope="module")
def prose() -> str:
    """Some of each phase's."""
    return "\n".join(
        text
        for epoch, phase in enumerate(PHASES)
        for text in corpus.prose(epoch, phase.towns, 2, phase.sums, arithmetic_paragraphs=1000)
    )


def body_of(node: ast.FunctionDef) -> list[ast.stmt]:
    return node.body[1:] if ast.get_docstring(node) else node.body


def kinds(body: list[ast.stmt]) -> tuple[type, ...]:
    return tuple(map(type, body))


def test_no_held_out_function_stands_in_the_library_under_any_name(built_in, library):
    held: dict[tuple, set[str]] = defaultdict(set)
    for split in ("validation", "test"):
        for row in built_in["code"][split]:
            if len(stdlib.body_key(row["completion"])) > TRIVIAL:
                body = ast.parse(row["completion"]).body[0].body
                held[kinds(body)].add("\n".join(map(ast.dump, body)))
    assert sum(map(len, held.values())) > 500
    for source in library:
        for node in stdlib._definitions(stdlib.parse(source) or ast.Module([], [])):
            body = body_of(node)
            if kinds(body) in held:
                assert "\n".join(map(ast.dump, body)) not in held[kinds(body)], f"{node.name}: {ast.unparse(node)}"


def test_no_source_file_holds_the_code_format(library):
    assert len(library) > 100
    for source in library:
        assert not any(mark in source for mark in ("### Task", "### Solution", "Write the Python function"))


def test_prose_states_facts_and_sums_but_never_in_a_tasks_format(prose):
    marks = ("###", "<<", ">>", "#### ", "Question:", "Answer:", "?", "<|", "\n- ", "How many", "Tell me", "Describe")
    assert len(prose) > 100_000
    assert [mark for mark in marks if mark in prose] == []


@pytest.mark.parametrize("name", ["instruction", "math", "qa"])
def test_no_held_out_prompt_stands_in_the_prose(built_in, prose, name):
    for split in ("validation", "test"):
        for row in built_in[name][split]:
            assert text_of(row["prompt"]) not in prose


def test_no_held_out_math_answer_stands_in_the_prose(built_in, prose):
    for split in ("validation", "test"):
        for row in built_in["math"][split]:
            assert row["completion"].strip() not in prose
            assert row["completion"].partition("\n")[0].strip() not in prose


def test_special_tokens_do_not_occur_in_the_text(library, prose):
    for text in (*library, prose):
        assert not any(token in text for token in corpus.SPECIAL_TOKENS)
