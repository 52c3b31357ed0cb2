"""Upload runs that were tracked offline to W&B.

  proxytune sync

The record under outputs/ is the truth either way; W&B mirrors it.
"""

from __future__ import annotations

import sys

from pipelines import cli


def main(arguments: list[str]) -> int:
    from proxytune.stages import sync

    return sync.main(arguments)


if __name__ == "__main__":
    sys.exit(cli.main(["sync", *sys.argv[1:]]))
