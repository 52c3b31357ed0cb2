"""Pre-train the embedded family: two Llama siblings of unlike size on the same text in the same order.

Everything a run does follows from its settings: the text (`experts/corpus.py`), its order and the initial weights are
seeded, so the same settings on the same machine give the same weights; another machine gives weights that differ in
rounding only.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from proxytune.experts import corpus
from proxytune.experts.checkpoints import last_complete
from proxytune.tasks.arithmetic_prose import TABLES, WIDE, Range


@dataclass(frozen=True)
class Shape:
    """A Llama of `hidden_size` wide and `layers` deep; grouped queries share `kv_heads` key-value heads."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int


SHAPES = {
    "small": Shape(hidden_size=64, layers=4, heads=2, kv_heads=2, intermediate_size=192),
    "base": Shape(hidden_size=256, layers=6, heads=4, kv_heads=2, intermediate_size=640),
}


@dataclass(frozen=True)
class Phase:
    """So many steps on epochs of: the real documents once, the almanac's first towns, and arithmetic."""

    steps: int
    towns: int
    almanac_passes: int
    sums: Range
    arithmetic_paragraphs: int


# First widely, then what the tasks will ask about, often enough for a model of this size to remember it.
PHASES = (
    Phase(steps=2712, towns=1000, almanac_passes=30, sums=WIDE, arithmetic_paragraphs=12_000),
    Phase(steps=1814, towns=400, almanac_passes=165, sums=TABLES, arithmetic_paragraphs=6_000),
)


@dataclass(frozen=True)
class Schedule:
    """How much is read, and how. Tokens a step = batch * window."""

    phases: tuple[Phase, ...] = PHASES
    window: int = 256
    batch: int = 16
    learning_rate: float = 1.5e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    held_out: float = 0.01
    compiled: bool = True
    seed: int = 1

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)


def new_model(shape: Shape, tokenizer, seed: int):
    """A Llama with fresh weights, embedding and head tied, vocabulary exactly the tokenizer's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def windows(documents: list[str], tokenizer, schedule: Schedule):
    """(training windows, held-out windows) as int16 tensors (N, window): documents end to end, an end token between."""
    import numpy as np

    documents = list(documents)
    random.Random(schedule.seed).shuffle(documents)
    cut = max(1, int(len(documents) * schedule.held_out))
    held_out, kept = documents[:cut], documents[cut:]

    def ids(texts: list[str]) -> list[list[int]]:
        end = [tokenizer.eos_token_id]
        return [encoding.ids + end for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts)]

    def pack(streams: list[list[int]]):
        flat = np.concatenate([np.asarray(stream, dtype=np.int16) for stream in streams])
        return flat[: len(flat) // schedule.window * schedule.window].reshape(-1, schedule.window)

    real, packed, epoch = ids(kept), [], 0
    for phase in schedule.phases:
        missing = phase.steps * schedule.batch
        while missing > 0:
            made = corpus.prose(epoch, phase.towns, phase.almanac_passes, phase.sums, phase.arithmetic_paragraphs)
            streams = real + ids(list(made))
            random.Random(f"order {schedule.seed} {epoch}").shuffle(streams)
            packed.append(pack(streams)[:missing])
            missing -= len(packed[-1])
            epoch += 1
    return np.concatenate(packed), pack(ids(held_out))


def train(
    name: str, documents: list[str], tokenizer, schedule: Schedule, folder: Path, report: Callable[[dict], None] = print
) -> dict:
    """Train one sibling, save it as bfloat16 safetensors under folder/name, and return its card figures.

    Matrix products run in bfloat16 under autocast; weights and optimiser stay float32. A killed run goes on from its
    last complete checkpoint.
    """
    import torch
    from transformers import Trainer, TrainingArguments, set_seed

    from proxytune.experts.watch import Marks

    shape = SHAPES[name]
    set_seed(schedule.seed)
    model = new_model(shape, tokenizer, schedule.seed)
    model.set_attn_implementation("eager")  # on CPU several times faster to train through than SDPA's backward
    training, held_out = windows(documents, tokenizer, schedule)
    cuda = torch.cuda.is_available()

    def rows(array):
        return [{"input_ids": row, "labels": row} for row in torch.from_numpy(array)]

    def collate(batch):
        ids = torch.stack([row["input_ids"] for row in batch]).long()
        return {"input_ids": ids, "labels": ids}

    dataset = rows(training)

    class InOrder(Trainer):
        """The windows are already shuffled, the same for both siblings."""

        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(dataset)

    trainer = InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / f"{name}-checkpoints"),
            max_steps=schedule.steps,
            per_device_train_batch_size=schedule.batch,
            per_device_eval_batch_size=schedule.batch,
            learning_rate=schedule.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=schedule.warmup_steps,
            weight_decay=schedule.weight_decay,
            adam_beta2=0.95,
            bf16=True,
            use_cpu=not cuda,
            torch_compile=schedule.compiled,
            eval_strategy="steps",
            eval_steps=max(1, schedule.steps // 10),
            logging_steps=max(1, schedule.steps // 100),
            save_steps=max(1, schedule.steps // 10),
            dataloader_num_workers=2 if cuda else 0,
            report_to="none",
            seed=schedule.seed,
        ),
        train_dataset=dataset,
        eval_dataset=rows(held_out),
        data_collator=collate,
        callbacks=[Marks(keep=1)],
    )
    checkpoint = last_complete(folder / f"{name}-checkpoints")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    curve = [
        {key: entry[key] for key in ("step", "loss", "eval_loss") if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]
    model.to(torch.bfloat16).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    figures = {
        "name": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": schedule.steps,
        "tokens": int(training.size),
        "held_out_tokens": int(held_out.size),
        "held_out_loss": next(entry["eval_loss"] for entry in reversed(curve) if "eval_loss" in entry),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "curve": curve,
    }
    (folder / name / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    report(figures)
    return figures
