"""The picture of a summary (evaluation/summary.py): the systems side by side, each measure with its intervals."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from proxytune.analysis.canvas import COLOURS, FAINT, HALO, NAMES, Panel, bounds, png
from proxytune.analysis.tables import gap_line, spoken_measures
from proxytune.evaluation.summary import MEASURES, better

Summary = Mapping[str, Any]
Row = Mapping[str, Any]


def comparison(summary: Summary, path: Path) -> None:
    """All panels as a PNG."""
    title = f"{summary['task']} on {summary['family']}, steered by {summary['expert']}"
    png(panels(summary), path, title, note(summary))


def note(summary: Summary) -> str:
    """What was measured on how much, below a picture."""
    rows, level = summary["rows"][0]["n"], 100 * summary["level"]
    return f"{rows:,} {summary['split']} rows, {level:g}% bootstrap intervals. {gap_line(summary)}"


def panels(summary: Summary) -> list[Panel]:
    """One for each measure that any system has; of several alphas only the chosen one."""
    rows = [row for row in summary["rows"] if row["system"] != "steered" or row["alpha"] == summary["chosen"]]
    measures = [name for name in MEASURES if any(row[name] is not None for row in rows)]
    height = 1.3 + 0.52 * len(rows)
    return [
        Panel(
            f"systems-{measure}",
            _title(summary, measure),
            ", ".join(f"{_label(row)}: {row[measure]:.3f}" for row in rows if row[measure] is not None),
            partial(_dots, rows=rows, measure=measure),
            height,
        )
        for measure in measures
    ]


def _dots(axes: Axes, rows: list[Row], measure: str) -> None:
    """One line a system: its value, its interval, and where the base lies."""
    base = next((row[measure] for row in rows if row["system"] == "base"), None)
    if base is not None:
        axes.axvline(base, color=COLOURS["base"], linewidth=1, linestyle=(0, (2, 3)), zorder=0)
    for y, row in enumerate(rows):
        if row[measure] is None:
            continue
        value, (low, high) = row[measure], bounds(row, measure, f"{measure}_ci")
        colour = COLOURS[row["system"]]
        axes.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="round")
        axes.plot([value], [y], "o", color=colour, markersize=7, markeredgecolor="white")
        axes.annotate(
            f"{value:.3f}", (value, y), (0, 8), textcoords="offset points", ha="center", color=colour, bbox=HALO
        )
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set(color=COLOURS[row["system"]], fontweight="bold")
    axes.set_ylim(len(rows) - 0.5, -0.6)
    axes.margins(x=0.1)
    axes.tick_params(axis="y", length=0, labelsize=11)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _label(row: Row) -> str:
    system = row["system"]
    return f"steered, alpha {row['alpha']:g}" if system == "steered" else NAMES.get(system, system)


def _title(summary: Summary, measure: str) -> str:
    if measure == "loss":
        return "loss in nats per token, lower is better"
    direction = "higher" if better(measure, summary["rows"][0]["metric_name"]) > 0 else "lower"
    return f"{spoken_measures(summary)['metric']}, {direction} is better"
