"""A steered base behind the OpenAI API, with a page to see what steering does.

  proxytune serve expert=code@best
  proxytune serve expert=code@best base_model=org/name port=8000
  PROXYTUNE_API_KEY=... proxytune serve expert=code@best host=0.0.0.0

Models: base, expert, base+code@best. Beside OpenAI's fields a request has alpha and steering. The page is at /.
"""

from __future__ import annotations

import sys
from typing import Any

from pipelines import cli, named


def run(values: dict[str, Any]) -> None:
    from proxytune.settings import Serve

    settings = named.load(Serve, values)

    from proxytune.stages import serve

    serve.run(settings)


if __name__ == "__main__":
    sys.exit(cli.main(["serve", *sys.argv[1:]]))
