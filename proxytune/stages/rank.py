"""One process of a training that `launch` spreads: `python -m proxytune.stages.rank FOLDER`, started by the command.

It trains and nothing else: it has no record, no W&B and no registry. FOLDER is the training's own, with `.launch`.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from dataclasses import replace
from pathlib import Path

from proxytune.experts import ranks


def main(folder: Path) -> None:
    ranks.attend(folder)
    try:
        _train(folder)
    except BaseException as error:
        ranks.report(folder, error)
        os._exit(1)  # at once: the others may be waiting for this one


def _train(folder: Path) -> None:
    from transformers import TrainerCallback

    from proxytune.files import read_json
    from proxytune.settings import Expert, load
    from proxytune.stages import expert
    from proxytune.stages.shared.start import limit_threads

    class Steps(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            ranks.tell(folder, state.global_step, total=state.max_steps)

        def on_step_end(self, args, state, control, **kwargs):
            ranks.tell(folder, state.global_step)

    settings = load(Expert, read_json(folder / ranks.SETTINGS))
    limit_threads(settings)
    with contextlib.redirect_stderr(io.StringIO()):  # the command has said it
        prepared = replace(expert.prepare(settings), work=folder.with_suffix(""))
    if settings.launch.name in ("fsdp2", "zero3"):  # the whole model may not fit on one GPU
        start = prepared.beginning.start
        start = replace(start, ref=start.ref.model_copy(update={"device": "cpu"}))
        prepared = replace(prepared, beginning=replace(prepared.beginning, start=start))
    expert.tune(prepared, lambda values, step: ranks.tell(folder, step, values=values), callbacks=[Steps()])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
