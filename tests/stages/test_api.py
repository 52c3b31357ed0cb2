"""The Python surface on a trained place."""

from __future__ import annotations

import pytest

import proxytune
from proxytune.errors import RegistryError, SettingsError
from proxytune.settings import DecodeStage
from proxytune.stages import decode

PROMPTS = ["Say 1", "Say 2", "Say 3"]


@pytest.fixture
def steered(place) -> proxytune.Steered:
    return proxytune.load("qa", outputs=place.outputs, alpha=0.5)


def test_three_lines_write_what_the_stage_writes(place, steered):
    records = [decode.run(place.settings(DecodeStage, prompt=prompt, alpha=0.5)) for prompt in PROMPTS]
    replies = steered.generate(PROMPTS, max_new_tokens=6)
    assert [reply.token_ids for reply in replies] == [record["token_ids"] for (record,) in records]
    assert steered.generate(PROMPTS[0], max_new_tokens=6) == replies[0]


def test_pieces_make_up_the_text(steered):
    how = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    pieces = list(steered.stream(PROMPTS[0], **how))
    assert "".join(pieces) == steered.generate(PROMPTS[0], **how).text and len(pieces) > 1


def test_alpha_and_seed_are_each_call_s_own(steered):
    how = {"max_new_tokens": 8, "temperature": 1.0}
    texts = {
        (alpha, seed): steered.generate(PROMPTS[0], alpha=alpha, seed=seed, **how).text
        for alpha in (0, 3)
        for seed in (1, 2)
    }
    assert len(set(texts.values())) > 1
    assert steered.generate(PROMPTS[0], alpha=0, seed=1, **how).text == texts[0, 1]


def test_two_experts_of_one_anti_share_its_weights(place):
    both = proxytune.load(["qa@v1", "qa@v1"], outputs=place.outputs, alpha=[0.25, 0.25])
    once = proxytune.load("qa@v1", outputs=place.outputs, alpha=0.5)
    assert len(both.mixture.groups) == 2 and len(both.mixture.terms) == 4
    how = {"max_new_tokens": 6}
    assert both.generate(PROMPTS[0], **how).token_ids == once.generate(PROMPTS[0], **how).token_ids


def test_a_wrong_expert_and_a_wrong_number_of_alphas_are_one_line(place, steered):
    with pytest.raises(RegistryError, match="did you mean"):
        proxytune.load("qq", outputs=place.outputs)
    with pytest.raises(SettingsError, match="2 alphas are given for 1 experts"):
        steered.generate(PROMPTS[0], alpha=[0.1, 0.2])


def test_several_experts_are_settings_too(place):
    steering = [{"expert": "qa@v1", "alpha": 0.25}, {"expert": "qa@v1", "alpha": 0.25}]
    (record,) = decode.run(place.settings(DecodeStage, prompt=PROMPTS[0], steering=steering))
    (plain,) = decode.run(place.settings(DecodeStage, prompt=PROMPTS[0], alpha=0.5))
    assert record["token_ids"] == plain["token_ids"] and record["models"]["expert2"] == "qa@v1 at 0.25"
