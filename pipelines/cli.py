"""The `proxytune` command: finds the stage, answers --help without heavy imports, and turns what is raised into a line.

`proxytune expert alpha=1` and `python -m pipelines.expert alpha=1` both end up in `main`.
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from types import ModuleType

from pipelines import exits
from proxytune.errors import SettingsError, did_you_mean

# In the order in which one meets them. Each is a module beside this one: its docstring is its help.
STAGES = (
    "demo",
    "expert",
    "doctor",
    "decode",
    "serve",
    "evaluate",
    "sweep",
    "analyze",
    "report",
    "score",
    "compare",
    "registry",
    "sync",
    "twin",
    "bench",
    "pretrain",
)
HELP = ("-h", "--help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; errors of the user's are told on stderr in one line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = dispatch(arguments)
        sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt) as error:
        code = exits.of(error).tell()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # The reader has gone, or the disk is full. Python flushes once more on its way out, which must go nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def dispatch(arguments: list[str]) -> int:
    from pipelines import guide

    if not arguments or arguments[0] in HELP:
        print(guide.stages(STAGES))
        return 0
    if arguments[0] == "--version":
        print(guide.version())
        return 0
    name, *rest = arguments
    stage = module(name)
    if hasattr(stage, "main"):  # a plain command, with options of its own
        return stage.main(rest)
    if any(argument in HELP for argument in rest):
        print(guide.stage(name))
        return 0

    from pipelines import launch

    return launch.launch(name, rest, command=shlex.join(["proxytune", *arguments]))


def module(name: str) -> ModuleType:
    if name not in STAGES:
        raise SettingsError(f"no stage {name!r}", did_you_mean(name, STAGES))
    return importlib.import_module(f"pipelines.{name}")


if __name__ == "__main__":
    sys.exit(main())
