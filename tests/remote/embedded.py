"""The embedded base with a pair made of the embedded small model, and requests of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from proxytune.decoding.mixture import Mixture
from proxytune.decoding.remote import CertifiedReply
from proxytune.decoding.request import Limits, Request
from proxytune.models.loading import load_model, load_tokenizer
from proxytune.models.local import LocalSource
from proxytune.models.source import Term
from proxytune.models.vocabulary import Vocabulary
from proxytune.settings import ModelRef
from proxytune.steering.choice import Sampling

BASE, SMALL = (ModelRef(model=f"embedded:{name}") for name in ("base", "small"))
SIZE, END = 2048, 0


@cache
def mixture() -> Mixture:
    """The embedded base and small model; the expert is the small model with its weights shaken by 5%."""
    small = load_model(SMALL, "float32")
    tuned = copy.deepcopy(small)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.add_(torch.randn_like(weight) * 0.05 * weight.std())
    sources = (load_model(BASE, "float32"), tuned, small)
    base, expert, anti = (
        Term(LocalSource(net, SIZE), role) for net, role in zip(sources, ("base", "expert", "anti"), strict=True)
    )
    return Mixture(base, Vocabulary(SIZE, (1,)), ((expert, anti),))


def asked(count: int, choices: tuple[Sampling, ...]) -> list[Request]:
    """Prompts with the choices in turn, each with its own seed."""
    tokenizer = load_tokenizer(BASE)
    texts = ["def area(radius):\n    ", "The town of ", "What is 3 + ", "Once there was a ", "import os\n"]
    requests = []
    for n in range(count):
        ids = tokenizer(f"{texts[n % 5]}{n}").input_ids
        roles = dict.fromkeys(("base", "expert", "anti"), ids)
        choice = replace(choices[n % len(choices)], seed=n)
        requests.append(Request(roles, Limits(8, frozenset({END})), ((0.5, 1.0, 1.5)[n // 3 % 3],), choice))
    return requests


def holds(replies: Sequence[CertifiedReply], truth: Sequence[Sequence[int]]) -> None:
    """Every certified token is the true one, as long as the tokens before it are."""
    for reply, tokens in zip(replies, truth, strict=True):
        assert len(reply.certified) == len(reply.token_ids)
        for mine, certified, theirs in zip(reply.token_ids, reply.certified, tokens, strict=False):
            assert mine == theirs or not certified
            if mine != theirs:
                break
