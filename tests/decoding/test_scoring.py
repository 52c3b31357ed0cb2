from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxytune.decoding.scoring import Given, choices, losses
from tests.decoding.test_engine import PROMPTS, plain
from tests.decoding.tiny_models import SIZE, lora_mixture, mixture


@pytest.mark.parametrize("mix", [mixture(), lora_mixture()], ids=["three models", "shared weights"])
@given(
    st.lists(st.tuples(PROMPTS, st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=6)), min_size=1, max_size=5),
    st.lists(st.floats(-2, 2), min_size=1, max_size=4),
    st.integers(1, 3),
)
def test_losses_of_all_alphas_are_those_of_one_row_and_one_alpha_at_a_time(mix, rows, alphas, batch_size):
    given_rows = [Given(prompts, completion) for prompts, completion in rows]
    found = [row for batch in losses(mix, given_rows, [[a] for a in alphas], batch_size=batch_size) for row in batch]
    with torch.inference_mode():
        for i, (prompts, completion) in enumerate(rows):
            for j, alpha in enumerate(alphas):
                expected = 0.0
                for at, token in enumerate(completion):
                    base, expert, anti = (plain(t, [*prompts[t.role], *completion[:at]]) for t in sorted_terms(mix))
                    expected -= (base + alpha * (expert - anti)).log_softmax(-1)[token].item()
                assert found[i][j] == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("mix", [mixture(), lora_mixture()], ids=["three models", "shared weights"])
@given(
    PROMPTS,
    st.lists(st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=6), min_size=1, max_size=5),
    st.lists(st.floats(-2, 2), min_size=1, max_size=3),
)
def test_replies_to_one_prompt_lose_what_each_loses_alone(mix, prompts, replies, alphas):
    found = choices(mix, prompts, replies, [[alpha] for alpha in alphas])
    for reply, nats in zip(replies, found, strict=True):
        ((alone,),) = losses(mix, [Given(prompts, reply)], [[alpha] for alpha in alphas])
        assert nats == pytest.approx(alone, rel=1e-8)


def sorted_terms(mix):
    (expert, anti), *_ = mix.pairs
    return mix.base, expert, anti
