"""A run of one of TRL's trainers: rows fitted first, a kill costs the steps since the last complete checkpoint."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxytune.errors import SettingsError, StorageError
from proxytune.experts import lengths, ranks, turns
from proxytune.experts.checkpoints import is_complete, last_complete, mark
from proxytune.experts.fields import configure
from proxytune.experts.starting import Start, check_peft
from proxytune.files import read_json, remove_folder, write_json
from proxytune.models.loading import load_model
from proxytune.models.quiet import quiet
from proxytune.settings import Method, ModelRef, Peft
from proxytune.tasks.task import Row
from proxytune.tracking.progress import bar


@dataclass(frozen=True)
class Job:
    """One tuning. work: a folder of this very job, kept until the caller removes it.

    defaults: fields of the trainer where the method leaves them open (the family's). log: gets numbers and their step.
    callbacks: further ones for the trainer.
    """

    start: Start
    tokenizer: Any
    method: Method
    peft: Peft
    work: Path
    seed: int = 0
    resume: bool = True
    log: Callable[[dict[str, float], int], None] = lambda values, step: None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Sequence[Any] = ()


def run(
    job: Job,
    rows: Mapping[str, list[Row]],
    trainer_of: Callable[[Any, Any, dict[str, list[Row]]], Any],
) -> tuple[Path, dict[str, Any]]:
    """Tune, and return (folder with the finished adapter or model and its tokenizer, training figures).

    rows: `train` and `validation`. trainer_of(model, config, rows) makes its trainer.
    Raises SettingsError for a field that TRL does not have or refuses, DataError for rows that do not fit, before
    training starts.
    """
    import datasets.utils
    from transformers import set_seed

    check_peft(job.peft)
    finished = job.work / "finished"
    with quiet():
        config = configure(
            job.method, job.work / "checkpoints", seed=job.seed, evaluate=bool(rows["validation"]),
            defaults=job.defaults,
        )  # fmt: skip
    asked = turns.as_taken(rows, job.tokenizer)
    fitted, counts = lengths.fit(asked, job.tokenizer, config.max_length, job.method.too_long)
    for line in lengths.told(counts, config.max_length):
        print(f"proxytune: {line}", file=sys.stderr)
    if job.resume and (done := finished_in(job.work)):
        return done
    with ranks.main_first():
        checkpoint = last_complete(job.work / "checkpoints") if job.resume else None
        if checkpoint is None and ranks.is_main():
            remove_folder(job.work)
    set_seed(job.seed)
    started = time.monotonic()
    with quiet(datasets.utils):
        with _refusals(type(config)):
            trainer = trainer_of(job.start.model(job.peft), config, fitted)
        with bar(note="{task.fields[loss]}", transient=False) as shown:
            _look_on(trainer, job, shown)
            if checkpoint is None or not _ended(trainer, checkpoint):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                _check_best(trainer)
            elif _unmeasured(trainer):
                trainer.evaluate()
        _save(trainer, job, finished)
    if not ranks.is_main():
        return finished, {}
    figures = _figures(trainer) | {
        "seconds": round(time.monotonic() - started, 1),
        "resumed_from": checkpoint.name if checkpoint else None,
        **({"too_long": counts} if counts else {}),
    }
    write_json(job.work / "figures.json", figures, checked=True)
    mark(finished, job.work / "finished.json")
    return finished, figures


def finished_in(work: Path) -> tuple[Path, dict[str, Any]] | None:
    """What a training had finished in its folder before it could be taken away."""
    finished = work / "finished"
    return (finished, read_json(work / "figures.json")) if is_complete(finished, work / "finished.json") else None


def _look_on(trainer, job: Job, shown) -> None:
    """Our bar and record instead of what transformers prints by itself, and early stopping where it is asked for."""
    from transformers import EarlyStoppingCallback, PrinterCallback

    from proxytune.experts.watch import Watch

    trainer.remove_callback(PrinterCallback)
    if job.method.early_stopping_patience:
        patience, threshold = job.method.early_stopping_patience, job.method.early_stopping_threshold
        trainer.add_callback(EarlyStoppingCallback(patience, threshold))
    # The trainer would remove an old checkpoint before the new one is marked, so that is left to the callback.
    trainer.add_callback(Watch(job.log, shown, keep=trainer.args.save_total_limit))
    trainer.args.save_total_limit = None
    for callback in job.callbacks:
        trainer.add_callback(callback)


def _ended(trainer, checkpoint: Path) -> bool:
    """Whether training had come to its end in this checkpoint; then the trainer has the state and weights that counted.

    The trainer itself would take one more step before it saw that.
    """
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if not state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
        return False
    trainer.state = state
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(str(checkpoint.with_name(Path(best).name) if best else checkpoint))
    return True


def _check_best(trainer) -> None:
    """StorageError where the checkpoint that the trainer loaded as the best one is not what it had saved."""
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    if best and not is_complete(Path(best)):
        raise StorageError(f"{best}, the best checkpoint, is damaged", "run it again: it goes on from one before")


def _unmeasured(trainer) -> bool:
    """Whether the kill came between the last checkpoint and the evaluation at the end of its epoch."""
    state = trainer.state
    found = any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
    return trainer.args.eval_strategy == "epoch" and not found


def _save(trainer, job: Job, finished: Path) -> None:
    """The finished model with its tokenizer, nothing of the trainer's in it, its base named as the user did."""
    if ranks.is_main():
        remove_folder(finished)
    ranks.everyone()
    trainer.save_model(str(finished))
    ranks.everyone()
    if not ranks.is_main():
        return
    remove_folder(finished / "ref")  # the frozen adapter of DPO
    if job.start.kind(job.peft) == "full":
        if job.peft.name != "none":
            _write_again(load_model(ModelRef(model=str(job.start.folder)), "auto", adapter=finished), job, finished)
        elif trainer.is_fsdp_enabled:  # it writes a head that is tied to the embedding as a matrix of its own
            _write_again(load_model(ModelRef(model=str(finished), device="cpu")), job, finished)
    for leftover in ("training_args.bin", "README.md"):
        (finished / leftover).unlink(missing_ok=True)
    path = finished / "adapter_config.json"
    if path.is_file():
        ref = job.start.ref
        config = json.loads(path.read_text("utf-8"))
        write_json(path, config | {"base_model_name_or_path": ref.model, "revision": ref.revision})


def _write_again(model, job: Job, folder: Path) -> None:
    """One plain model in place of what the trainer had written."""
    remove_folder(folder)
    model.save_pretrained(folder)
    job.tokenizer.save_pretrained(str(folder))


def _figures(trainer) -> dict[str, Any]:
    """What is measured on validation rows is that of the weights that are kept: the best ones, or else the last."""
    state, history = trainer.state, trainer.state.log_history
    best = trainer.args.load_best_model_at_end
    kept = [entry for entry in history if not best or entry["step"] == state.best_global_step]
    found = {
        "steps": state.global_step,
        "epochs": state.epoch,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "loss": _last(history, "loss"),
        "validation_loss": _last(kept, "eval_loss"),
    }
    if best:
        found |= {"best_step": state.best_global_step, "stopped_early": state.global_step < state.max_steps}
    for name in ("rewards/margins", "rewards/accuracies"):
        if _last(history, name) is not None:
            found |= {name: _last(history, name), f"validation_{name}": _last(kept, f"eval_{name}")}
    return found


def _last(history: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return next((entry[name] for entry in reversed(history) if name in entry), None)


@contextlib.contextmanager
def _refusals(kind: type) -> Generator[None]:
    """What TRL says of fields that do not go together, in one line."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        what = str(error).partition("\n")[0]
        raise SettingsError(f"method: {what}", f"see TRL's {kind.__name__} for the fields and their values") from error
