from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune.errors import TrioError
from proxytune.models.vocabulary import Vocabulary, shared

TOKENS = st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=40, unique=True)


def ids(tokens) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


@settings(deadline=None)
@given(TOKENS, st.lists(st.integers(0, 50), min_size=1, max_size=3))
def test_models_that_agree_share_every_id_whatever_their_heads_are_padded_to(tokens, padding):
    models = {str(i): (ids(tokens), len(tokens) + pad) for i, pad in enumerate(padding)}
    assert shared(models) == Vocabulary(len(tokens), ())


@settings(deadline=None)
@given(TOKENS, st.data())
def test_two_tokens_swapped_in_one_model_are_refused_by_id(tokens, data):
    tokens = [*tokens, "first of two", "second of two"]
    a, b = data.draw(st.lists(st.integers(0, len(tokens) - 1), min_size=2, max_size=2, unique=True).map(sorted))
    other = list(tokens)
    other[a], other[b] = other[b], other[a]
    with pytest.raises(TrioError, match=f"id {a}: base .*, expert .*one family"):
        shared({"base": (ids(tokens), 99), "expert": (ids(other), 99)})


def test_a_token_that_only_one_model_knows_is_foreign_and_so_is_an_id_that_none_knows():
    tokens = ids(f"t{i}" for i in range(300))
    gap = {**tokens, "<far>": 302}  # 300 and 301 have no token in any model
    assert shared({"base": (tokens, 320), "expert": (gap, 320)}) == Vocabulary(303, (300, 301, 302))


def test_a_reserved_token_under_another_name_is_foreign():
    tokens = ids(f"t{i}" for i in range(200))
    renamed = {("<tool>" if i == 7 else token): i for token, i in tokens.items()}
    assert shared({"base": (tokens, 200), "expert": (renamed, 200)}).foreign == (7,)


def test_more_than_a_hundredth_of_unlike_ids_is_another_tokenizer():
    tokens = ids(f"t{i}" for i in range(200))
    other = {(f"u{i}" if i < 3 else token): i for token, i in tokens.items()}
    with pytest.raises(TrioError, match="3 of 200 ids differ, as id 0: base 't0', anti 'u0'"):
        shared({"base": (tokens, 200), "anti": (other, 200)})


def test_scores_are_cut_to_the_smallest_head():
    tokens = ids(f"t{i}" for i in range(10))
    assert shared({"base": (tokens, 16), "expert": (tokens, 8)}).size == 8


def test_the_mask_changes_foreign_ids_only_and_not_its_input():
    scores = torch.arange(6.0).repeat(2, 1)
    masked = Vocabulary(6, (1, 4)).mask(scores)
    assert masked[0].tolist() == [0, -torch.inf, 2, 3, -torch.inf, 5] and scores[0, 1] == 1
