"""Replies that are finished, kept from a kill until the command that asked for them is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from proxytune.decoding.request import Reply, Request
from proxytune.files import Journal, hash_json

OnToken = Callable[[int, Reply], None] | None
Answer = Callable[[Sequence[Request], OnToken], Iterator[tuple[int, Reply]]]


class Kept:
    """content: all that decides what is said; the journal is named by its hash."""

    def __init__(self, outputs: Path, content: Any):
        self.journal = Journal(outputs / "cache" / "replies" / f"{hash_json(content)[:16]}.jsonl")

    def run(
        self, system: str, answer: Answer, requests: Sequence[Request], on_token: OnToken = None
    ) -> Iterator[tuple[int, Reply]]:
        """Like an engine's: (place, finished reply), those that are kept first."""
        kept = {row["place"]: Reply(**row["reply"]) for row in self.journal.rows if row["system"] == system}
        for place, reply in kept.items():
            if on_token:
                on_token(place, reply)
            yield place, reply
        left = [place for place in range(len(requests)) if place not in kept]
        shown = (lambda i, reply: on_token(left[i], reply)) if on_token else None
        for i, reply in answer([requests[place] for place in left], shown):
            row = {"system": system, "place": left[i], "reply": asdict(reply)}
            self.journal.append(row)
            self.journal.rows.append(row)
            yield left[i], reply
