"""Pictures of a summary (evaluation/summary.py) as PNG: the four systems side by side, and the curve over alpha.

Drawn on a canvas of their own, without pyplot: no display, no global state. Imported late, for matplotlib.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from proxytune.analysis.tables import gap_line, spoken_measures
from proxytune.evaluation.summary import MEASURES, better
from proxytune.files import write_atomic

# Okabe and Ito's palette, told apart by most colour-blind eyes; base is what everything is held against, so grey.
COLOURS = {"base": "#5f5f5f", "expert": "#d55e00", "steered": "#0072b2", "tuned": "#00825e"}
INK, FAINT = "#222222", "#dddddd"
HALO = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
NAMES = {"expert": "expert alone", "tuned": "base, tuned"}
PANEL_WIDTH = 4.9  # inches
NOTE_SIZE, NOTE_COLUMNS = 8.5, 13.5  # points, and how many characters of that size fit an inch
MOST_TICKS = 9  # more alphas than these are not named one by one
STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
}

Summary = Mapping[str, Any]
Row = Mapping[str, Any]


def comparison(summary: Summary, path: Path) -> None:
    """Every system's loss and metric with its interval; of several alphas only the chosen one."""
    rows = [row for row in summary["rows"] if row["system"] != "steered" or row["alpha"] == summary["chosen"]]
    with rc_context(STYLE):
        figure, panels = _panels(rows, height=1.4 + 0.52 * len(rows))
        for axes, measure in panels:
            _dots(axes, rows, measure)
            axes.set_xlabel(_measure_title(summary, measure))
        panels[0][0].set_yticks(range(len(rows)), [_system_label(row) for row in rows])
        for label, row in zip(panels[0][0].get_yticklabels(), rows, strict=True):
            label.set(color=COLOURS[row["system"]], fontweight="bold")
        for axes, _ in panels[1:]:
            axes.set_yticks(range(len(rows)), [""] * len(rows))
        _finish(figure, summary, rows[0]["n"], path)


def alpha_curve(summary: Summary, path: Path) -> None:
    """Loss and metric of the steered base over alpha, with the other systems as level lines."""
    curve = [row for row in summary["rows"] if row["system"] == "steered"]
    levels = [row for row in summary["rows"] if row["system"] != "steered"]
    with rc_context(STYLE):
        figure, panels = _panels(summary["rows"], height=3.9)
        for axes, measure in panels:
            _curve(axes, curve, measure, summary["chosen"])
            _levels(axes, levels, curve, measure)
            axes.set_xlabel("alpha")
            axes.set_title(_measure_title(summary, measure), fontsize=10, loc="left")
        _finish(figure, summary, curve[0]["n"], path)


def _panels(rows: list[Row], height: float) -> tuple[Figure, list[tuple[Axes, str]]]:
    """One panel for each measure that any row has."""
    measures = [name for name in MEASURES if any(row[name] is not None for row in rows)]
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.07, wspace=0.04)
    figure = Figure(figsize=(PANEL_WIDTH * len(measures), height), facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(measures), squeeze=False)[0]
    return figure, list(zip(axes, measures, strict=True))


def _dots(axes: Axes, rows: list[Row], measure: str) -> None:
    """One line a system: its value, its interval, and where the base lies."""
    base = next((row[measure] for row in rows if row["system"] == "base"), None)
    if base is not None:
        axes.axvline(base, color=COLOURS["base"], linewidth=1, linestyle=(0, (2, 3)), zorder=0)
    for y, row in enumerate(rows):
        if row[measure] is None:
            continue
        value, (low, high) = row[measure], _bounds(row, measure)
        colour = COLOURS[row["system"]]
        axes.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="round")
        axes.plot([value], [y], "o", color=colour, markersize=7, markeredgecolor="white")
        axes.annotate(
            f"{value:.3f}", (value, y), (0, 8), textcoords="offset points", ha="center", color=colour, bbox=HALO
        )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.1)
    axes.tick_params(axis="y", length=0, labelsize=11)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _curve(axes: Axes, curve: list[Row], measure: str, chosen: float | None) -> None:
    points = [row for row in curve if row[measure] is not None]
    alphas, values = [row["alpha"] for row in points], [row[measure] for row in points]
    bounds = [_bounds(row, measure) for row in points]
    colour = COLOURS["steered"]
    axes.fill_between(
        alphas, [low for low, _ in bounds], [high for _, high in bounds], color=colour, alpha=0.18, linewidth=0
    )
    axes.plot(alphas, values, "o-", color=colour, linewidth=2, markersize=4)
    if len(alphas) <= MOST_TICKS:
        axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
    for row in points:
        if row["alpha"] == chosen:
            edge = min(low for low, _ in bounds) if _down(row, measure) else max(high for _, high in bounds)
            _mark(axes, row, measure, edge, "left" if row is points[0] else "right" if row is points[-1] else "center")
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.margins(x=0.03, y=0.14)


def _mark(axes: Axes, row: Row, measure: str, edge: float, align: str) -> None:
    """The chosen alpha: a ring, and its numbers on the better side of the whole band, whose end is `edge`."""
    colour, down = COLOURS["steered"], _down(row, measure)
    axes.plot([row["alpha"]] * 2, [row[measure], edge], color=colour, linewidth=1, linestyle=(0, (2, 3)))
    axes.plot(
        [row["alpha"]], [row[measure]], "o", color="white", markeredgecolor=colour, markeredgewidth=2.2, markersize=9
    )
    axes.annotate(
        f"alpha {row['alpha']:g}: {row[measure]:.3f}",
        (row["alpha"], edge),
        (0, -5 if down else 5),
        textcoords="offset points",
        ha=align,
        va="top" if down else "bottom",
        color=colour,
        fontweight="bold",
        bbox=HALO,
    )


def _levels(axes: Axes, levels: list[Row], curve: list[Row], measure: str) -> None:
    """The systems without an alpha as lines, and the name of every line at its right end."""
    labels = [("steered", curve[-1][measure])] if curve[-1][measure] is not None else []
    for row in levels:
        if row[measure] is not None:
            colour = COLOURS[row["system"]]
            axes.axhline(row[measure], color=colour, linewidth=1.4, linestyle="--")
            labels.append((row["system"], row[measure]))
    low, high = axes.get_ylim()
    heights = spread([(value - low) / (high - low) for _, value in labels], apart=0.075)
    for (system, _), height in zip(labels, heights, strict=True):
        axes.text(
            1.02,
            height,
            NAMES.get(system, system),
            transform=axes.transAxes,
            va="center",
            color=COLOURS[system],
            fontweight="bold",
        )


def spread(heights: list[float], apart: float) -> list[float]:
    """Heights in 0..1 moved as little as a pass up and a pass down need to keep them `apart`, in the given order."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved = [heights[i] for i in order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + apart)
    ceiling = max([1.0, *heights])
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], ceiling - apart * (len(moved) - 1 - i))
    return [moved[order.index(i)] for i in range(len(heights))]


def _system_label(row: Row) -> str:
    system = row["system"]
    return f"steered, alpha {row['alpha']:g}" if system == "steered" else NAMES.get(system, system)


def _measure_title(summary: Summary, measure: str) -> str:
    if measure == "loss":
        return "loss in nats per token, lower is better"
    direction = "higher" if better(measure, summary["rows"][0]["metric_name"]) > 0 else "lower"
    return f"{spoken_measures(summary)['metric']}, {direction} is better"


def _down(row: Row, measure: str) -> bool:
    return better(measure, row["metric_name"]) < 0


def _bounds(row: Row, measure: str) -> tuple[float, float]:
    """A row's interval; the value itself where an end is unknown."""
    low, high = (row[measure] if bound is None else bound for bound in row[f"{measure}_ci"])
    return low, high


def _finish(figure: Figure, summary: Summary, rows: int, path: Path) -> None:
    title = f"{summary['task']} on {summary['family']}, steered by {summary['expert']}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
    note = f"{rows:,} {summary['split']} rows, {100 * summary['level']:g}% bootstrap intervals. {gap_line(summary)}"
    note = textwrap.fill(note, int(figure.get_figwidth() * NOTE_COLUMNS))
    figure.supxlabel(note, x=0.012, ha="left", fontsize=NOTE_SIZE, color="#666666")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=200, metadata={"Software": None})
    write_atomic(path, data.getvalue())
