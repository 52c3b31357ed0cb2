"""What base, expert and anti thought of every token of a given text, and what steering made of it.

One scoring pass of each model reads all of it off (decoding/scoring.py); kept are the probabilities of the tokens that
were said and the few likeliest at each position, never a whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from proxytune.analysis.divergence import kl
from proxytune.decoding.mixture import Mixture, Prompts, Term
from proxytune.decoding.scoring import Given, check, scored
from proxytune.decoding.streaming import token_text
from proxytune.steering.variants import EQUATION, Variant, Variants

VERSION = 1  # raise when the meaning of a record changes
LOWEST = -100.0  # nats, in place of -inf, which JSON cannot hold
STEERED = "steered"


@dataclass(frozen=True)
class Said:
    """A text to look at: its prompt as every role reads it, and its ids, without a token that ends it."""

    id: str
    prompt: str
    prompts: Prompts
    ids: Sequence[int]


@torch.inference_mode()
def records(
    mixture: Mixture,
    texts: Sequence[Said],
    alphas: Sequence[float],
    tokenizer: Any,
    *,
    variant: Variant = EQUATION,
    top: int = 5,
    batch_size: int = 8,
) -> Iterator[list[dict[str, Any]]]:
    """Yield, batch by batch, the record of each text. alphas: one for each pair of the mixture.

    A record has `id`, `prompt`, and lists with one entry a token: `ids`, `pieces` (their texts), by role `logprobs` and
    `ranks` (1 is the likeliest) of the token, `kl` of steered from base in nats, `top` and `top_logprobs` of base and
    steered (best first), `instead`: steered's log-probability of what the base likes best. `words` holds the texts of
    the ids in `top`. Roles are the mixture's own and `steered`.
    """
    for first in range(0, len(texts), batch_size):
        batch = texts[first : first + batch_size]
        given = [Given(text.prompts, text.ids) for text in batch if text.ids]
        found = iter(scored(mixture, given) if given else ())
        told = []
        for text in batch:
            if text.ids:
                by_role = _logprobs(mixture, next(found), alphas, variant)
                told.append(_record(text, by_role, mixture, top, _words(tokenizer, text)))
            else:
                told.append({"id": text.id, "prompt": text.prompt, "ids": [], "pieces": []})
        yield told


def _logprobs(mixture: Mixture, scores: Mapping[Term, Tensor], alphas, variant: Variant) -> dict[str, Tensor]:
    """Log-probabilities (T, V) by role, ids that not all models know left out everywhere."""
    base_1TV = scores[mixture.base][None]
    rules = Variants([variant], base_1TV.device)
    positions_1T = torch.arange(base_1TV.shape[1], device=base_1TV.device)[None]
    share_T1 = 1.0 if rules.off else rules.share(base_1TV, positions_1T)[0]
    steered_TV = mixture.combine(scores, [alpha * share_T1 for alpha in alphas])
    if not rules.off:
        steered_TV = rules.filter(mixture.vocabulary.mask(base_1TV), steered_TV[None])[0]
    alone = {term.role: mixture.vocabulary.mask(scores[term]) for term in mixture.terms}
    each = {**alone, STEERED: steered_TV}
    for scores_TV in each.values():
        check(scores_TV.amax(-1))
    return {role: scores_TV.float().log_softmax(-1) for role, scores_TV in each.items()}


def _record(
    text: Said, by_role: Mapping[str, Tensor], mixture: Mixture, top: int, word: Callable[[int, int], str]
) -> dict[str, Any]:
    base_TV, steered_TV = by_role[mixture.base.role], by_role[STEERED]
    said_T1 = torch.tensor(list(text.ids), device=base_TV.device)[:, None]
    own = {role: logprobs_TV.gather(-1, said_T1) for role, logprobs_TV in by_role.items()}
    best = {role: by_role[role].topk(min(top, base_TV.shape[-1])) for role in (mixture.base.role, STEERED)}
    top_ids = {role: found.indices.tolist() for role, found in best.items()}
    instead_T = steered_TV.gather(-1, best[mixture.base.role].indices[:, :1])[:, 0]
    return {
        "id": text.id,
        "prompt": text.prompt,
        "ids": list(text.ids),
        "pieces": [word(token, place) for place, token in enumerate(text.ids)],
        "logprobs": {role: _told(own_T1[:, 0]) for role, own_T1 in own.items()},
        "ranks": {role: ((by_role[role] > own_T1).sum(-1) + 1).tolist() for role, own_T1 in own.items()},
        "kl": _told(kl(steered_TV, base_TV)),
        "top": top_ids,
        "top_logprobs": {role: [_told(row) for row in found.values] for role, found in best.items()},
        "instead": _told(instead_T),
        "words": {
            str(token): word(token, place) or f"<{token}>"
            for ids in top_ids.values()
            for place, row in enumerate(ids)
            for token in row
        },
    }


def _words(tokenizer: Any, text: Said) -> Callable[[int, int], str]:
    """The text of a token at a place. A said one is read after what stands before it; others where they are met first.

    Known for one text only: a record must not depend on what was looked at before it.
    """
    known: dict[int, str] = {}

    def word(token: int, place: int) -> str:
        if token == text.ids[place]:
            return token_text(tokenizer, text.ids[:place], token)
        if token not in known:
            known[token] = token_text(tokenizer, text.ids[:place], token)
        return known[token]

    return word


def _told(values_T: Tensor) -> list[float]:
    return [round(value, 4) for value in values_T.clamp(min=LOWEST).tolist()]
