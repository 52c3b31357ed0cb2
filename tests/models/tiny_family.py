"""A family of random Llamas with the embedded tokenizer: whole models that load and train in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from proxytune.files import resource
from proxytune.settings import Family, ModelRef

TOKENIZER = resource("data") / "tiny" / "small"
TRAINING = {"learning_rate": 5e-3, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant", "max_length": 128}


def tokenizer(chat: bool = True):
    found = AutoTokenizer.from_pretrained(TOKENIZER)
    if not chat:
        found.chat_template = None
    return found


def save_llama(folder: Path, seed: int, *, hidden: int = 16, rows: int | None = None, own=None) -> Path:
    """A random Llama and its tokenizer in a folder. rows: of its head, more than the tokenizer has ids where given."""
    own = own or tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows or len(own),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def save_family(folder: Path) -> Family:
    """A small model and a wider base with padding rows in its head."""
    return Family(
        name="random",
        small=ModelRef(model=str(save_llama(folder / "small", seed=1))),
        bases={"base": ModelRef(model=str(save_llama(folder / "base", seed=2, hidden=32, rows=2112)))},
        base="base",
        data="builtin",
        dtype="float32",
        training=TRAINING,
    )


def with_long_row(path: str, folder: Path) -> str:
    """The same rows in a file of `folder`, behind one that is longer than any model's context."""
    lines = Path(path).read_text("utf-8")
    long = {"id": "long", "prompt": "word " * 3000 + "last", "completion": " one.\n"}
    found = folder / "longer.jsonl"
    found.write_text(json.dumps(long) + "\n" + lines, "utf-8")
    return str(found)


def write_rows(path: Path, first: int, count: int, *, chat: bool = False) -> str:
    """Rows of a pattern that a few steps of training can learn; no two calls with unlike numbers share a prompt."""
    rows = []
    for i in range(first, first + count):
        prompt, completion = f"Question: what follows {i}?\nAnswer:", f" {i + 1} follows {i}.\n"
        if chat:
            rows.append(
                {
                    "prompt": [{"role": "user", "content": prompt}],
                    "completion": [{"role": "assistant", "content": completion.strip()}],
                }
            )
        else:
            rows.append({"id": f"n{i}", "prompt": prompt, "completion": completion})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)
