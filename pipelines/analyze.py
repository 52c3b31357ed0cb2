"""What steering changed, token by token: probabilities, ranks, tokens promoted and demoted, by kind of token.

  proxytune analyze run=outputs/runs/evaluate-20260101-120000-abcd
  proxytune analyze expert=math@best task=math
  proxytune analyze expert=code@latest replies=texts.jsonl classes=code

One scoring pass of each model over replies that are written; what was scored is kept, and a killed one goes on.
"""

from __future__ import annotations

import sys
from typing import Any

from pipelines import cli


def run(values: dict[str, Any]) -> None:
    from proxytune.settings import Analyze, load

    settings = load(Analyze, values)

    from proxytune.stages import analyze

    analyze.run(settings)


if __name__ == "__main__":
    sys.exit(cli.main(["analyze", *sys.argv[1:]]))
