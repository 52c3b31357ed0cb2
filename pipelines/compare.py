"""Put runs side by side: one table, paired differences, and what they say in words.

  proxytune compare outputs/runs/evaluate-a outputs/runs/evaluate-b
  proxytune compare code=RUN,RUN,RUN other=RUN,RUN --format markdown

Runs joined by a comma are pooled, such as the seeds of one experiment: a row that all of them have counts as one row.
"""

from __future__ import annotations

import sys

from pipelines import cli


def main(arguments: list[str]) -> int:
    from proxytune.stages import compare

    return compare.main(arguments)


if __name__ == "__main__":
    sys.exit(cli.main(["compare", *sys.argv[1:]]))
