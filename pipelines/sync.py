"""Upload runs that were tracked offline to W&B.

  proxytune sync

The record under outputs/ is the truth either way; W&B mirrors it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines import cli
from pipelines.parser import Parser


def main(arguments: list[str]) -> int:
    parser = Parser(prog="proxytune sync", description="Upload offline runs to W&B.")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where runs are kept (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="only list what waits")
    given = parser.parse_args(arguments)

    from proxytune.stages import sync

    return sync.run(given.outputs, dry_run=given.dry_run)


if __name__ == "__main__":
    sys.exit(cli.main(["sync", *sys.argv[1:]]))
