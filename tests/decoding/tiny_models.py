"""Random Llamas of a few thousand parameters and a tokenizer of letters: all that the loop needs, in milliseconds."""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from proxytune.decoding.mixture import Mixture
from proxytune.models.local import LocalSource
from proxytune.models.members import attach
from proxytune.models.source import Term
from proxytune.models.vocabulary import Vocabulary

SIZE = 60
END = 0


class ByteTokenizer:
    """Ids 1.. are the letters from `A`; id 0 ends a reply."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(64 + i) for i in ids if not (skip_special_tokens and i == END))


@cache
def model(seed: int, layers: int = 2, dtype=torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.8,
        bos_token_id=None,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@cache
def source(seed: int, layers: int = 2, dtype=torch.float64) -> LocalSource:
    return LocalSource(model(seed, layers, dtype))


def mixture(foreign: tuple[int, ...] = (), dtype=torch.float64) -> Mixture:
    base, expert, anti = (
        Term(source(seed, layers, dtype), role)
        for seed, layers, role in ((1, 3, "base"), (2, 2, "expert"), (3, 2, "anti"))
    )
    return Mixture(base, Vocabulary(SIZE, foreign), ((expert, anti),))


def adapter(net, seed: int, folder: Path, **config) -> Path:
    """A LoRA adapter with random numbers in both of its matrices, written by PEFT."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    plan = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config)
    tuned = get_peft_model(copy.deepcopy(net), plan)
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    tuned.save_pretrained(folder)
    return folder


@cache
def lora_mixture(experts: int = 1) -> Mixture:
    """A base, and experts that share their anti's weights."""
    with tempfile.TemporaryDirectory() as folder:
        net = copy.deepcopy(model(3))
        folders = [adapter(model(3), seed, Path(folder) / str(seed)) for seed in range(experts)]
        attach(net, folders)
        small = LocalSource(net)
    anti = Term(small, "anti")
    names = ["expert", *(f"expert{i}" for i in range(2, experts + 1))]
    pairs = tuple((Term(small, name, member), anti) for member, name in enumerate(names, 1))
    return Mixture(Term(source(1, 3), "base"), Vocabulary(SIZE, ()), pairs)
