from __future__ import annotations

import re

import pytest

from proxytune.analysis.classes import CLASSES, label


def kinds(classes: str, text: str) -> dict[str, set[str]]:
    """By kind the pieces of a text, cut into words and signs, spaces stripped."""
    pieces = re.findall(r"\s*\w+|\s*[^\w\s]|\s+", text)
    assert "".join(pieces) == text
    found: dict[str, set[str]] = {}
    for piece, kind in zip(pieces, label(classes, pieces), strict=True):
        found.setdefault(kind, set()).add(piece.strip())
    return found


def test_the_sides_of_an_equation_and_nothing_else():
    found = kinds("math", "There are 7 * 11 = 77 boxes, and $6 is the price.")
    assert found["left"] == {"7", "*", "11"} and found["right"] == {"77"}
    assert {"6", "$", "=", "price"} <= found["other"]


def test_a_calculator_mark_holds_its_sum_once_more():
    found = kinds("math", "48/2 = <<48/2=24>>24 cups")
    assert found["left"] == {"48", "/", "2"} and found["right"] == {"24"}


def test_a_chain_of_equations_has_a_right_side_that_is_the_next_left():
    assert kinds("math", "5+3=8+2=10")["left"] == {"5", "3", "8", "2", "+"}


def test_words_by_what_they_do():
    found = kinds("text", "The sky may be blue. Rain, however, falls!\nGo")
    assert found["opening"] == {"The", "Rain", "Go"}
    assert found["hedge"] == {"may", "however"}
    assert found["function"] == {"be"}
    assert found["content"] == {"sky", "blue", "falls"}
    assert found["punctuation"] == {".", ",", "!"}


def test_code_by_its_grammar_even_where_it_is_cut_short():
    found = kinds("code", 'def add(x):\n    # one more\n    return x + 1 or None\ns = "cut')
    assert {"def", "return", "or", "+", "(", ")"} <= found["syntax"]
    assert found["name"] == {"add", "x", "s"}
    assert found["literal"] == {"1", "None", '"', "cut"}
    assert {"one", "more"} <= found["comment"]


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("pieces", [[], [""], ["", "é", " ", "\n\n", "'", '"""', "#", "1" * 50]])
def test_every_piece_has_a_kind(classes, pieces):
    assert len(label(classes, pieces)) == len(pieces)
