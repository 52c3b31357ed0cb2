"""Random Llamas of a few thousand parameters and a tokenizer of letters: all that the loop needs, in milliseconds."""

from __future__ import annotations

from functools import cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from proxytune.decoding.mixture import Mixture, Term
from proxytune.models.local import LocalSource
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


def mixture(foreign: tuple[int, ...] = ()) -> Mixture:
    base, expert, anti = (
        Term(LocalSource(model(seed, layers)), role)
        for seed, layers, role in ((1, 3, "base"), (2, 2, "expert"), (3, 2, "anti"))
    )
    return Mixture(base, Vocabulary(SIZE, foreign), ((expert, anti),))
