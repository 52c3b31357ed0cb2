"""Panels that are drawn once and shown twice: together as a PNG, and each by itself as SVG inside a page.

Drawn on canvases of their own, without pyplot: no display, no global state. Imported late, for matplotlib.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from proxytune.files import write_atomic

# Okabe and Ito's palette, told apart by most colour-blind eyes; base is what everything is held against, so grey.
COLOURS = {"base": "#5f5f5f", "expert": "#d55e00", "steered": "#0072b2", "tuned": "#00825e"}
UP, DOWN = COLOURS["steered"], COLOURS["expert"]  # promoted and demoted: blue and orange
INK, SOFT, FAINT = "#222222", "#666666", "#dddddd"
HALO = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
NAMES = {"expert": "expert alone", "tuned": "base, tuned"}
WIDTH, HEIGHT, COLUMNS = 4.9, 3.4, 2  # inches of one panel, and how many stand beside each other
NOTE_SIZE, NOTE_COLUMNS = 8.5, 13.5  # points, and how many characters of that size fit an inch
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
# In a page colours follow its own light or dark scheme.
SCHEME = {
    INK: "ink",
    FAINT: "line",
    SOFT: "soft",
    "#888888": "soft",
    "#ffffff": "raised",
    **{colour: name for name, colour in COLOURS.items()},
}


@dataclass(frozen=True)
class Panel:
    """name: short, for files. alt: what it shows, in words, for who cannot see it. height in inches."""

    name: str
    title: str
    alt: str
    draw: Callable[[Axes], None]
    height: float = HEIGHT


def bounds(one: Mapping[str, Any], name: str = "value", ci: str = "ci") -> tuple[float, float]:
    """The ends of a figure's interval; the figure itself where an end is unknown."""
    low, high = (one[name] if bound is None else bound for bound in one[ci] or (None, None))
    return low, high


def png(panels: Sequence[Panel], path: Path, title: str, note: str) -> None:
    """All panels as one picture with a title above and a note below."""
    columns = min(COLUMNS, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    with rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.09)
        figure = Figure(figsize=(WIDTH * columns, sum(heights) + 0.8), facecolor="white", layout=layout)
        FigureCanvasAgg(figure)
        parts = figure.subfigures(
            len(rows), columns, squeeze=False, height_ratios=heights
        )  # each with margins of its own
        for panel, part in zip(panels, parts.flat, strict=False):
            axes = part.subplots()
            panel.draw(axes)
            part.suptitle(panel.title, fontsize=10, x=0.02, ha="left")
        figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
        note = textwrap.fill(note, int(figure.get_figwidth() * NOTE_COLUMNS))
        figure.supxlabel(note, x=0.012, ha="left", fontsize=NOTE_SIZE, color=SOFT)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=200, metadata={"Software": None})
    write_atomic(path, data.getvalue())


def svg(panel: Panel) -> str:
    """One panel to stand inside a page, in the colours of its scheme (`SCHEME`) and with text that can be read out."""
    style: dict[Any, Any] = STYLE | {"svg.fonttype": "none", "svg.hashsalt": panel.name, "axes.facecolor": "none"}
    with rc_context(style):
        layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04)
        figure = Figure(figsize=(WIDTH, panel.height), layout=layout)
        FigureCanvasSVG(figure)
        panel.draw(figure.subplots())
        data = io.StringIO()
        figure.savefig(data, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = data.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    for unwanted in (r"<metadata>.*?</metadata>", r"<style .*?</style>", r' (?:width|height)="[\d.]+pt"'):
        drawn = re.sub(unwanted, "", drawn, flags=re.DOTALL)  # the page says how large, and how lines are joined
    for colour, name in SCHEME.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    drawn = drawn.replace("'DejaVu Sans'", "system-ui")
    prefix = re.sub(r"\W", "-", panel.name)  # ids of one page must differ
    drawn = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", drawn)
    told = escape(f"{panel.title}. {panel.alt}")
    return " ".join(drawn.replace("<svg ", f'<svg role="img" aria-label="{told}" ', 1).split())
