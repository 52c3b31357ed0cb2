"""The engine where a model is on a GPU: the same reference, and models on unlike devices."""

from __future__ import annotations

import copy

import pytest
import torch

from proxytune.decoding.mixture import Mixture
from proxytune.decoding.request import Limits, Request
from proxytune.models.local import LocalSource
from proxytune.models.source import Term
from proxytune.models.vocabulary import Vocabulary
from proxytune.steering.choice import Sampling
from tests.decoding.test_engine import DRAFTERS, reference, replies
from tests.decoding.tiny_models import SIZE, model

pytestmark = pytest.mark.gpu


def placed(**devices: str) -> Mixture:
    """The three models on the given devices, in float64, where rounding moves no token."""
    seeds = {"base": (1, 3), "expert": (2, 2), "anti": (3, 2)}
    made = {
        role: Term(LocalSource(copy.deepcopy(model(*seeds[role])).to(device)), role) for role, device in devices.items()
    }
    return Mixture(made["base"], Vocabulary(SIZE, ()), ((made["expert"], made["anti"]),))


REQUESTS = [
    Request(
        {"base": [3] * (seed + 1), "expert": [9, 4], "anti": [3]},
        Limits(12, min_new_tokens=2),
        (seed / 3,),
        Sampling(seed / 4, top_p=0.9, repetition_penalty=1.1, seed=seed),
    )
    for seed in range(6)
]


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(
    "devices",
    [
        {"base": "cuda", "expert": "cuda", "anti": "cuda"},
        {"base": "cpu", "expert": "cuda", "anti": "cuda"},
        {"base": "cuda", "expert": "cpu", "anti": "cpu"},
    ],
    ids=["one GPU", "small models on it", "base on it"],
)
def test_the_reference_s_tokens_come_from_any_placing(drafter, devices):
    here, there = placed(base="cpu", expert="cpu", anti="cpu"), placed(**devices)
    found = replies(REQUESTS, there, batch_size=4, drafter=drafter)
    with torch.inference_mode():
        for i, request in enumerate(REQUESTS):
            assert found[i].token_ids == reference(here, request)
