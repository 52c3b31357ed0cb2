"""Runs side by side: a table in the terminal, as Markdown or as CSV, and what it says in words."""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from proxytune.errors import SettingsError
from proxytune.evaluation import compare
from proxytune.evaluation.intervals import SAMPLES
from proxytune.evaluation.summary import spoken
from proxytune.files import check_target, write_atomic, write_json
from proxytune.settings import Tracker
from proxytune.tracking import record

Found = Mapping[str, Any]


def run(
    runs: Sequence[str],
    *,
    format: str = "terminal",
    out: Path | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    tracker: Tracker | None = None,
    outputs: Path = Path("outputs"),
) -> Found:
    """Compare, and print or write it; with a tracker other than `none`, keep it as a run of its own below outputs."""
    if out:
        check_target(out)
    groups = [group(given) for given in runs]
    found = compare.compare(groups, samples=samples, seed=seed)
    if tracker is not None and tracker.name != "none":
        keep(groups, found, tracker, outputs)
    text = FORMATS[format](found)
    if out:
        write_atomic(out, text)
        print(out)
    else:
        print(text, end="")
    return found


def group(given: str) -> compare.Group:
    """The runs of `NAME=RUN,RUN`; without a name they are called by their folders."""
    name, _, paths = given.rpartition("=")
    runs = [compare.read(Path(path)) for path in paths.split(",") if path]
    if not runs:
        raise SettingsError(f"{given!r} names no run", "give a folder, NAME=FOLDER or NAME=FOLDER,FOLDER")
    return compare.Group(name or "+".join(run.path.name for run in runs), runs)


def keep(groups: Sequence[compare.Group], found: Found, tracker: Tracker, outputs: Path) -> None:
    """The comparison as a run of its own, in the record and in W&B: tables, numbers, and what they were made from."""
    families = sorted({run.summary["family"] for group in groups for run in group.runs})
    runs = {group.name: [str(run.path) for run in group.runs] for group in groups}
    command = shlex.join(["proxytune", "compare", *(f"{name}={','.join(paths)}" for name, paths in runs.items())])
    config = {"runs": runs, "task": found["task"], "split": found["split"], "level": found["level"]}
    described = {"stage": "compare", "task": found["task"], "family": "+".join(families), "command": command}
    with record.start(tracker, outputs, config=config, **described) as tracked:
        write_json(tracked.folder / "comparison.json", found)
        tracked.table("comparison", titles(found["level"]), [cells(line) for line in found["lines"]])
        tracked.table("differences", ["difference"], [[line] for line in below(found)])
        for line in found["lines"]:
            tracked.summary({f"{line['run']}/{line['system']}/{line['measure']}": line["value"]})
        for one in found["differences"]:
            of, against = ("/".join(one[side].values()) for side in ("of", "against"))
            tracked.summary({f"{of} - {against}/{one['measure']}": {"value": one["value"], "ci": one["ci"]}})
        tracked.artifact("comparison", "result", tracked.folder / "comparison.json")
        print(f"proxytune: kept as {tracked.folder}", file=sys.stderr)


def titles(level: float) -> list[str]:
    return [
        "run",
        "system",
        "alpha",
        "runs",
        "rows",
        "unparsed",
        "measure",
        f"value [{100 * level:g}%]",
        "range of runs",
    ]


def cells(line: Mapping[str, Any]) -> list[str]:
    """One line under `titles`."""
    alphas = "/".join(f"{alpha:g}" for alpha in line["alphas"]) or "-"
    low, high = line["ci"]
    spread = f"{line['range'][0]:.3f} to {line['range'][1]:.3f}" if line["runs"] > 1 else "-"
    value = f"{line['value']:.3f} [{low:.3f}, {high:.3f}]"
    unparsed = "-" if line["unparsed"] is None else str(line["unparsed"])
    counts = (str(line["runs"]), str(line["rows"]), unparsed)
    return [line["run"], line["system"], alphas, *counts, spoken(line["measure"]), value, spread]


def below(found: Found) -> list[str]:
    """A line for each difference: how large, and McNemar's p where rows are right or wrong; then the gaps closed."""
    from proxytune.analysis import tables

    told = []
    for one, verdict in zip(found["differences"], found["verdicts"], strict=True):
        low, high = one["ci"]
        exact = "" if one["mcnemar"] is None else f", McNemar p = {one['mcnemar']:.3g}"
        told.append(f"{one['value']:+.3f} [{low:+.3f}, {high:+.3f}]{exact}: {verdict}")
    gaps = [(gap["run"], tables.gap_told(spoken(gap["measure"]), gap)) for gap in found["gaps_closed"]]
    return told + [f"Gap to tuned closed by steered of {run}: {gap}." for run, gap in gaps]


def terminal(found: Found) -> str:
    from rich.text import Text

    from proxytune.analysis import tables

    table = tables.tight(title=Text(f"{found['task']}, {found['split']} rows", style="bold"), title_justify="left")
    for name in titles(found["level"]):
        two_lines = name.replace(" [", "\n[").replace(" of ", "\nof ")
        table.add_column(Text(two_lines), justify="left" if name in ("run", "system", "measure") else "right")
    for line in found["lines"]:
        table.add_row(*map(Text, cells(line)), style=tables.STYLES[line["system"]])
    console = tables.console(sys.stdout)
    with console.capture() as captured:
        console.print(table, *map(Text, below(found)), sep="\n")
    return captured.get()


def markdown(found: Found) -> str:
    lines = [titles(found["level"]), ["---"] * len(titles(found["level"])), *map(cells, found["lines"])]
    table = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*table, "", *(f"- {line}" for line in below(found)), ""])


def comma_separated(found: Found) -> str:
    """Numbers in full; differences are lines of their own, named by `against`, and so are gaps closed, as a system."""
    names = ["run", "system", "against_run", "against_system", "measure", "alphas", "runs", "rows", "unparsed", "value"]
    names += ["low", "high", "mcnemar"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for line in found["lines"]:
        low, high = line["ci"]
        writer.writerow({**line, "alphas": "/".join(map(str, line["alphas"])), "low": low, "high": high})
    for one in found["differences"]:
        sides = {f"against_{key}": value for key, value in one["against"].items()} | one["of"]
        writer.writerow({**one, **sides, "rows": one["paired_rows"], "low": one["ci"][0], "high": one["ci"][1]})
    for gap in found["gaps_closed"]:
        writer.writerow({**gap, "system": "gap closed", "low": gap["ci"][0], "high": gap["ci"][1]})
    return text.getvalue()


def as_json(found: Found) -> str:
    return json.dumps(found, allow_nan=False) + "\n"


FORMATS: Mapping[str, Callable[[Found], str]] = {
    "terminal": terminal,
    "markdown": markdown,
    "csv": comma_separated,
    "json": as_json,
}
