"""Score a file of outputs, made by anyone, by a benchmark's published definition.

  proxytune score benchmark=gsm8k predictions=outputs.jsonl
  proxytune score benchmark=gsm8k predictions=outputs.jsonl benchmark.rows=test.jsonl fields.output=reply
  proxytune score benchmark=humaneval predictions=samples.jsonl benchmark.allow_code=true
  proxytune score benchmark=alpaca_farm predictions=annotations.json

A table with counts and 95% intervals goes to standard error; the last line of standard output is one JSON object.
Measures are shares of 1: a published win rate of 83.35 is 0.8335 here. An output that is null counts as an empty one.
"""

from __future__ import annotations

import sys
from typing import Any

from pipelines import cli


def run(values: dict[str, Any]) -> None:
    from proxytune.settings import Score, load

    settings = load(Score, values)

    from proxytune.stages import score

    score.run(settings)


if __name__ == "__main__":
    sys.exit(cli.main(["score", *sys.argv[1:]]))
