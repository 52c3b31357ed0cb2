"""A program that records three runs in one process: a full one, a short one, and one whose W&B run breaks half-way."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path

from proxytune.settings import Tracker
from proxytune.tracking import record


def start(outputs: Path, name: str) -> AbstractContextManager[record.Run]:
    return record.start(
        Tracker(name="wandb", project="tests", tags=[name]),
        outputs,
        stage="sweep",
        task="code",
        family="tiny",
        config={"method": {"train.lr": 0.1}, "alphas": [0.0, 1.0]},
        command="proxytune sweep task=code",
        group="alpha-sweep",
    )


def main(outputs: Path) -> None:
    weights = outputs / "weights"
    weights.mkdir()
    (weights / "adapter.bin").write_bytes(b"not much")
    with start(outputs, "full") as run:
        run.log({"train/loss": 2.0}, step=10)
        run.log({"train/loss": 1.5}, step=20)
        run.log({"train/loss": 1.75}, step=15)
        run.summary({"steered/loss": 1.25})
        run.table("generations", ["prompt", "text"], [["a", "b"], ["c", None]])
        run.curve("alpha", ("alpha", "loss"), [(0.0, 2.0), (1.0, 1.0)], "Loss over alpha")
        run.use("rows@f00d", "dataset", {"rows": 3})
        run.artifact("code@v3", "model", weights, {"anti": "small"}, uses=["rows@f00d"])
    with start(outputs, "short") as run:
        run.log({"other": 1})
        run.artifact("rows@f00d", "dataset", weights)
    with start(outputs, "broken") as run:
        import wandb

        wandb.run.finish()
        run.log({"after": 1})
        run.log({"after": 2})
        print("still here")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
