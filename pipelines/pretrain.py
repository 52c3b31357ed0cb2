"""Pre-train the embedded family, as shipped in data/tiny, from text that is free to use.

  proxytune pretrain out=data/tiny

Hours on a CPU. The card beside the weights says what they were trained on, and for how long.
"""

from __future__ import annotations

import sys
from typing import Any

from pipelines import cli


def run(values: dict[str, Any]) -> None:
    from proxytune.settings import Pretrain, load

    settings = load(Pretrain, values)

    from proxytune.stages import pretrain

    pretrain.run(settings)


if __name__ == "__main__":
    sys.exit(cli.main(["pretrain", *sys.argv[1:]]))
