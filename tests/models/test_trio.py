from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from proxytune.decoding.mixture import Mixture
from proxytune.errors import DataError, ModelError, TrioError
from proxytune.models import trio
from proxytune.models.identity import identify
from proxytune.models.trio import ExpertFiles
from proxytune.models.vocabulary import Vocabulary
from proxytune.settings import Family, ModelRef
from tests.models.tiny_family import save_family, save_llama, tokenizer

PROMPT = "Say 1.\n"


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Family:
    return save_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def fresh(family, tmp_path_factory) -> ExpertFiles:
    """An expert whose adapter is as it is before its first step: it changes nothing."""
    from peft import LoraConfig, get_peft_model

    from proxytune.models.loading import load_model

    folder = tmp_path_factory.mktemp("fresh")
    model = get_peft_model(
        load_model(family.small), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return expert(folder, family.small)


def expert(folder: Path, anti: ModelRef, adapter: bool = True) -> ExpertFiles:
    return ExpertFiles("qa@v1", folder, adapter, identify(anti, tokenizer()), "plain")


def loaded(family: Family, files: ExpertFiles) -> trio.Trio:
    return trio.load(family.base_ref, [files], "float32")


@pytest.mark.parametrize("alpha", [0.0, 1.0, -3.0, 40.0])
def test_a_fresh_adapter_steers_nothing_at_any_alpha(family, fresh, alpha):
    three = loaded(family, fresh)
    mixture = Mixture(three.base, three.vocabulary, three.pairs)
    asked = three.encode(PROMPT)
    prompts = {group: [[asked[term.role] for term in group]] for group in mixture.groups}
    scores = {
        term: found
        for group in mixture.groups
        for term, found in zip(
            group, group[0].source.score(prompts[group], [[5, 6]], [term.member for term in group])[0], strict=True
        )
    }
    assert torch.equal(mixture.combine(scores, [alpha]), three.vocabulary.mask(scores[three.base]))


def test_padding_rows_of_the_base_s_head_are_left_out(family, fresh):
    three = loaded(family, fresh)
    assert three.base.source.model.config.vocab_size == 2112
    assert three.vocabulary.size == len(tokenizer()) and three.vocabulary.foreign == ()


def test_a_chat_expert_reads_its_format_and_the_other_two_read_plain_text(family, fresh):
    three = loaded(family, dataclasses.replace(fresh, prompt_format="chat"))
    asked = three.encode([{"role": "user", "content": "Hello?"}])
    said = {role: tokenizer().decode(ids) for role, ids in asked.items()}
    assert said == {
        "base": "Hello?\n",
        "expert": "<|user|>\nHello?<|end|>\n<|assistant|>\n",
        "anti": "Hello?\n",
    }
    turn, eos = tokenizer().convert_tokens_to_ids("<|end|>"), tokenizer().eos_token_id
    assert three.end_id == turn and {turn, eos} <= three.end_ids
    assert three.encode_completion("Hello?", "Yes")[-1] == turn


def test_a_plain_expert_s_replies_end_with_eos(family, fresh):
    three = loaded(family, fresh)
    assert three.encode_completion(PROMPT, "1")[-1] == tokenizer().eos_token_id


def test_a_reply_with_a_token_that_not_all_models_know_is_refused(family, fresh):
    three = loaded(family, fresh)
    known = three.encode_completion(PROMPT, "One.")
    narrow = dataclasses.replace(three, vocabulary=Vocabulary(three.vocabulary.size, (known[0],)))
    with pytest.raises(DataError, match="not all models of the trio know"):
        narrow.encode_completion(PROMPT, "One.")


def test_one_changed_weight_of_the_anti_is_refused(fresh, family, tmp_path):
    other = Path(shutil.copytree(family.small.model, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    lineage = fresh.anti.model_copy(update={"model": str(other)})
    with pytest.raises(TrioError, match=r"weights changed.*tune the expert again"):
        loaded(family, dataclasses.replace(fresh, anti=lineage))


def test_an_anti_with_another_tokenizer_is_refused(fresh, family, tmp_path):
    other = Path(shutil.copytree(family.small.model, tmp_path / "other"))
    wider = tokenizer()
    wider.add_tokens(["<new>"])
    wider.save_pretrained(other)
    lineage = fresh.anti.model_copy(update={"model": str(other)})
    with pytest.raises(TrioError, match=r"tokenizer changed.*tune the expert again"):
        loaded(family, dataclasses.replace(fresh, anti=lineage))


def test_a_base_with_another_vocabulary_is_refused(fresh, tmp_path):
    own = tokenizer()
    shifted = own.train_new_from_iterator(["some other text entirely"] * 9, vocab_size=400)
    base = save_llama(tmp_path / "base", seed=5, own=shifted)
    with pytest.raises(TrioError, match=r"do not share a vocabulary.*one family"):
        trio.load(ModelRef(model=str(base)), [fresh], "float32")


def test_an_anti_that_is_gone_is_told(fresh, family, tmp_path):
    lineage = fresh.anti.model_copy(update={"model": str(tmp_path / "gone")})
    with pytest.raises(ModelError, match="gone"):
        loaded(family, dataclasses.replace(fresh, anti=lineage))
