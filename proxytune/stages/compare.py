"""Runs side by side: a table in the terminal, as Markdown or as CSV, and what it says in words."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from proxytune.errors import SettingsError
from proxytune.evaluation import compare
from proxytune.evaluation.intervals import SAMPLES
from proxytune.evaluation.summary import spoken
from proxytune.files import write_atomic

Found = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="proxytune compare", description="Runs side by side.")
    parser.add_argument(
        "runs", nargs="+", metavar="[NAME=]RUN[,RUN...]", help="a run's folder or summary.json; several are pooled"
    )
    parser.add_argument("--format", choices=list(FORMATS), default="terminal")
    parser.add_argument("--out", type=Path, help="write it there instead of to standard output")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="resamples behind each interval (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling")
    given = parser.parse_args(arguments)
    found = compare.compare([group(run) for run in given.runs], samples=given.samples, seed=given.seed)
    text = FORMATS[given.format](found)
    if given.out:
        write_atomic(given.out, text)
        print(given.out)
    else:
        print(text, end="")
    return 0


def group(given: str) -> compare.Group:
    """The runs of `NAME=RUN,RUN`; without a name they are called by their folders."""
    name, _, paths = given.rpartition("=")
    runs = [compare.read(Path(path)) for path in paths.split(",") if path]
    if not runs:
        raise SettingsError(f"{given!r} names no run", "give a folder, NAME=FOLDER or NAME=FOLDER,FOLDER")
    return compare.Group(name or "+".join(run.path.name for run in runs), runs)


def titles(level: float) -> list[str]:
    return ["run", "system", "alpha", "runs", "rows", "measure", f"value [{100 * level:g}%]", "range of runs"]


def cells(line: Mapping[str, Any]) -> list[str]:
    """One line under `titles`."""
    alphas = "/".join(f"{alpha:g}" for alpha in line["alphas"]) or "-"
    low, high = line["ci"]
    spread = f"{line['range'][0]:.3f} to {line['range'][1]:.3f}" if line["runs"] > 1 else "-"
    value = f"{line['value']:.3f} [{low:.3f}, {high:.3f}]"
    counts = (str(line["runs"]), str(line["rows"]))
    return [line["run"], line["system"], alphas, *counts, spoken(line["measure"]), value, spread]


def differences(found: Found) -> list[str]:
    """A line for each difference: how large, and McNemar's p where rows are right or wrong."""
    told = []
    for one, verdict in zip(found["differences"], found["verdicts"], strict=True):
        low, high = one["ci"]
        exact = "" if one["mcnemar"] is None else f", McNemar p = {one['mcnemar']:.3g}"
        told.append(f"{one['value']:+.3f} [{low:+.3f}, {high:+.3f}]{exact}: {verdict}")
    return told


def terminal(found: Found) -> str:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from proxytune.analysis import tables

    table = Table(title=Text(f"{found['task']}, {found['split']} rows", style="bold"), title_justify="left")
    table.box, table.pad_edge = box.SIMPLE_HEAD, False
    for name in titles(found["level"]):
        table.add_column(Text(name), justify="left" if name in ("run", "system", "measure") else "right")
    for line in found["lines"]:
        table.add_row(*map(Text, cells(line)), style=tables.STYLES[line["system"]])
    console = tables.console(sys.stdout)
    with console.capture() as captured:
        console.print(table, *map(Text, differences(found)), sep="\n")
    return captured.get()


def markdown(found: Found) -> str:
    lines = [titles(found["level"]), ["---"] * 8, *map(cells, found["lines"])]
    table = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*table, "", *(f"- {line}" for line in differences(found)), ""])


def comma_separated(found: Found) -> str:
    """Numbers in full; differences are lines of their own, named by `against`."""
    names = ["run", "system", "against_run", "against_system", "measure", "alphas", "runs", "rows", "value", "low"]
    names += ["high", "mcnemar"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for line in found["lines"]:
        low, high = line["ci"]
        writer.writerow({**line, "alphas": "/".join(map(str, line["alphas"])), "low": low, "high": high})
    for one in found["differences"]:
        sides = {f"against_{key}": value for key, value in one["against"].items()} | one["of"]
        writer.writerow({**one, **sides, "rows": one["paired_rows"], "low": one["ci"][0], "high": one["ci"][1]})
    return text.getvalue()


def as_json(found: Found) -> str:
    return json.dumps(found, allow_nan=False) + "\n"


FORMATS: Mapping[str, Callable[[Found], str]] = {
    "terminal": terminal,
    "markdown": markdown,
    "csv": comma_separated,
    "json": as_json,
}
