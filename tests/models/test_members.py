"""Expert and anti from one copy of the weights, against PEFT's own results."""

from __future__ import annotations

import copy
import gc
import json
from threading import Thread

import pytest
import torch
from peft import PeftModel
from torch import nn

from proxytune.errors import ModelError
from proxytune.experts.starting import Start, continued
from proxytune.models.loading import load_model
from proxytune.models.local import LocalSource
from proxytune.models.members import attach, separable
from proxytune.settings import ModelRef, Peft
from tests.decoding.tiny_models import SIZE, adapter, model
from tests.models.tiny_family import save_llama

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1]])


def sources(folders, dtype=torch.float64):
    net = copy.deepcopy(model(3, dtype=dtype))
    attach(net, folders)
    return LocalSource(net)


def scored(source: LocalSource, members) -> list[torch.Tensor]:
    stream = source.open(2, 8, members)
    tokens = IDS[:, None].expand(-1, len(members), -1)
    found = stream.read(tokens, torch.zeros(2, len(members), dtype=torch.int64))
    return list(found.unbind(1))


def by_peft(folder, dtype=torch.float64) -> torch.Tensor:
    with torch.inference_mode():
        return PeftModel.from_pretrained(copy.deepcopy(model(3, dtype=dtype)), str(folder)).eval()(IDS).logits


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "r": 4},
        {"target_modules": ["q_proj", "down_proj"]},
        {"rank_pattern": {"q_proj": 1, "up_proj": 5}, "alpha_pattern": {"q_proj": 7}},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["plain", "rank-stabilised", "some layers", "patterns", "the head too"],
)
@pytest.mark.parametrize("members", [(0, 1, 2), (1, 0), (2,), (0,)])
def test_each_member_scores_as_peft_has_it(tmp_path, config, members):
    folders = [adapter(model(3), seed, tmp_path / str(seed), **config) for seed in (1, 2)]
    with torch.inference_mode():
        truth = {0: model(3)(IDS).logits, 1: by_peft(folders[0]), 2: by_peft(folders[1])}
    assert not torch.allclose(truth[0], truth[1], atol=0.05)
    source = sources(folders)
    assert source.rows == SIZE
    for member, scores in zip(members, scored(source, members), strict=True):
        assert torch.allclose(scores, truth[member], rtol=0, atol=1e-10)


def test_a_forward_in_another_thread_changes_no_member_of_this_one(tmp_path):
    """A server reads for one engine while another waits for its base."""
    source = sources([adapter(model(3), 1, tmp_path / "a")])
    alone = {member: scored(source, (member,))[0] for member in (0, 1)}
    beside = []

    def read_beside(*_) -> None:
        hook.remove()
        thread = Thread(target=lambda: beside.append(scored(source, (1,))[0]))
        thread.start()
        thread.join()

    hook = source.model.register_forward_pre_hook(read_beside)
    assert torch.equal(scored(source, (0,))[0], alone[0]) and torch.equal(beside[0], alone[1])


def test_the_anti_s_scores_are_bit_for_bit_those_without_any_adapter(tmp_path):
    folder = adapter(model(3), 1, tmp_path / "a")
    source = sources([folder], torch.float32)
    bare = LocalSource(model(3, dtype=torch.float32))
    assert torch.equal(scored(source, (0,))[0], scored(bare, (0,))[0])


def test_the_pair_holds_one_small_model_and_the_adapter_and_nothing_else(tmp_path):
    folder = adapter(model(3), 1, tmp_path / "a")
    net = copy.deepcopy(model(3))
    attach(net, [folder])
    gc.collect()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in reachable(net)}
    own = sum(p.numel() * p.element_size() for p in model(3).parameters())
    tuned = PeftModel.from_pretrained(copy.deepcopy(model(3)), str(folder))
    added = sum(weight.nbytes for name, weight in tuned.named_parameters() if "lora_" in name)
    buffers = sum(b.nbytes for b in model(3).buffers())
    assert sum(held.values()) <= 1.02 * (own + added) + buffers


def reachable(net: nn.Module):
    for module in net.modules():
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
        for pair in getattr(module, "low", {}).values():
            yield from pair


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
        {"bias": "all"},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"init_lora_weights": "pissa"},
        {"alora_invocation_tokens": [3]},
    ],
    ids=["DoRA", "whole modules", "biases", "embeddings", "other weights under it", "from a token on"],
)
def test_an_adapter_that_is_more_than_a_low_rank_term_shares_nothing(tmp_path, config):
    folder = adapter(model(3, dtype=torch.float32), 1, tmp_path / "a", **config)
    assert not separable(folder)
    with pytest.raises(ModelError, match="no plain LoRA adapter"):
        attach(copy.deepcopy(model(3)), [folder])


@pytest.mark.parametrize(
    "broken",
    [{"peft_type": "X"}, {"peft_type": None}, {"r": "many"}, {"megatron_config": {"x": 1}}, "gone"],
    ids=str,
)
@pytest.mark.parametrize("use", ["attach", "merge", "go on"])
def test_a_broken_adapter_is_told_in_one_line(tmp_path, broken, use):
    small = ModelRef(model=str(save_llama(tmp_path / "small", seed=1)))
    folder = adapter(load_model(small), 1, tmp_path / "a")
    if broken == "gone":
        (folder / "adapter_model.safetensors").unlink()
    else:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | broken))
    with pytest.raises(ModelError, match=f"(the adapter {folder}|{folder} is no plain)") as error:
        match use:
            case "attach":
                attach(load_model(small), [folder])
            case "merge":
                load_model(small, adapter=folder)
            case "go on":
                Start(small, folder, adapter=True).model(Peft())
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("written", [{"target_modules": ["q_proj"]}, ["r"]])
def test_an_adapter_of_no_shape_cannot_be_tuned_on(tmp_path, written):
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    with pytest.raises(ModelError, match=f"the adapter {tmp_path}"):
        continued(Peft(), tmp_path)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merged_into_tied_weights_an_adapter_changes_the_layer_that_it_is_for_alone(tmp_path, target):
    small = str(save_llama(tmp_path / "small", seed=1))
    folder = adapter(load_model(ModelRef(model=small)), 1, tmp_path / "a", target_modules=["q_proj", target])
    with torch.inference_mode():
        truth = PeftModel.from_pretrained(load_model(ModelRef(model=small)), str(folder)).eval()(IDS).logits
        found = load_model(ModelRef(model=small), "float32", adapter=folder)(IDS).logits
    assert torch.allclose(found, truth, rtol=0, atol=1e-4)
