"""Time the engine beside plain decoding and the obvious three-model loop, here and now.

  proxytune bench
  proxytune bench trio=family batch_sizes=[1,32]
  proxytune bench trio=family family=smollm2 expert=math@best

Needs no expert and no download unless they are named. Prints a table of times and ratios; takes minutes.
"""

from __future__ import annotations

import sys
from typing import Any

from pipelines import cli


def run(values: dict[str, Any]) -> None:
    from proxytune.settings import Bench, load

    settings = load(Bench, values)

    from proxytune.stages import bench

    bench.run(settings)


if __name__ == "__main__":
    sys.exit(cli.main(["bench", *sys.argv[1:]]))
