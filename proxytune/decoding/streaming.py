"""The text of a growing reply, piece by piece: what was handed out is never taken back."""

from __future__ import annotations

from proxytune.decoding.request import Limits, Reply


class Pieces:
    """Hands out a reply's text as it becomes final.

    Held back are half a character, and what may turn out to be the beginning of a stop string.
    """

    def __init__(self, limits: Limits, tokenizer):
        self.limits, self.tokenizer, self.given = limits, tokenizer, 0

    def next(self, reply: Reply) -> str:
        """What became final since the last call."""
        if reply.finish_reason is not None:
            text, end = reply.text, len(reply.text)
        else:
            text = reply.text_so_far(self.limits, self.tokenizer)
            end = 0 if text.endswith("\ufffd") else len(text) - self._unsure(text)
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
