"""What looks on while TRL trains: the bar, the record's numbers, and the marker of each checkpoint."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from proxytune.errors import SettingsError, did_you_mean
from proxytune.experts import checkpoints, ranks

if TYPE_CHECKING:
    from rich.progress import Progress

KIB_PER_GIB, BYTES_PER_GIB = 1 << 20, 1 << 30


class Marks(TrainerCallback):
    """Each checkpoint is logged, and marked once all of it is written. keep: complete ones that stay, besides the best.

    The trainer would remove an old one before the new one is marked, so its own save_total_limit must be left out.
    """

    def __init__(self, keep: int | None):
        self.keep = keep

    def on_step_end(self, args, state, control, **kwargs):
        # With it, or a training that goes on from a checkpoint would log the means of other steps.
        control.should_log |= control.should_save

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, **kwargs):
        ranks.everyone()  # each rank writes a part of it
        if not ranks.is_main():
            return
        folder = Path(args.output_dir)
        checkpoints.mark(folder / f"checkpoint-{state.global_step}")
        if self.keep:
            best = state.best_model_checkpoint
            checkpoints.prune(folder, self.keep, Path(best) if best else None)


class Watch(Marks):
    """Numbers to the record and the bar, besides the marks.

    Tokens a second are those of training steps alone, not of evaluation and saving; memory is the most that was in use
    so far, of the GPU where there is one.
    """

    def __init__(self, log: Callable[[dict[str, float], int], None], shown: Progress, keep: int | None):
        super().__init__(keep)
        self.log, self.shown = log, shown
        self.seconds, self.tokens, self.began = 0.0, 0.0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.task = self.shown.add_task("training", total=state.max_steps, completed=state.global_step, loss="")

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control)
        self.seconds += time.monotonic() - self.began
        self.shown.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        numbers = {key: value for key, value in (logs or {}).items() if isinstance(value, (int, float))}
        named = {_named(key): value for key, value in numbers.items()}
        if "loss" in numbers:
            named |= self._pace(numbers.get("num_tokens")) | {"train/memory_gib": memory_gib()}
            self.shown.update(self.task, loss=f"loss {numbers['loss']:.3f}")
        self.log(named, state.global_step)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        name, known = args.metric_for_best_model, metrics or {}
        if name and f"eval_{name.removeprefix('eval_')}" not in known:  # the trainer would end with a KeyError
            what = f"method.metric_for_best_model={name} is nothing that is measured on validation rows"
            raise SettingsError(what, did_you_mean(name, known))

    def _pace(self, tokens: float | None) -> dict[str, float]:
        """Tokens a second since the last time; `tokens` counts from the start of the process."""
        if tokens is None or not self.seconds:
            return {}
        pace = (tokens - self.tokens) / self.seconds
        self.seconds, self.tokens = 0.0, tokens
        return {"train/tokens_per_second": pace}


def memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / BYTES_PER_GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KIB_PER_GIB


def _named(key: str) -> str:
    """The trainer's `eval_loss` and `loss` as the record's `validation/loss` and `train/loss`."""
    return f"validation/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
