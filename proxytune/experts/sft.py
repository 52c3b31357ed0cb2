"""Supervised fine-tuning of one model on a task's rows, by TRL's SFTTrainer and PEFT.

Rows are in TRL's prompt-completion form, so the loss is on the completion only. A killed run goes on from its last
complete checkpoint: a checkpoint counts only with a marker that is written after all of its files.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.errors import SettingsError, StorageError, did_you_mean
from proxytune.files import hash_file, read_json, remove_folder, write_json
from proxytune.models.loading import load_model, load_tokenizer
from proxytune.models.quiet import quiet
from proxytune.settings import ModelRef, Peft
from proxytune.tasks.task import Row
from proxytune.tracking.progress import bar

if TYPE_CHECKING:
    from rich.progress import Progress

MARKER = "complete.json"


def train(
    rows: Mapping[str, list[Row]],
    ref: ModelRef,
    tokenizer,
    fields: Mapping[str, Any],
    peft: Peft,
    work: Path,
    *,
    seed: int,
    resume: bool,
    log: Callable[[dict[str, float], int], None],
) -> tuple[Path, dict[str, Any]]:
    """Tune the model and return (folder with the finished adapter or model and its tokenizer, training figures).

    fields: TRL's SFTConfig under its own names. work: a folder of this very job, kept until the caller removes it.
    Raises SettingsError for a field that SFTConfig does not have or refuses.
    """
    import datasets.utils
    from transformers import set_seed

    with quiet():
        config = configure(fields, work / "checkpoints", seed=seed, evaluate=bool(rows["validation"]))
    checkpoint = last_complete(work / "checkpoints") if resume else None
    if checkpoint is None:
        remove_folder(work)
    set_seed(seed)
    started = time.monotonic()
    with quiet(datasets.utils):
        model = load_model(ref, "float32")  # mixed precision is the trainer's business
        trainer = _trainer(model, config, rows, tokenizer, peft)
        with bar(note="{task.fields[loss]}", transient=False) as shown:
            trainer.add_callback(_record(log, shown))
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finished = work / "finished"
    remove_folder(finished)
    trainer.save_model(str(finished))
    tokenizer.save_pretrained(str(finished))
    _portable(finished, ref)
    history = trainer.state.log_history
    return finished, {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "loss": next((entry["loss"] for entry in reversed(history) if "loss" in entry), None),
        "validation_loss": next((entry["eval_loss"] for entry in reversed(history) if "eval_loss" in entry), None),
        "seconds": round(time.monotonic() - started, 1),
        "resumed_from": checkpoint.name if checkpoint else None,
    }


def configure(fields: Mapping[str, Any], output: Path, *, seed: int, evaluate: bool):
    """An SFTConfig from a user's fields over defaults that hold on any machine; null fields are left to TRL."""
    import torch
    from trl import SFTConfig

    known = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    given: dict[str, Any] = {key: value for key, value in fields.items() if key != "name" and value is not None}
    for key in given:
        if key not in known:
            raise SettingsError(
                f"unknown key method.{key}: TRL's SFTConfig has no such field", did_you_mean(key, known)
            )
    cuda = torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "use_cpu": not cuda,
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "gradient_checkpointing": cuda,
        "report_to": "none",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "eval_strategy": "epoch" if evaluate else "no",
        "logging_steps": 10,
        "seed": seed,
        "data_seed": seed,
        "dataset_num_proc": None,
        "disable_tqdm": True,  # the bar is ours
    }
    if given.get("save_steps") is not None:
        defaults["save_strategy"] = "steps"
    try:
        return SFTConfig(output_dir=str(output), **(defaults | given))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"method: {error}", "see TRL's SFTConfig for the fields and their values") from error


def last_complete(folder: Path) -> Path | None:
    """The newest checkpoint whose marker agrees with its files; broken ones are removed."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in checkpoints:
        if _is_complete(checkpoint):
            return checkpoint
        remove_folder(checkpoint)
    return None


def _is_complete(checkpoint: Path) -> bool:
    try:
        marked = read_json(checkpoint / MARKER)
        return all(hash_file(checkpoint / name) == digest for name, digest in marked.items())
    except (FileNotFoundError, StorageError):
        return False


def _trainer(model, config, rows: Mapping[str, list[Row]], tokenizer, peft: Peft):
    """TRL's trainer without the bars and printed dictionaries that transformers adds by itself."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTTrainer

    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([_pair(row) for row in rows["train"]]),
        eval_dataset=Dataset.from_list([_pair(row) for row in rows["validation"]]) if rows["validation"] else None,
        processing_class=tokenizer,
        peft_config=_adapter(peft),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _record(log: Callable[[dict[str, float], int], None], shown: Progress):
    from transformers import TrainerCallback

    class Record(TrainerCallback):
        """Numbers to the record and the bar; a marker into each checkpoint once everything else of it is written."""

        def on_train_begin(self, args, state, control, **kwargs):
            self.task = shown.add_task("training", total=state.max_steps, completed=state.global_step, loss="")

        def on_step_end(self, args, state, control, **kwargs):
            shown.update(self.task, completed=state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            numbers = {key: value for key, value in (logs or {}).items() if isinstance(value, (int, float))}
            log({_named(key): value for key, value in numbers.items()}, state.global_step)
            if "loss" in numbers:
                shown.update(self.task, loss=f"loss {numbers['loss']:.3f}")

        def on_save(self, args, state, control, **kwargs):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MARKER]
            write_json(folder / MARKER, {str(file.relative_to(folder)): hash_file(file) for file in files})

    return Record()


def _named(key: str) -> str:
    """The trainer's `eval_loss` and `loss` as the record's `validation/loss` and `train/loss`."""
    return f"validation/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"


def _adapter(peft: Peft):
    if peft.name == "none":
        return None
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **peft.model_dump(exclude={"name"}))


def _pair(row: Row) -> dict[str, Any]:
    return {"prompt": row["prompt"], "completion": row["completion"]}


def _portable(folder: Path, ref: ModelRef) -> None:
    """Name the adapter's base as the user did, not by this machine's path; drop the trainer's leftovers."""
    for leftover in ("training_args.bin", "README.md"):
        (folder / leftover).unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    if path.is_file():
        config = json.loads(path.read_text("utf-8"))
        write_json(path, config | {"base_model_name_or_path": ref.model, "revision": ref.revision})


def tokenizer_for(ref: ModelRef, chat_template: str | None, chat: bool):
    """The model's tokenizer, with the family's chat template where the rows are messages and it has none of its own."""
    tokenizer = load_tokenizer(ref)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not chat or (tokenizer.chat_template and not chat_template):
        return tokenizer
    if chat_template is None:
        raise SettingsError(
            f"{ref.model} has no chat template and the task's rows are messages",
            "set family.chat_template to a model that has one, or to a .jinja file",
        )
    path = Path(chat_template)
    tokenizer.chat_template = (
        path.read_text("utf-8") if path.is_file() else load_tokenizer(ModelRef(model=chat_template)).chat_template
    )
    return tokenizer
