"""New prompts in the manner of known ones (self-instruct, Wang et al. 2022, arXiv 2212.10560).

A model is shown some prompts as a numbered list and writes the next one. What all prompts of a task begin and end with,
such as `Question: ` and `\\nAnswer:`, is its frame: it is not shown, and put back around what was written.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from proxytune.models.prompts import Turns
from proxytune.tasks.instruction import rouge_l
from proxytune.tasks.qa import normalised
from proxytune.tasks.task import Row

ITEM = "Task"
LONGEST = 2  # times the longest known prompt, in words
OWN_SHARE = 0.25  # of the prompts shown: those that were proposed before, where there are any


@dataclass(frozen=True)
class Frame:
    """chat: prompts are one message of the user, without anything around it."""

    before: str = ""
    after: str = ""
    chat: bool = False

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Frame:
        """The frame of a task's rows; it begins and ends at white space, never within a word."""
        if not isinstance(rows[0]["prompt"], str):
            return cls(chat=True)
        texts = [row["prompt"] for row in rows]
        before = _shared(texts)
        before = before[: max(before.rfind(" "), before.rfind("\n")) + 1]
        after = _shared([text[len(before) :][::-1] for text in texts])[::-1]
        starts = [at for at in (after.find(" "), after.find("\n")) if at >= 0]
        return cls(before, after[min(starts) :] if starts else "")

    def inside(self, row: Row) -> str | None:
        """What a row asks, without the frame; None where it has another, or is a dialogue of several turns."""
        turns = row["prompt"]
        if self.chat:
            return turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "user" else None
        framed = isinstance(turns, str) and turns.startswith(self.before) and turns.endswith(self.after)
        return turns[len(self.before) : len(turns) - len(self.after)] if framed else None

    def around(self, text: str) -> Turns:
        return [{"role": "user", "content": text}] if self.chat else f"{self.before}{text}{self.after}"


def _shared(texts: Sequence[str]) -> str:
    """What all of them begin with."""
    first, last = min(texts), max(texts)
    same = 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    return first[:same]


def shown(known: Sequence[str], own: Sequence[str], shots: int, rng: random.Random) -> str:
    """The list to be gone on with: prompts of the task, and some that were proposed before."""
    count = min(round(shots * OWN_SHARE), len(own))
    examples = [*rng.sample(known, min(shots - count, len(known))), *rng.sample(own, count)]
    rng.shuffle(examples)
    items = "".join(f"{ITEM} {number}: {text.strip()}\n\n" for number, text in enumerate(examples, 1))
    return f"{items}{ITEM} {len(examples) + 1}:"


def stops(known: Sequence[str]) -> tuple[str, ...]:
    """What ends a proposal: the next item of the list, or the line where all known prompts are one."""
    return (f"\n{ITEM} ", f"\n\n{ITEM}") if any("\n" in text.strip() for text in known) else ("\n",)


class Sieve:
    """Lets a proposal through that is new. known: every prompt so far, held-out ones among them.

    similarity: ROUGE-L with any known prompt from which on a proposal is no new one; 1 refuses equal ones alone.
    """

    def __init__(self, known: Sequence[str], similarity: float):
        self.similarity = similarity
        self.words = [normalised(text).split() for text in known]
        self.counts = [Counter(words) for words in self.words]
        self.longest = LONGEST * max(map(len, self.words), default=1)

    def fault(self, text: str) -> str | None:
        """Why a proposal is dropped: `empty`, `long` or `known`; None takes it, and the next must differ from it."""
        words = normalised(text).split()
        if not words:
            return "empty"
        if len(words) > self.longest:
            return "long"
        if self._is_known(words):
            return "known"
        self.words.append(words)
        self.counts.append(Counter(words))
        return None

    def _is_known(self, words: list[str]) -> bool:
        counts = Counter(words)
        for other, its_counts in zip(self.words, self.counts, strict=True):
            # the words that both have bound their longest common subsequence
            most = 2 * (counts & its_counts).total() / (len(words) + len(other))
            if most >= self.similarity and rouge_l(" ".join(other), " ".join(words)) >= self.similarity:
                return True
        return False
