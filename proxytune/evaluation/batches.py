"""Rows that are scored batch by batch, each batch kept whole: the same rows together give the same numbers again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from proxytune.files import Journal

R = TypeVar("R")


def scored(
    work: Callable[[Sequence[R]], Sequence[Sequence[Any]]], rows: Sequence[R], size: int, journals: Sequence[Journal]
) -> Iterator[Sequence[Any]]:
    """Yield of each row what work(the rows of its batch) gives for it: an entry for each journal, which keeps it.

    A batch that all journals have is not scored again, however large it was: batches had another size before memory
    ran out.
    """
    kept = [{row["first"]: row["found"] for row in journal.rows if "first" in row} for journal in journals]
    first = 0
    while first < len(rows):
        batch = [its.get(first, ()) for its in kept]
        if len({len(its) for its in batch}) != 1 or not batch[0]:
            batch = list(zip(*work(rows[first : first + size]), strict=True))
            for journal, its in zip(journals, batch, strict=False):
                journal.append({"first": first, "found": its})
        yield from zip(*batch, strict=True)
        first += len(batch[0])
