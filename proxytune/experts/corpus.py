"""The text that the embedded family is pre-trained on, and its tokenizer.

Sources: the source code of Python's standard library (PSF licence) without every module that `tasks/code.py` holds
out; the almanac and the arithmetic as prose, made by `tasks/`; and any text files the user names.
None of it is in a task's format.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from proxytune.errors import DataError
from proxytune.files import write_atomic
from proxytune.tasks import almanac, arithmetic_prose, rowfiles, rows, stdlib
from proxytune.tasks.arithmetic_prose import Range

END = "<|endoftext|>"
SPECIAL_TOKENS = (END, "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
)


def standard_library() -> Iterator[str]:
    """The library without held-out modules and without any file that repeats a held-out function."""
    held_out = {
        stdlib.body_key(function.source)
        for function in stdlib.functions()
        if stdlib.split_of(function.module) != "train"
    }
    for module, source in stdlib.modules():
        if stdlib.split_of(module) == "train" and source.strip():
            tree = stdlib.parse(source)
            if tree is None or not any(key in held_out for key in stdlib.body_keys(tree)):
                yield source


def extra(path: Path) -> list[str]:
    """Documents of a user's file: the `text` or `question` of each JSONL row, or a plain text file as a whole."""
    if path.suffix == ".jsonl":
        return rowfiles.read_each(path, _text)
    try:
        return [path.read_text("utf-8")]
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8") from None


def _text(row: Any) -> str:
    found = (row.get("text") or row.get("question")) if isinstance(row, dict) else None
    if not found:
        raise DataError("the row has no text", 'rows of extra= are objects with a "text" or a "question"')
    rows.check_text(found, "text")
    return found


def prose(epoch: int, towns: int, almanac_passes: int, sums: Range, arithmetic_paragraphs: int) -> Iterator[str]:
    """One epoch's made-up prose, new wording and new sums in every epoch."""
    rng = random.Random(f"prose {epoch}")
    for _ in range(almanac_passes):
        for town in rng.sample(almanac.towns(towns), towns):
            yield almanac.paragraph(town, rng)
    for _ in range(arithmetic_paragraphs):
        yield arithmetic_prose.paragraph(rng, sums)


def write_documents(path: Path, documents: Iterable[str]) -> None:
    """Write documents as gzipped JSONL, the same bytes for the same documents."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    write_atomic(path, gzip.compress(lines.encode(), mtime=0))


def read_documents(path: Path) -> list[str]:
    return rowfiles.read_each(path, lambda row: row["text"])


def train_tokenizer(texts: Iterable[str], vocabulary: int):
    """Byte-level BPE with single digits, special tokens first, wrapped for transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token="<|pad|>",
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
