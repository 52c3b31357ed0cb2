"""What kind of token each one of a text is, by rules on the text alone.

    math    left: the sum before an equals sign; right: the number after it; other
    text    opening: the first word of a sentence; hedge; function: function words; punctuation; content
    code    comment, literal, name, syntax: keywords, operators and brackets

Liu et al. 2024 (arXiv 2401.08565, section 6) look at the two sides of equations and at the words that are promoted
most. A token is of the kind of its first character that is no space; one of spaces alone is `space` in code and
`punctuation` in text.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Sequence

Spans = list[tuple[int, int, str]]  # start, end, kind; later ones paint over earlier ones

_NUMBER = r"\$?\d[\d,]*(?:\.\d+)?%?"
_EQUATION = re.compile(rf"(?P<left>{_NUMBER}(?:\s*[-+*/x\u00d7\u00f7]\s*\(?{_NUMBER}\)?)+)\s*=")
_RIGHT = re.compile(rf"=\s*(?P<right>-?{_NUMBER})|>>\s*(?P<copy>-?{_NUMBER})")

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_SENTENCE = re.compile(r"(?:\A|[.!?:]\s+|\n)[^\w\n]*(?P<first>\w+(?:['\u2019]\w+)*)")
_HEDGE = re.compile(
    r"\b(?:may|might|could|would|perhaps|maybe|possibly|probably|likely|unlikely|generally|typically|usually|often|"
    r"sometimes|approximately|roughly|about|around|seems?|seemed|appears?|appeared|suggests?|somewhat|several|various|"
    r"however|although|though|important to note|it depends|not necessarily|tends? to|in general|i think|i believe)\b",
    re.IGNORECASE,
)
FUNCTION_WORDS = frozenset(
    "a an the and or but nor so yet if then than as that this these those there here it its he him his she her they "
    "them their we us our you your i me my who whom whose which what when where why how of in on at by for with from "
    "to into onto over under between among through during before after about against without within up down out off is "
    "am are was were be been being do does did have has had having will would shall should can could may might must "
    "not no all any both each few more most other some such only own same too very just also while because "
    "until".split()
)

_CODE = re.compile(
    r"(?P<comment>#[^\n]*)"
    r"|(?P<literal>[rbfuRBFU]{0,2}(?:'''.*?(?:'''|\Z)|\"\"\".*?(?:\"\"\"|\Z)|'(?:\\.|[^'\\\n])*(?:'|$|(?=\n))"
    r"|\"(?:\\.|[^\"\\\n])*(?:\"|$|(?=\n)))|\d[\w.]*)"
    r"|(?P<name>[^\W\d]\w*)"
    r"|(?P<space>\s+)"
    r"|(?P<syntax>.)",
    re.DOTALL,
)
CONSTANTS = ("True", "False", "None")


def label(classes: str, pieces: Sequence[str]) -> list[str]:
    """The kind of each token of a text that is cut into pieces. classes: a key of `CLASSES`."""
    rules, rest = CLASSES[classes]
    text = "".join(pieces)
    kinds = [rest] * len(text)
    for start, end, kind in rules(text):
        kinds[start:end] = [kind] * (end - start)
    found, start = [], 0
    for piece in pieces:
        inside = start + len(piece) - len(piece.lstrip())
        place = inside if inside < start + len(piece) else start
        found.append(kinds[place] if piece else rest)  # half a character has no text of its own
        start += len(piece)
    return found


def _math(text: str) -> Spans:
    right = [
        (*match.span(name), "right") for match in _RIGHT.finditer(text) for name in match.groupdict() if match[name]
    ]
    left, start = [], 0
    while match := _EQUATION.search(text, start):  # a calculator mark holds its sum once more
        left.append((*match.span("left"), "left"))
        start = match.end("left")
    return [*right, *left]


def _text(text: str) -> Spans:
    words = [(*m.span(), "function" if m[0].lower() in FUNCTION_WORDS else "content") for m in _WORD.finditer(text)]
    numbers = [(*m.span(), "content") for m in re.finditer(r"\d+", text)]
    hedges = [(*m.span(), "hedge") for m in _HEDGE.finditer(text)]
    return [*words, *numbers, *hedges, *((*m.span("first"), "opening") for m in _SENTENCE.finditer(text))]


def _code(text: str) -> Spans:
    found = []
    for match in _CODE.finditer(text):
        kind = match.lastgroup or "syntax"
        if kind == "name" and keyword.iskeyword(match[0]):
            kind = "literal" if match[0] in CONSTANTS else "syntax"
        found.append((*match.span(), kind))
    return found


CLASSES: dict[str, tuple[Callable[[str], Spans], str]] = {
    "math": (_math, "other"),
    "text": (_text, "punctuation"),
    "code": (_code, "syntax"),
}
