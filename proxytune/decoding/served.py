"""A base behind an API that was tried, and what can be done with it: write replies, weigh given ones."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from proxytune.decoding.pushed import Pusher
from proxytune.decoding.remote import RemoteEngine
from proxytune.models.dialects import dialect
from proxytune.models.probe import Probe, probe
from proxytune.models.remote import RemoteBase
from proxytune.models.source import Term
from proxytune.models.vocabulary import Vocabulary
from proxytune.settings import Remote


@dataclass(frozen=True)
class Served:
    """A server that was tried, and what it was found to do. Its budget lasts as long as this does."""

    base: RemoteBase
    probe: Probe

    def at_once(self, rows: int | None = None) -> int:
        """How many of so many rows are under way together: no more than calls may be in flight."""
        return min(rows or self.base.settings.in_flight, self.base.settings.in_flight)

    def engine(
        self,
        pairs: Sequence[tuple[Term, Term]],
        vocabulary: Vocabulary,
        tokenizer: Any,
        prefill_tokens: int = 8192,
        rows: int | None = None,
    ) -> RemoteEngine:
        return RemoteEngine(
            self.base,
            self.probe.abilities,
            pairs,
            vocabulary,
            tokenizer,
            batch_size=self.at_once(rows),
            prefill_tokens=prefill_tokens,
        )

    @property
    def content(self) -> dict[str, Any]:
        """All that numbers measured with it depend on: the model by its name and likeness, and what it can be asked.

        Where the server does not say what it serves, its address stands for that.
        """
        settings, abilities = self.base.settings, asdict(self.probe.abilities)
        del abilities["tolerance"]  # measured anew each time; what it changes is which tokens are marked
        return {
            "served": self.probe.model or settings.url,
            "mode": settings.mode,
            "likeness": self.probe.likeness,
            "dialect": settings.name,
            "top": min(settings.top, abilities["top"]),
            "abilities": abilities,
            "certified_only": settings.require_certified,
        }


def reach(remote: Remote, tokenizer: Any, vocabulary: int, head: int | None = None) -> Served:
    """Try the server. vocabulary: ids that the trio shares; head: rows of the base's head, where they are known.

    Raises ModelError naming the test that it failed.
    """
    texts = {i: tokenizer.decode([i]) for i in range(vocabulary)} if remote.name == "openai" else None
    base = RemoteBase(remote, dialect(remote.name, texts))
    if remote.mode == "bias":
        return Served(base, asyncio.run(Pusher(base, tokenizer, vocabulary).probe()))
    return Served(base, asyncio.run(probe(base, tokenizer, vocabulary, head)))
