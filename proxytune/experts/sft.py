"""Supervised fine-tuning by TRL's SFTTrainer: rows are prompt and completion, the loss is on the completion only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxytune.experts import tuning
from proxytune.experts.tuning import Job
from proxytune.tasks.task import Row


def train(rows: Mapping[str, list[Row]], job: Job) -> tuple[Path, dict[str, Any]]:
    """Tune on `train` and measure on `validation`; what comes back, and what is raised, is `tuning.run`'s."""
    return tuning.run(job, rows, lambda model, config, fitted: trainer(model, config, fitted, job))


def trainer(model, config, rows: Mapping[str, list[Row]], job: Job):
    from datasets import Dataset
    from trl import SFTTrainer

    train, validation = (
        [{key: row[key] for key in ("prompt", "completion")} for row in rows[s]] for s in ("train", "validation")
    )
    return SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(validation) if validation else None,
        processing_class=job.tokenizer,
        peft_config=job.start.peft_config(job.peft),
    )
