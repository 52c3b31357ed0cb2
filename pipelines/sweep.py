"""Evaluate many alphas in one pass on validation rows, and keep the best with the expert.

  proxytune sweep expert=code@latest
  proxytune sweep 'alphas=[0,0.5,1,2]' select=metric

Draws the curve, and tags the expert as @best with its alpha in the manifest.
"""

from __future__ import annotations

import sys
from typing import Any

from pipelines import cli, named


def run(values: dict[str, Any]) -> None:
    from proxytune.settings import Sweep

    settings = named.load(Sweep, values)

    from proxytune.stages import sweep

    sweep.run(settings)


if __name__ == "__main__":
    sys.exit(cli.main(["sweep", *sys.argv[1:]]))
