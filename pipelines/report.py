"""One HTML file of what a run found: tables, curves, every token's probabilities, and how it was made.

  proxytune report outputs/runs/evaluate-20260101-120000-abcd
  proxytune report outputs/sweeps/math-tiny-0123456789ab --out report.html

The file needs no network. Tokens are scored first where that was not done; --no-tokens leaves the models alone.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from pipelines import cli
from pipelines.parser import Parser, at_least


def main(arguments: list[str]) -> int:
    parser = Parser(prog="proxytune report", description="One HTML file of what a run found.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder of evaluate, sweep or decode")
    parser.add_argument("--out", type=Path, help="write it there instead of to RUN/report.html")
    parser.add_argument(
        "--generations", type=at_least(0), default=500, metavar="N", help="prompts at most (%(default)s)"
    )
    parser.add_argument("--no-tokens", action="store_true", help="load no model: score no tokens that were not scored")
    parser.add_argument("--tracker", choices=["none", "local", "wandb"], help="instead of the run's own")
    given = parser.parse_args(arguments)

    from proxytune.stages import report

    report.run(
        given.run,
        out=given.out,
        generations=given.generations,
        tokens=not given.no_tokens,
        tracker=given.tracker,
        command=shlex.join(["proxytune", "report", *arguments]),
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["report", *sys.argv[1:]]))
