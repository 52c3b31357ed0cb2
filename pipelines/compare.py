"""Put runs side by side: one table, paired differences, and what they say in words.

  proxytune compare outputs/runs/evaluate-a outputs/runs/evaluate-b
  proxytune compare code=RUN,RUN,RUN other=RUN,RUN --format markdown

  proxytune compare RUN RUN --tracker wandb       also as a run of its own, with its tables

Runs joined by a comma are pooled, such as the seeds of one experiment: a row that all of them have counts as one row.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines import cli
from pipelines.parser import Parser, at_least


def main(arguments: list[str]) -> int:
    parser = Parser(prog="proxytune compare", description="Runs side by side.")
    parser.add_argument(
        "runs", nargs="+", metavar="[NAME=]RUN[,RUN...]", help="a run's folder or summary.json; several are pooled"
    )
    parser.add_argument("--format", choices=["terminal", "markdown", "csv", "json"], default="terminal")
    parser.add_argument("--out", type=Path, help="write it there instead of to standard output")
    parser.add_argument(
        "--samples", type=at_least(1), default=2000, help="resamples behind each interval (%(default)s)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the resampling")
    parser.add_argument("--tracker", choices=["none", "local", "wandb"], default="none", help="also keep it as a run")
    parser.add_argument("--project", default="proxytune", help="of W&B (%(default)s)")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="the folder of such a run (%(default)s)")
    given = parser.parse_args(arguments)

    from proxytune.settings import Tracker
    from proxytune.stages import compare

    compare.run(
        given.runs,
        format=given.format,
        out=given.out,
        samples=given.samples,
        seed=given.seed,
        tracker=Tracker(name=given.tracker, project=given.project),
        outputs=given.outputs,
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["compare", *sys.argv[1:]]))
