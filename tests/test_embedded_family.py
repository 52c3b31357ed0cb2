"""The weights that ship: their sizes, and that the base knows more than the small model before anything is tuned.

`python tests/test_embedded_family.py` prints the losses on all test rows.
"""

from __future__ import annotations

import sys
from functools import cache

import pytest

from proxytune.decoding.mixture import Mixture, Term
from proxytune.decoding.scoring import Given, losses
from proxytune.files import resource
from proxytune.models import prompts
from proxytune.models.loading import load_model, load_tokenizer
from proxytune.models.local import LocalSource
from proxytune.models.vocabulary import Vocabulary
from proxytune.settings import ModelRef
from proxytune.tasks import catalog
from proxytune.tasks.task import Row

NAMES = ("small", "base")


@cache
def loaded(name: str):
    ref = ModelRef(model=f"embedded:{name}")
    return load_model(ref, "float32"), load_tokenizer(ref)


def loss(name: str, rows: list[Row]) -> float:
    """Nats a token of the replies, prompts put plainly."""
    model, tokenizer = loaded(name)
    mixture = Mixture(Term(LocalSource(model), "base"), Vocabulary(len(tokenizer), ()))
    given = [
        Given(
            {"base": prompts.encode(row["prompt"], tokenizer, "plain")},
            prompts.encode_completion(row["prompt"], row["completion"], tokenizer, tokenizer.eos_token_id),
        )
        for row in rows
    ]
    total = sum(found for batch in losses(mixture, given, [()]) for [found] in batch)
    return total / sum(len(row.completion) for row in given)


@pytest.mark.parametrize("task", catalog.names())
def test_the_base_is_the_better_language_model_on_every_task(built_in, task):
    rows = built_in[task]["test"][:100]
    assert loss("base", rows) < loss("small", rows)


def test_the_siblings_have_the_sizes_that_the_card_names():
    (small, one), (base, other) = (loaded(name) for name in NAMES)
    assert 200_000 <= small.num_parameters() <= 1_000_000
    assert base.num_parameters() >= 8 * small.num_parameters()
    assert one.get_vocab() == other.get_vocab()
    assert 2_000 <= len(one) <= 4_096
    card = (resource("data") / "tiny" / "README.md").read_text("utf-8")
    assert all(f"{model.num_parameters():,}" in card for model in (small, base))


def test_the_weights_are_bfloat16_safetensors_of_25_megabytes_at_most():
    from safetensors import safe_open

    folder = resource("data") / "tiny"
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 25e6
    for name in NAMES:
        with safe_open(folder / name / "model.safetensors", "pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}  # noqa: SIM118


if __name__ == "__main__":
    for task in sys.argv[1:] or catalog.names():
        rows = catalog.get(task).builtin()["test"]
        print(task, *(f"{name} {loss(name, rows):.3f}" for name in NAMES))
