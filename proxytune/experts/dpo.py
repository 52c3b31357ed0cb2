"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7) by TRL's DPOTrainer.

Rows have a prompt, a chosen and a rejected reply. The reference is the model as it was when this tuning began, frozen:
for a fresh adapter the model without it, for an adapter that is tuned on a copy of it, for a whole model a copy of
that. So in a chain each iterate is held to the one before it, as iterated training wants it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from proxytune.experts import tuning
from proxytune.experts.tuning import Job
from proxytune.tasks.task import Row

SHARE_OF_RATE = 0.1  # of the family's learning rate, which is one for supervised tuning: preferences want smaller steps


def train(rows: Mapping[str, list[Row]], job: Job) -> tuple[Path, dict[str, Any]]:
    """Tune on `train` and measure on `validation`; what comes back, and what is raised, is `tuning.run`'s.

    Figures have the rewards' margins and accuracies: how far, and how often, the chosen reply gained more on the
    reference than the rejected one.
    """
    defaults = dict(job.defaults)
    if "learning_rate" in defaults:
        defaults["learning_rate"] *= SHARE_OF_RATE
    job = replace(job, defaults=defaults)
    return tuning.run(job, rows, lambda model, config, fitted: trainer(model, config, fitted, job))


def trainer(model, config, rows: Mapping[str, list[Row]], job: Job):
    from datasets import Dataset
    from trl import DPOTrainer

    keys = ("prompt", "chosen", "rejected")
    train, validation = ([{key: row[key] for key in keys} for row in rows[s]] for s in ("train", "validation"))
    whole = job.peft.name == "none" and not config.precompute_ref_log_probs
    return DPOTrainer(
        model=model,
        ref_model=job.start.merged("float32") if whole else None,  # else TRL's: the adapter off, or a copy of it
        args=config,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(validation) if validation else None,
        processing_class=job.tokenizer,
        peft_config=job.start.peft_config(job.peft),
    )
