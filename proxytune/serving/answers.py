"""OpenAI's answers: texts, log-probabilities and usage in the forms of completions and chat.

Each token that is told has `steering` beside OpenAI's fields: what the models say of it alone, and what the base would
have said in its place.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from proxytune.decoding.request import Request, TokenLogprobs
from proxytune.decoding.streaming import token_text
from proxytune.serving.loop import Update
from proxytune.serving.protocol import Chat, Completion

LOWEST = -9999.0  # in place of -inf, which JSON cannot hold


@dataclass
class Writer:
    """Puts the gains of one choice into OpenAI's form, in their order."""

    body: Completion | Chat
    request: Request
    tokenizer: Any
    index: int
    ids: list[int] = field(default_factory=list)
    offset: int = 0  # characters of the tokens told so far
    begun: bool = False

    @property
    def chat(self) -> bool:
        return isinstance(self.body, Chat)

    def choice(self, update: Update, *, delta: bool) -> dict[str, Any]:
        """A choice of an answer, or with `delta` of a chunk."""
        first, self.begun = not self.begun, True
        told = None if self.body.told is None else self.logprobs(update)
        content = update.text if self.chat else None
        choice: dict[str, Any] = {"index": self.index, "finish_reason": update.finish_reason, "logprobs": told}
        if not self.chat:
            choice["text"] = update.text
        elif delta:
            choice["delta"] = {**({"role": "assistant"} if first else {}), "content": content}
        else:
            choice["message"] = {"role": "assistant", "content": content, "refusal": None}
        return choice

    def logprobs(self, update: Update) -> dict[str, Any]:
        tokens = []
        for token, told in zip(update.token_ids, update.logprobs, strict=True):
            if token not in self.request.limits.end_ids:
                tokens.append(self._token(token, told))
            self.ids.append(token)
        if self.chat:
            return {"content": tokens, "refusal": None}
        offsets = []
        for token in tokens:
            offsets.append(self.offset)
            self.offset += len(token["steering"]["text"])
        return {
            "tokens": [token["token"] for token in tokens],
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": [{each["token"]: each["logprob"] for each in t["top_logprobs"]} for t in tokens]
            if self.body.told
            else None,
            "text_offset": offsets,
            "steering": [token["steering"] for token in tokens],
        }

    def _token(self, token: int, told: TokenLogprobs) -> dict[str, Any]:
        """A token in chat's form."""
        top = slice(2, 2 + (self.body.told or 0))
        each = [self._named(i, p) for i, p in zip(told.ids, told.steered, strict=True)]
        return {
            **each[0],
            "top_logprobs": each[top],
            "steering": {
                "text": token_text(self.tokenizer, self.ids, token),
                "changed": told.ids[1] != token,
                "chosen": self._candidate(told, 0),
                "base": self._candidate(told, 1),
                "top": [self._candidate(told, place) for place in range(len(told.ids))[top]],
            },
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        name = f"token_id:{token}" if self.body.return_tokens_as_token_ids else self._name(token)
        return {"token": name, "logprob": max(logprob, LOWEST), "bytes": list(name.encode())}

    def _name(self, token: int) -> str:
        """A token's text; half a character goes by the tokenizer's own name."""
        return token_text(self.tokenizer, self.ids, token) or str(self.tokenizer.convert_ids_to_tokens(token))

    def _candidate(self, told: TokenLogprobs, place: int) -> dict[str, Any]:
        """A token and its log-probability by each model."""
        by_role = {role: max(each[place], LOWEST) for role, each in told.alone.items()}
        token = told.ids[place]
        return {"id": token, "token": self._name(token), "steered": max(told.steered[place], LOWEST), **by_role}


@dataclass
class Envelope:
    """What is the same in every part of one answer, and the count of its tokens.

    certified, calls: as in `Update`; None where the base is here.
    """

    body: Completion | Chat
    prompt_tokens: int
    steering: list[dict[str, Any]]
    completion_tokens: int = 0
    certified: int | None = None
    calls: int = 0

    def __post_init__(self):
        chat = isinstance(self.body, Chat)
        self.head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": self.body.model,
        }
        self.kind, self.part = (
            ("chat.completion", "chat.completion.chunk") if chat else ("text_completion", "text_completion")
        )

    def count(self, update: Update) -> None:
        self.completion_tokens += len(update.token_ids)
        self.calls += update.calls
        if update.certified is not None:
            self.certified = (self.certified or 0) + update.certified

    @property
    def certificate(self) -> dict[str, Any]:
        """Beside the usage: what is certain of an answer whose base is behind an API."""
        if self.certified is None:
            return {}
        told = {"tokens": self.completion_tokens, "certified": self.certified, "calls": self.calls}
        return {"proxytune": told}

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        told = {"choices": choices, "usage": self.usage, "steering": self.steering}
        return {**self.head, "object": self.kind, **told, **self.certificate}

    def chunk(self, choices: list[dict[str, Any]], told: dict[str, Any] | None = None) -> dict[str, Any]:
        """told: beside the choices, in the last chunk."""
        return {**self.head, "object": self.part, "choices": choices, **(told or {})}
