"""A base behind an API as part of a trio: the server is tried first, and what it finished is kept from its faults."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from proxytune.decoding import served
from proxytune.decoding.remote import CertifiedReply, RemoteEngine
from proxytune.decoding.request import Reply, Request
from proxytune.decoding.served import Served
from proxytune.files import Journal, hash_json
from proxytune.models.trio import Trio
from proxytune.settings import Steering

INEXACT = "inexact: the base was pushed by a bias on 300 tokens (base.mode=bias)"


def reach(settings: Steering, trio: Trio) -> Served:
    """The server that the settings name, tried with what the trio shares."""
    assert settings.base is not None
    return served.reach(settings.base, trio.tokenizers["base"], trio.vocabulary.size, trio.head)


def spent(found: Served) -> str:
    """What was sent so far, in words."""
    sent = found.base.spent
    return f"{sent.requests:,} requests ({sent.retries:,} retries) and {sent.tokens:,} tokens sent in all"


class Writing:
    """One decoding with a base behind an API. Each finished reply is written down, and not asked for a second time.

    content: all that decides the certified tokens, the server aside; the journal is named by its hash.
    """

    systems = ("base", "steered")

    def __init__(self, settings: Steering, trio: Trio, content: Any):
        assert settings.base is not None
        self.settings, self.remote, self.trio = settings, settings.base, trio
        self.served = reach(settings, trio)
        self.measured: dict[str, float] = {}
        server = {name: self.served.content[name] for name in ("served", "likeness", "mode", "dialect")}
        self.journal = Journal(settings.outputs / "cache" / "replies" / f"{hash_json([server, content])[:16]}.jsonl")

    def kept(self, system: str) -> dict[int, CertifiedReply]:
        """By place. A reply with marked tokens counts only where the same ones would be given again."""
        same = None if self.remote.require_certified else self.remote.top
        return {
            row["place"]: CertifiedReply(**row["reply"])
            for row in self.journal.rows
            if row["system"] == system and (row["top"] == same or all(row["reply"]["certified"]))
        }

    def run(
        self,
        system: str,
        rows: int,
        requests: Sequence[Request],
        on_token: Callable[[int, Reply], None] | None = None,
    ) -> Iterator[tuple[int, CertifiedReply]]:
        """Like an engine's of so many rows: (place, finished reply), kept ones first. Tells on stderr what it took."""
        kept = self.kept(system)
        for place, reply in kept.items():
            if on_token:
                on_token(place, reply)
            yield place, reply
        left = [place for place in range(len(requests)) if place not in kept]
        trio, size = self.trio, self.settings.decode.prefill_tokens
        engine = self.served.engine(trio.pairs, trio.vocabulary, trio.tokenizers["base"], size, rows)
        try:
            for i, reply in engine.run([requests[place] for place in left], on_token):
                row = {"system": system, "place": left[i], "top": self.remote.top, "reply": asdict(reply)}
                self.journal.append(row)
                self.journal.rows.append(row)
                yield left[i], reply
        finally:
            self._tell(system, engine, len(kept))

    def _tell(self, system: str, engine: RemoteEngine, kept: int) -> None:
        counts = engine.counts
        parts = [f"{kept} replies were kept from before"] if kept else []
        if counts.tokens:
            share, calls = counts.certified / counts.tokens, counts.calls / counts.tokens
            self.measured |= {f"{system}/certified": share, f"{system}/calls_per_token": calls}
            parts += [f"{share:.1%} of {counts.tokens:,} tokens certified", f"{calls:.2f} calls a token"]
        parts += [spent(self.served)]
        parts += [INEXACT] if self.remote.mode == "bias" else []
        print(f"{system}: {', '.join(parts)}", file=sys.stderr)


def certificate(reply: Reply) -> dict[str, Any]:
    """What a record says of a reply with a base behind an API: the share of certified tokens, which are not, calls."""
    if not isinstance(reply, CertifiedReply):
        return {}
    marked = [place for place, certain in enumerate(reply.certified) if not certain]
    share = 1 - len(marked) / len(reply.certified) if reply.certified else 1.0
    told = {"certified": share, "marked": marked, "calls": reply.calls}
    return told | ({"inexact": True} if reply.inexact else {})
