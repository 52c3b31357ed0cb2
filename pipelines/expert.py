"""Tune the small model of a family on a task, and register it as an expert.

  proxytune expert task=code family=tiny
  proxytune expert task=math model=base            the directly tuned base, the ceiling that evaluate compares with
  proxytune expert task=qa method.learning_rate=1e-4 peft=none

A run that was killed goes on from its last whole checkpoint when the same command is given again.
"""

from __future__ import annotations

import sys
from typing import Any

from pipelines import cli


def run(values: dict[str, Any]) -> None:
    from proxytune.settings import Expert, load

    settings = load(Expert, values)

    from proxytune.stages import expert

    expert.run(settings)


if __name__ == "__main__":
    sys.exit(cli.main(["expert", *sys.argv[1:]]))
