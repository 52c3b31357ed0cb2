"""The whole job in one go: tune an expert, decode side by side, sweep alpha, evaluate, draw the picture.

  proxytune demo
  proxytune demo task=math seed=1

Runs on the embedded family without a network. Ends with the table, and with the path of what it wrote.
"""

from __future__ import annotations

import sys
from typing import Any

from pipelines import cli


def run(values: dict[str, Any]) -> None:
    from proxytune.settings import Demo, load

    settings = load(Demo, values)

    from proxytune.stages import demo

    demo.run(settings)


if __name__ == "__main__":
    sys.exit(cli.main(["demo", *sys.argv[1:]]))
