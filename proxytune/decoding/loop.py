"""The loop: every model reads its own prompt, the scores are combined, one token is chosen for all of them.

Plain and batched: one forward of each model for each token. Rows never influence each other; a finished row leaves the
batch. Text is cut at the first end token or stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from proxytune.decoding.mixture import Mixture, Prompts
from proxytune.errors import ModelError
from proxytune.steering.choice import Choice


@dataclass(frozen=True)
class Request:
    """One reply to write. `alphas` has one number for each pair of the mixture; equal seeds give equal noise."""

    prompts: Prompts
    alphas: tuple[float, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Limits:
    """When a reply ends: after max_new_tokens, at an id of end_ids, or before the first stop string."""

    max_new_tokens: int
    end_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()


@dataclass
class Reply:
    """`token_ids` holds every emitted id, the end token included; `text` is cut at a stop string.

    finish_reason: `stop` (an end token or a stop string) or `length`.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None


def decode(
    mixture: Mixture,
    requests: Sequence[Request],
    choice: Choice,
    limits: Limits,
    tokenizer,
    *,
    batch_size: int = 64,
    on_token: Callable[[int, Reply], None] | None = None,
) -> Iterator[tuple[int, Reply]]:
    """Yield (index of the request, its finished reply) as replies finish, batch by batch.

    on_token is called after each token of a reply with the reply so far. Raises ModelError at a score that is NaN.
    """
    for first in range(0, len(requests), batch_size):
        batch = requests[first : first + batch_size]
        for row, reply in _decode_batch(mixture, batch, choice, limits, tokenizer, first, on_token):
            yield first + row, reply


@torch.inference_mode()
def _decode_batch(mixture, requests, choice, limits, tokenizer, first, on_token) -> Iterator[tuple[int, Reply]]:
    streams, scores = mixture.start([request.prompts for request in requests])
    device = scores[0].device
    seeds_B = torch.tensor([request.seed for request in requests], device=device)
    alphas = [
        torch.tensor([[request.alphas[i]] for request in requests], device=device) for i in range(len(mixture.pairs))
    ]
    replies = [Reply() for _ in requests]
    alive = list(range(len(requests)))
    for position in range(limits.max_new_tokens):
        combined_BV = mixture.combine([s.to(device) for s in scores], alphas)
        _refuse_nan(combined_BV, alive, first, position)
        tokens_B = choice(combined_BV, seeds_B, torch.full_like(seeds_B, position))
        for row, token in zip(alive, tokens_B.tolist(), strict=True):
            _append(replies[row], token, limits, tokenizer)
            if on_token:
                on_token(first + row, replies[row])
        kept = [i for i, row in enumerate(alive) if replies[row].finish_reason is None]
        for row in alive:
            if replies[row].finish_reason is not None:
                yield row, replies[row]
        if not kept:
            return
        if len(kept) < len(alive):
            alive = [alive[i] for i in kept]
            rows = torch.tensor(kept, device=device)
            seeds_B, tokens_B = seeds_B[rows], tokens_B[rows]
            alphas = [alpha_B1[rows] for alpha_B1 in alphas]
            for stream in streams:
                stream.keep(rows)
        scores = [stream.advance(tokens_B) for stream in streams]


def _append(reply: Reply, token: int, limits: Limits, tokenizer) -> None:
    reply.token_ids.append(token)
    if token in limits.end_ids:
        reply.finish_reason = "stop"
    elif len(reply.token_ids) >= limits.max_new_tokens:
        reply.finish_reason = "length"
    if not (limits.stop or reply.finish_reason):
        return
    text = text_of(reply, limits, tokenizer)
    cuts = [at for stop in limits.stop if (at := text.find(stop)) >= 0]
    if cuts:
        text, reply.finish_reason = text[: min(cuts)], "stop"
    if reply.finish_reason:
        reply.text = text


def text_of(reply: Reply, limits: Limits, tokenizer) -> str:
    """The text of a reply so far: its ids without the end token, other special tokens left out."""
    ids = reply.token_ids[:-1] if reply.token_ids and reply.token_ids[-1] in limits.end_ids else reply.token_ids
    return tokenizer.decode(ids, skip_special_tokens=True)


def _refuse_nan(scores_BV, alive: list[int], first: int, position: int) -> None:
    bad = torch.isnan(scores_BV).any(-1)
    if bad.any():
        row = alive[int(bad.nonzero()[0])]
        raise ModelError(
            f"a model gave NaN at output position {position} of prompt {first + row}",
            "load it in float32 (family.dtype=float32)",
        )
