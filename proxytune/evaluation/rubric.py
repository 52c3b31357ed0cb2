"""The additive five points that self-rewarding training scores replies by (Yuan et al. 2024, arXiv 2401.10020).

The criteria are the paper's, in our own words. A judge explains itself and then says `Score: n`; an answer that does
not say so, or not clearly, is no judgement at all, never a low one.
"""

from __future__ import annotations

import re
from pathlib import Path

from proxytune.evaluation.judges import filled, template

MOST = 5
QUESTION = """\
Score the reply to the instruction below with points that add up. Each line that holds is worth one point:
- The reply is about the instruction and gives something of use, even if much is missing.
- It deals with most of what the instruction asks for.
- It answers the core of the instruction in a useful way.
- It is clear, complete and well ordered, and written for the one who asked.
- An expert could not write it better: nothing is wrong, nothing is missing, nothing is beside the point.

Instruction:
{instruction}

Reply:
{response}

Explain the points briefly. Then end with a line of the form "Score: n", where n is their sum, from 0 to 5.
"""

# What stands behind the last "Score:", up to the end of its line; asterisks are Markdown's.
_SCORE = re.compile(r"\bscore\b[\s*_]*:[ \t*_]*([^\n]*)", flags=re.IGNORECASE)
_POINTS = re.compile(r"(\d+(?:\.\d+)?)(?:\s*(?:/|out\s+of)\s*5(?![\d.]*\d))?(?=$|[^\d/])", flags=re.IGNORECASE)


class Rubric:
    """The question that a judge is asked of one reply. path: a file with another one than ours."""

    def __init__(self, path: Path | None = None):
        self.template = template(path, QUESTION, ("instruction", "response"))

    def question(self, instruction: str, response: str) -> str:
        return filled(self.template, {"instruction": instruction.strip(), "response": response.strip()})


def score(judgement: str) -> float | None:
    """Points in 0..5 out of a judge's answer, None where it gives none, more than 5, or several.

    The last `Score:` counts, for a judge may recite the rubric first.
    """
    found = _SCORE.findall(judgement)
    points = _POINTS.match(found[-1]) if found else None
    if points is None or re.search(r"\d", found[-1][points.end() :]):
        return None
    value = float(points[1])
    return value if value <= MOST else None


def verdict(reason: str, points: float) -> str:
    """A judgement as `score` reads it."""
    return f"{reason.strip()}\nScore: {points:g}"
