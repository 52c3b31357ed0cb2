"""What `--help` prints. Reads docstrings and YAML as text, so that it costs no Hydra and no torch.

The comments in a stage's root YAML are the documentation of its keys; there is no second list to keep in step.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator

from proxytune import __doc__ as summary
from proxytune import __version__
from proxytune.files import resource

LAUNCHERS = ("basic", "joblib", "submitit_local", "submitit_slurm")
FOOTER = """\
More
  key=value              change a setting; key=[a,b] gives a list, 'key="a, b"' a text with commas
  group=choice           take another file of a group; +key=value adds a key that is not listed
  -m, --multirun         run once for each value of key=a,b,c (hydra/launcher=joblib: several at a time)
  --cfg job [--resolve]  print the settings instead of running
  --config-dir FOLDER    groups of your own: FOLDER/family/mine.yaml makes family=mine work
  --hydra-help           Hydra's own options"""


def version() -> str:
    return f"proxytune {__version__}"


def stages(names: Iterable[str]) -> str:
    """The list of stages with the first line of each one's docstring."""
    rows = [f"  {name:<10} {_docstring(name).splitlines()[0]}" for name in names]
    usage = "usage: proxytune <stage> [key=value ...]     proxytune <stage> --help"
    return "\n".join([version() + ": " + (summary or ""), "", usage, "", *rows])


def stage(name: str) -> str:
    """Docstring, root YAML, groups with their choices, and what Hydra adds."""
    root = (resource("conf") / f"{name}.yaml").read_text("utf-8").strip()
    parts = [
        f"usage: proxytune {name} [key=value ...]",
        _docstring(name),
        f"Settings (conf/{name}.yaml)",
        _indent(root),
        "Groups (a choice's own keys: conf/<group>/<choice>.yaml, or --cfg job)",
        _indent("\n".join(_groups(root))),
        FOOTER,
    ]
    return "\n\n".join(parts)


def _docstring(name: str) -> str:
    return (importlib.import_module(f"pipelines.{name}").__doc__ or "").strip()


def _groups(root: str) -> Iterator[str]:
    for group, default in re.findall(r"^  - ([\w/]+): ([\w.-]+)", root, flags=re.MULTILINE):
        if group != "hydra":
            choices = sorted(path.stem for path in (resource("conf") / group).glob("*.yaml"))
            yield f"{group:<16}{', '.join(choices)}" + ("" if default == "null" else f"  (default {default})")
    yield f"{'hydra/launcher':<16}{', '.join(LAUNCHERS)}  (default basic; the others: proxytune[launchers])"


def _indent(text: str) -> str:
    return "\n".join("  " + line if line else "" for line in text.splitlines())
