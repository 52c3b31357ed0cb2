"""Tune the small model of a family on a task, and register it as an expert.

  proxytune expert task=code family=tiny
  proxytune expert task=math model=base            the directly tuned base, the ceiling that evaluate compares with
  proxytune expert task=qa method.learning_rate=1e-4 peft=none
  proxytune expert task=code method=dpo from=code@latest      a registered expert tuned on, by preferences
  proxytune expert task=math method=self_rewarding method.prompts=rows method.judge.by=task    rounds of its own answers
  proxytune expert --from-manifest code@v3                    the recipe of a registered expert once more

A run that was killed goes on from its last whole checkpoint when the same command is given again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pipelines import cli
from proxytune.errors import SettingsError


def run(values: dict[str, Any]) -> None:
    from proxytune.settings import Expert, load

    settings = load(Expert, values)

    from proxytune.stages import expert

    expert.run(settings)


def reproduce(reference: str, overrides: list[str], command: str) -> int:
    """`--from-manifest`: settings come from a registered expert's manifest and not from conf/."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        changes: Any = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    except (YAMLError, OmegaConfBaseException) as error:
        raise SettingsError(f"cannot read {' '.join(overrides)!r}", "give key=value with plain values") from error

    from proxytune.experts.registry import Registry

    outputs = Path(str(changes.get("outputs", "outputs")))
    Registry(outputs / "registry").resolve(reference)  # before anything slow is imported, as in named.py

    from proxytune.stages import reproduce

    reproduce.run(reference, changes, command)
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["expert", *sys.argv[1:]]))
