"""What our training costs over TRL's own: the same configuration, run in turns.

    python tests/experts/training_overhead.py [turns] [steps] [sft|dpo]

Both load the embedded small model with a LoRA adapter, train on built-in rows, save checkpoints and the finished
adapter. Ours also fits rows, draws the bar, logs pace and memory, and hashes checkpoints. Processor seconds are what
counts on a busy machine; seconds by the clock are told beside them.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(turns: int = 5, steps: int = 40, name: str = "sft") -> None:
    sys.path.insert(0, str(ROOT))
    import datasets
    from transformers import PrinterCallback, set_seed

    from proxytune.experts import dpo, fields, sft
    from proxytune.experts.starting import Start, tokenizer_for
    from proxytune.experts.tuning import Job
    from proxytune.models.loading import load_model
    from proxytune.settings import Method, ModelRef, Peft
    from proxytune.tasks import preferences, qa

    module = {"sft": sft, "dpo": dpo}[name]
    splits = qa.builtin()
    rows = {split: splits[split][:400] for split in ("train", "validation")} | {"validation": splits["validation"][:32]}
    if name == "dpo":
        rows = {split: preferences.made_of(some) for split, some in rows.items()}
    ref = ModelRef(model="embedded:small")
    fixed = {"max_steps": steps, "save_steps": steps // 2, "per_device_train_batch_size": 8, "max_length": 256}
    method = Method(name=name, learning_rate=1e-3, **fixed)
    datasets.utils.logging.disable_progress_bar()

    def job(folder: Path) -> Job:
        return Job(Start(ref), tokenizer_for(ref, None, False), method, Peft(), folder)

    def ours(folder: Path) -> None:
        module.train(rows, job(folder))

    def bare(folder: Path) -> None:
        one = job(folder)
        config = fields.configure(method, folder, seed=0, evaluate=True)
        set_seed(0)
        trainer = module.trainer(load_model(ref), config, rows, one)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(str(folder / "finished"))

    def seconds(run: Callable[[Path], None]) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time(), time.monotonic()
            run(Path(folder))
            return time.process_time() - began[0], time.monotonic() - began[1]

    seconds(bare)  # imports and caches
    pairs = []
    for turn in range(turns):
        order = (bare, ours) if turn % 2 else (ours, bare)
        taken = {run: seconds(run) for run in order}
        pairs.append((taken[ours], taken[bare]))
        print(f"turn {turn + 1}: processor ours {taken[ours][0]:.2f} s, TRL {taken[bare][0]:.2f} s", flush=True)
    for place, what in enumerate(("processor", "clock")):
        ratios = [mine[place] / other[place] for mine, other in pairs]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(
            f"{name}, {steps} steps, {turns} turns: {what} seconds {statistics.median(ratios):.3f} of TRL's ({spread})"
        )


if __name__ == "__main__":
    given = sys.argv[1:]
    main(*(int(value) if value.isdigit() else value for value in given))
