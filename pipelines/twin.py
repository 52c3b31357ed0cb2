"""Make a small sibling of a base that has none: its most influential layers, healed by distillation on your text.

  proxytune twin base=org/name layers=10 'text=[text.txt,rows.jsonl]'
  proxytune expert family=mine family.small.model=outputs/twins/name-10-layers

The twin is a plain model folder with the base's own tokenizer; twin.json beside the weights says how it was made.
"""

from __future__ import annotations

import re
import shlex
import sys
from typing import Any

from pipelines import cli


def run(values: dict[str, Any]) -> None:
    from proxytune.settings import Twin, load

    settings = load(Twin, values)

    from proxytune.stages import twin

    twin.run(settings)


def main(arguments: list[str]) -> int:
    """Take `base=org/name` for base.model: a bare `base` is, to Hydra, the group of bases behind a server."""
    from pipelines import guide, launch

    if any(argument in cli.HELP for argument in arguments):
        print(guide.stage("twin"))
        return 0
    overrides = [re.sub(r"^base=(?!{)", "base.model=", argument) for argument in arguments]
    return launch.launch("twin", overrides, command=shlex.join(["proxytune", "twin", *arguments]))


if __name__ == "__main__":
    sys.exit(cli.main(["twin", *sys.argv[1:]]))
