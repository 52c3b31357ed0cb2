"""What would go wrong, in seconds: lineage, vocabulary, ends, prompts as each model reads them, memory, the server.

  proxytune doctor expert=code@best
  proxytune doctor base=vllm base.url=http://127.0.0.1:8000 base.model=NAME
  proxytune doctor effect=true rows=50             does expert - anti help here, at which alpha, and if not, why

The exit code is that of the first fault: 3 data, 4 model or server, 5 trio, 6 registry; 0 where there is none.
"""

from __future__ import annotations

import sys
from typing import Any

from pipelines import cli


def run(values: dict[str, Any]) -> None:
    from proxytune.settings import Doctor, load

    settings = load(Doctor, values)

    from proxytune.stages import doctor

    doctor.run(settings)


if __name__ == "__main__":
    sys.exit(cli.main(["doctor", *sys.argv[1:]]))
