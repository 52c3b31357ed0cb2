"""What a stage found, in the terminal: `console().print(evaluation(summary))`; and as Markdown for docs/results.md.

A summary is the content of `summary.json` (evaluation/summary.py). Whatever comes from rows or models is put into
`Text`, never into markup, so brackets in it stay what they are.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Mapping
from typing import Any, TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from proxytune.evaluation.summary import spoken

STYLES = {"base": "bright_black", "expert": "yellow", "steered": "cyan", "tuned": "green"}
PLAIN_WIDTH = 120
PANEL_WIDTH = 36  # panels narrower than this read better one below the other
BEST = "best"
CHOSEN_HERE = "Alpha was chosen on these very rows: on others expect a little less."

Summary = Mapping[str, Any]


def console(file: TextIO | None = None) -> Console:
    """Colour and the window's width on a terminal; plain text, 120 wide, in a file or a pipe."""
    file = file or sys.stdout
    if file.isatty():
        return Console(file=file, highlight=False)
    return Console(file=file, highlight=False, width=PLAIN_WIDTH, color_system=None, force_terminal=False)


def evaluation(summary: Summary) -> RenderableType:
    """All systems, what steering changed with paired intervals, the gap closed, and the verdict."""
    return _page(summary, best=None)


def sweep(summary: Summary) -> RenderableType:
    """The same with one line for each alpha, the chosen one marked."""
    return _page(summary, best=summary["chosen"])


def measures(summary: Summary) -> RenderableType:
    """Every measure of a benchmark for each system: over how many rows, how many outputs could not be parsed."""
    table = tight()
    for name in ("system", "alpha", "measure", "over", "unparsed", f"value [{100 * summary['level']:g}%]"):
        table.add_column(name, justify="left" if name in ("system", "measure") else "right")
    for row in summary["rows"]:
        alpha = "-" if row["alpha"] is None else f"{row['alpha']:g}"
        for name, one in row["measures"].items():
            told = (row["system"], alpha, spoken(name), f"{one['over']:g}", str(row.get("unparsed", "-")))
            table.add_row(*map(Text, told), Text(with_interval(one["value"], one["ci"])), style=STYLES[row["system"]])
    return table


def bench(found: Mapping[str, Any]) -> RenderableType:
    """Times of a bench, each beside what it is compared with."""
    table = Table(title=f"{found['trio']}, {found['device']}, {found['threads']} thread(s)", box=box.SIMPLE)
    for name in ("", "seconds", "speed", "of", "accepted"):
        table.add_column(name, justify="left" if name in ("", "of") else "right")
    for row in found["rows"]:
        beside = ("", "") if row["beside"] == row["name"] else (f"{row['ratio']:.2f}x", row["beside"])
        accepted = f"{row['acceptance']:.0%}" if "acceptance" in row else ""
        table.add_row(row["name"], f"{row['seconds']:.3f}", *beside, accepted)
    flips = found["flips"]
    told = f"likeliest token changed by reading 5 positions at once: {flips['changed']} of {flips['positions']}"
    return Group(table, Text(told))


def generations(
    prompt: str, texts: Mapping[str, str], width: int = PLAIN_WIDTH, lines: int | None = None
) -> RenderableType:
    """What each system wrote to one prompt: side by side where `width` columns allow, else one below the other.

    lines: of each text no more than so many, and how many are left out.
    """
    panels = [_panel(system, _first(text, lines), STYLES.get(system, "")) for system, text in texts.items()]
    asked = _panel("prompt", prompt)
    if width < PANEL_WIDTH * len(panels):
        return Group(asked, *panels)
    row = Table.grid(expand=True)
    for _ in panels:
        row.add_column(ratio=1)
    row.add_row(*panels)
    return Group(asked, row)


def markdown(summary: Summary) -> str:
    """The evaluation or sweep as a Markdown table, its differences and the verdict."""
    titles = _titles(summary)
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for row in summary["rows"]:
        cells = _cells(row, summary)
        lines.append([f"**{cell}**" for cell in cells] if _is_best(row, summary["chosen"]) else cells)
    table = ["| " + " | ".join(line) + " |" for line in lines]
    below = [f"- {line}" for line in _lines(summary)]
    return "\n".join([*table, "", *below, "", summary["verdict"], ""])


def gap_line(summary: Summary) -> str:
    """How much of the way from base to tuned was gone, and where that cannot be said; empty without a tuned base."""
    gaps = summary["gap_closed"]
    told = [gap_told(spoken_name, gaps[name]) for name, spoken_name in spoken_measures(summary).items() if name in gaps]
    return f"Gap to tuned closed: {'; '.join(told)}." if told else ""


def gap_told(measure: str, gap: Mapping[str, Any]) -> str:
    if gap.get("backwards"):
        return f"{measure} none: tuned is worse than base"
    note = ", unstable: base and tuned cannot be told apart" if gap["unstable"] else ""
    return f"{measure} {with_interval(gap['value'], gap['ci'], '.0%')}{note}"


def spoken_measures(summary: Summary) -> dict[str, str]:
    """What loss and metric are called before people, as far as they were measured."""
    names = {"loss": "loss", "metric": spoken(summary["rows"][0]["metric_name"]) or "metric"}
    return {name: told for name, told in names.items() if any(row[name] is not None for row in summary["rows"])}


def tight(**how: Any) -> Table:
    """A table whose usual rows fit 100 columns."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), **how)


def visible(text: str) -> str:
    """A model's text with control characters and halves of characters spelled out: it must not drive the terminal."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs") else ascii(char)[1:-1] for char in text
    )


def _page(summary: Summary, best: float | None) -> RenderableType:
    rows = summary["rows"]
    title = f"{summary['task']} on {summary['family']}: {summary['split']} rows, expert {summary['expert']}"
    table = tight(title=Text(title, style="bold"), title_justify="left")
    table.add_column(Text("system"))
    for name in _titles(summary)[1:]:
        two_lines = name.replace(" [", "\n[").replace(" vs ", "\nvs ")
        table.add_column(Text(two_lines), justify="right")
    if best is not None:
        table.add_column("", no_wrap=True)
    for row in rows:
        mark = [Text(BEST if _is_best(row, best) else "")] if best is not None else []
        style = STYLES[row["system"]] + (" bold" if _is_best(row, best) else "")
        table.add_row(*map(Text, _cells(row, summary)), *mark, style=style)
    lines = [Text(line) for line in _lines(summary)]
    if best is not None:
        lines.append(Text(CHOSEN_HERE))
    return Group(table, *lines, Text(""), Text(summary["verdict"], style="bold"))


def _first(text: str, lines: int | None) -> str:
    left = text.count("\n") + 1 - (lines or 0)
    if lines is None or left < 2:  # a line that tells of one line is no shorter
        return text
    return "\n".join([*text.split("\n")[:lines], f"... and {left} more lines"])


def _panel(title: str, text: str, style: str = "") -> Panel:
    return Panel(Text(visible(text)), title=Text(title, style=f"bold {style}"), title_align="left", box=box.ROUNDED)


def _titles(summary: Summary) -> list[str]:
    interval = f"[{100 * summary['level']:g}%]"
    names = spoken_measures(summary).values()
    return [
        "system",
        "alpha",
        "rows",
        *(f"{name} {interval}" for name in names),
        *(f"{name} vs base" for name in names),
    ]


def _cells(row: Mapping[str, Any], summary: Summary) -> list[str]:
    """One row under `_titles`."""
    base: Mapping[str, Any] = next((one for one in summary["rows"] if one["system"] == "base"), {})
    changes = []
    for name in spoken_measures(summary):
        known = row["system"] != "base" and row[name] is not None and base.get(name) is not None
        changes.append(f"{row[name] - base[name]:+.3f}" if known else "-")
    alpha = "-" if row["alpha"] is None else f"{row['alpha']:g}"
    measured = [with_interval(row[name], row[f"{name}_ci"]) for name in spoken_measures(summary)]
    return [row["system"], alpha, f"{row['n']}", *measured, *changes]


def _lines(summary: Summary) -> list[str]:
    """Below the table: each paired difference, then the gap."""
    lines = []
    for one in summary["differences"]:
        told = [
            f"{spoken_name} {with_interval(one[name], one[f'{name}_ci'], '+.3f')}"
            for name, spoken_name in spoken_measures(summary).items()
            if one[name] is not None
        ]
        if one.get("mcnemar") is not None:  # of a benchmark whose rows are right or wrong
            told.append(f"McNemar p = {one['mcnemar']:.3g}")
        lines.append(f"{one['of']} - {one['against']}: {', '.join(told)}")
    lines += [gap_line(summary)] if summary["gap_closed"] else []
    return [*lines, *summary.get("notes", [])]


def _is_best(row: Mapping[str, Any], best: float | None) -> bool:
    return best is not None and row["alpha"] == best


def with_interval(value: float | None, bounds: list[float | None] | None, form: str = ".3f") -> str:
    """A value, and in brackets where it may lie."""
    if value is None:
        return "-"
    low, high = ("?" if bound is None else format(bound, form) for bound in bounds or (None, None))
    return f"{value:{form}} [{low}, {high}]"
