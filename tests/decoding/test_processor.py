"""The logits processor inside transformers' own `generate`, against one that reads everything anew at each step."""

from __future__ import annotations

import pytest
import torch
from transformers import set_seed

from proxytune.decoding.engine import Engine
from proxytune.decoding.processor import ProxyTuningLogitsProcessor
from proxytune.decoding.request import Limits, Request
from proxytune.errors import ModelError
from proxytune.models.members import ACTIVE
from tests.decoding.test_engine import plain
from tests.decoding.tiny_models import SIZE, ByteTokenizer, lora_mixture, mixture

PAD = 59
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True, "top_k": 0},
}


def batch(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def generated(mix, rows, processor, **how) -> list[list[int]]:
    set_seed(3)
    model = mix.base.source.model
    out = model.generate(
        **batch(rows), logits_processor=[processor], max_new_tokens=9, eos_token_id=None, pad_token_id=PAD,
        **({"do_sample": False} | how),
    )  # fmt: skip
    return out.tolist()


def anew(mix, alpha):
    """Steering with nothing kept from step to step."""

    def process(input_ids, scores):
        rows = []
        for ids, base in zip(input_ids.tolist(), scores, strict=True):
            ids = [i for i in ids if i != PAD]
            (expert, anti), *_ = mix.pairs
            rows.append((base + alpha * (plain(expert, ids) - plain(anti, ids))).log_softmax(-1))
        return torch.stack(rows)

    return process


@pytest.mark.parametrize("mix", [mixture((PAD,)), lora_mixture()], ids=["three models", "shared weights"])
@pytest.mark.parametrize("way", WAYS)
def test_generate_says_what_steering_read_anew_at_each_step_says(mix, way):
    rows = [[3, 4, 8], [9], [2, 2, 7, 1, 5]]
    processor = ProxyTuningLogitsProcessor(mix, 0.8, pad_token_id=PAD)
    ACTIVE.set((0,))
    found = generated(mix, rows, processor, bad_words_ids=[[PAD]], **WAYS[way])
    assert found == generated(mix, rows, anew(mix, 0.8), bad_words_ids=[[PAD]], **WAYS[way])
    again = generated(
        mix, rows[::-1], processor, bad_words_ids=[[PAD]], **WAYS[way]
    )  # another call, the same processor
    assert again == generated(mix, rows[::-1], anew(mix, 0.8), bad_words_ids=[[PAD]], **WAYS[way])


class Scripted:
    """`generate`'s part: rows that grow as they are told, against the same steps read anew."""

    def __init__(self, mix, **how):
        self.mix, self.processor = mix, ProxyTuningLogitsProcessor(mix, 0.8, pad_token_id=PAD, **how)

    @torch.inference_mode()
    def step(self, *rows: list[int], experts=None) -> bool:
        ids, scores = batch(list(rows))["input_ids"], torch.zeros(len(rows), SIZE, dtype=torch.float64)
        expert, anti = self.mix.pairs[0]
        read = zip(experts or rows, rows, strict=True)
        truth = torch.stack([0.8 * (plain(expert, own) - plain(anti, row)) for own, row in read]).log_softmax(-1)
        return torch.allclose(self.processor(ids, scores), truth, rtol=0, atol=1e-9)


def test_a_prompt_that_begins_as_another_row_s_goes_on_as_its_own():
    steps = Scripted(mixture())
    assert steps.step([3, 4], [3, 4, 8, 2, 6])
    assert steps.step([3, 4, 8], [3, 4, 8, 2, 6, 9])  # the first row says what the second's prompt says
    assert steps.step([3, 4, 8, 2], [3, 4, 8, 2, 6, 9, 1])
    assert steps.step([3, 4, 8, 2, 7], [3, 4, 8, 2, 6, 9, 1, 1])


def test_a_call_that_shares_one_prompt_with_the_last_reads_the_others():
    steps = Scripted(mixture())
    assert steps.step([3, 4], [9, 1]) and steps.step([3, 4, 5], [9, 1, 5])
    assert steps.step([3, 4], [7, 2, 6]) and steps.step([3, 4, 8], [7, 2, 6, 8])


def test_beams_of_equal_prompts_keep_to_the_expert_s_own():
    """Both groups' beams read the same text, and the second's goes on from its other beam."""
    steps = Scripted(mixture(), prompts={"expert": [[5], [6, 7]]})

    def step(*tails):
        owns = [[5], [5], [6, 7], [6, 7]]
        rows = [[3, 4, *tail] for tail in tails]
        return steps.step(*rows, experts=[[*own, *tail] for own, tail in zip(owns, tails, strict=True)])

    assert step([], [], [], []) and step([1], [2], [8], [1])
    assert step([1, 9], [2, 9], [1, 9], [8, 9])


def test_prompts_of_their_own_give_what_the_engine_gives():
    mix = mixture()
    rows, expert = [[3, 4, 8], [9, 2]], [[5], [6, 7, 8, 9]]
    processor = ProxyTuningLogitsProcessor(mix, 0.7, pad_token_id=PAD, prompts={"expert": expert})
    found = generated(mix, rows, processor)
    requests = [
        Request({"base": row, "expert": own, "anti": row}, Limits(9), (0.7,))
        for row, own in zip(rows, expert, strict=True)
    ]
    replies = dict(Engine(mix, ByteTokenizer()).run(requests))
    assert [ids[-9:] for ids in found] == [replies[i].token_ids for i in range(2)]


def test_each_step_reads_one_new_token_of_each_row():
    mix, widths = mixture(), []
    processor = ProxyTuningLogitsProcessor(mix, 1.0, pad_token_id=PAD)
    processor._open_as_before = processor._open

    def opened(rows):
        processor._open_as_before(rows)
        for stream in processor.streams:
            stream.read = lambda t, s, first, read=stream.read: (widths.append(t.shape[2]), read(t, s, first=first))[1]
            stream.fill = lambda t, s, first, fill=stream.fill: (widths.append(-t.shape[2]), fill(t, s, first=first))[1]

    processor._open = opened
    generated(mix, [[3, 4, 8], [9, 1, 1]], processor, num_beams=3)
    assert [w for w in widths if w < 0] == [-2, -2] and set(widths) == {-2, 1}


def test_alphas_that_do_not_fit_the_experts_are_refused():
    with pytest.raises(ModelError, match="2 alphas are given for 1 experts"):
        ProxyTuningLogitsProcessor(mixture(), [0.5, 0.5])
