"""A base that tells no scores, only text: its choice is pushed by a bias on some tokens. Inexact, and marked so.

The server adds alpha * (log p_expert - log p_anti) to its own scores of the `MOST` tokens where that can matter most,
and chooses; all others keep the base's scores. Nothing certifies the choice, and sampling is the server's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from proxytune.decoding.round import Round
from proxytune.errors import ModelError
from proxytune.models.probe import Abilities, Finding, Probe
from proxytune.models.remote import RemoteBase
from proxytune.models.replies import BadReply
from proxytune.steering.arithmetic import steer

MOST = 300  # entries of a bias that such servers take
REACH = 100.0  # a bias may be so large, either way; -100 bans a token
SAMPLE = "In 2024, 17 + 25 = 42."


@dataclass(frozen=True)
class Pusher:
    """Asks one server in OpenAI's completions for a token at a time. size: ids that the trio shares."""

    base: RemoteBase
    tokenizer: Any
    size: int

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The id of each text that one id alone has."""
        owners: dict[str, list[int]] = {}
        for i in range(self.size):
            owners.setdefault(self.tokenizer.decode([i]), []).append(i)
        return {text: own[0] for text, own in owners.items() if len(own) == 1 and text and "\ufffd" not in text}

    async def probe(self) -> Probe:
        """Try the server: are ids read as ids, is a bias honoured. Raises ModelError naming the failed test."""
        prompt = tuple(i for i in self.tokenizer(SAMPLE, add_special_tokens=False).input_ids if i < self.size)
        async with self.base:
            plain = await self.said(prompt, {}, {"temperature": 0})
            wanted = next(i for text, i in self.ids.items() if text.isalpha() and i != plain)
            pushed = await self.said(prompt, {wanted: REACH}, {"temperature": 0})
        if pushed != wanted:
            raise ModelError(f"{self.base.settings.url} failed the bias test: it is ignored", "it cannot be pushed")
        findings = (
            Finding("token ids", "ok", f"a prompt of {len(prompt)} ids is read as so many tokens"),
            Finding("bias", "ok", f"honoured; up to {MOST} tokens are pushed, which is not exact"),
        )
        return Probe(findings, Abilities(top=0), self.base.settings.model, (plain,))

    async def said(self, ids: tuple[int, ...], biases: Mapping[int, float], sampling: Mapping[str, Any]) -> int:
        """The id that the server says after `ids`. Raises BadReply."""
        body: dict[str, Any] = {
            "model": self.base.settings.model,
            "prompt": list(ids),
            "max_tokens": 1,
            "stream": False,
        }
        body |= {"presence_penalty": 0, "frequency_penalty": 0, **sampling}
        body |= {"logit_bias": {str(i): by for i, by in biases.items()}}
        reply = await self.base.send("POST", self.base.dialect.path, body, tokens=len(ids) + 1)
        try:
            text, read = reply["choices"][0]["text"], reply["usage"]["prompt_tokens"]
        except (LookupError, TypeError) as error:
            raise BadReply(f"{self.base.settings.url} answered without a text", "it cannot be pushed") from error
        if read != len(ids) or not isinstance(text, str):
            raise BadReply(f"{self.base.settings.url}: {len(ids)} ids were sent, the server read {str(read)[:20]}")
        if not text:  # an end token has no text
            return self.tokenizer.eos_token_id
        if text in self.ids:
            return self.ids[text]
        return self.tokenizer(text, add_special_tokens=False).input_ids[0]  # one of several, or half a character

    async def next(self, round: Round, i: int, ids: tuple[int, ...]) -> int:
        """The next id of row `i`, whose small models have been read."""
        sampling = round.rows.each[i].request.sampling
        place = int(round.rows.counts_R1[i])
        how = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed + place}
        return await self.said(ids, biases(round, i), how)


@torch.inference_mode()
def biases(round: Round, i: int) -> dict[int, float]:
    """The bias of each token where steering can matter: the change of log-probability, by how likely the token is."""
    request, mixture = round.rows.each[i].request, round.mixture
    logs = {term: scores_RQV[i, 0].float().log_softmax(-1) for term, scores_RQV in round.scores.items()}
    if any(log_V.isnan().any() for log_V in logs.values()):
        raise round.rows.broken(i, 0)
    anti_V = logs[mixture.base]
    steered_V = steer(anti_V, list(zip(mixture.differences(logs), request.alphas, strict=True)))
    change_V = (steered_V - anti_V).clamp(-REACH, REACH)
    likely_V = torch.maximum(steered_V.softmax(-1), anti_V.exp())
    never = [*request.limits.banned, *mixture.vocabulary.foreign]
    if int(round.rows.counts_R1[i]) < request.limits.min_new_tokens:
        never += [end for end in request.limits.end_ids if end < mixture.vocabulary.size]
    weight_V = change_V.abs() * likely_V
    if never:
        change_V[never] = -REACH
        weight_V[never] = likely_V[never]
    best = weight_V.topk(min(MOST, mixture.vocabulary.size)).indices.tolist()
    return {k: float(f"{change_V[k]:.4f}") for k in best if weight_V[k] > 0 and math.isfinite(change_V[k])}
