"""Answer prompts with a steered base: base + alpha * (expert - anti).

  proxytune decode expert=code@latest prompt='def area(radius):'
  proxytune decode compare=true alpha=1.5 prompts=prompts.jsonl out=answers.jsonl
  cat question.txt | proxytune decode prompts=- decode=sample decode.seed=7
  proxytune decode base=vllm base.url=http://127.0.0.1:8000 base.model=NAME prompts=prompts.jsonl

prompt= is taken as it stands, commas and quotes included; only a value that is quoted as a whole is unquoted.
"""

from __future__ import annotations

import sys
from typing import Any

from pipelines import cli, named


def run(values: dict[str, Any]) -> None:
    from proxytune.settings import DecodeStage

    settings = named.load(DecodeStage, values)

    from proxytune.stages import decode

    decode.run(settings)


if __name__ == "__main__":
    sys.exit(cli.main(["decode", *sys.argv[1:]]))
