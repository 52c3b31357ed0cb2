"""The text of a growing reply, piece by piece: what was handed out is never taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proxytune.decoding.request import Limits, Reply

CONTEXT = 6  # ids before a token that its text is read with
CUT = "\ufffd"  # what half a character decodes to


def token_text(tokenizer: Any, before: Sequence[int], token: int) -> str:
    """What a token adds to the text of the ids before it; nothing for half a character, its end gives the whole."""
    context = list(before[-CONTEXT:])
    start = tokenizer.decode(context, skip_special_tokens=False).rstrip(CUT)
    return tokenizer.decode([*context, token], skip_special_tokens=False)[len(start) :].rstrip(CUT)


class Pieces:
    """Hands out a reply's text as it becomes final.

    Held back are half a character, what may turn out to be the beginning of a stop string, and what follows one that
    was said before it may end the reply: the reply may still be cut there.
    """

    def __init__(self, limits: Limits, tokenizer):
        self.limits, self.tokenizer, self.given = limits, tokenizer, 0

    def next(self, reply: Reply) -> str:
        """What became final since the last call."""
        if reply.finish_reason is not None:
            text, end = reply.text, len(reply.text)
        else:
            text = reply.text_so_far(self.limits, self.tokenizer)
            stops = [at for stop in self.limits.stop if (at := text.find(stop)) >= 0]
            end = 0 if text.endswith(CUT) else min([len(text) - self._unsure(text), *stops])
        piece = text[self.given : end]
        self.given = max(self.given, end)
        return piece

    def _unsure(self, text: str) -> int:
        """The length of the longest end of the text that a stop string begins with."""
        longest = max(map(len, self.limits.stop), default=1) - 1
        return next(
            (
                n
                for n in range(min(longest, len(text)), 0, -1)
                if any(s.startswith(text[-n:]) for s in self.limits.stop)
            ),
            0,
        )
