"""Pictures of what alpha does (analysis/curves.py): every measure over alpha, divergence, measures against each other.

The last is the paper's truth and information picture (Liu et al. 2024, arXiv 2401.08565, figure 2): a curve through two
measures with alpha along it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from proxytune.analysis.canvas import COLOURS, FAINT, HALO, NAMES, Panel, bounds, png
from proxytune.analysis.curves import DIVERGENCES, curves_of, title
from proxytune.analysis.figures import note

MOST_TICKS = 9  # more alphas than these are not named one by one
MARKS = {"base": "s", "expert": "^", "tuned": "D"}  # beside colour, for who cannot tell these apart
Summary = Mapping[str, Any]
Curve = Mapping[str, Any]
Point = Mapping[str, Any]


def alpha_curve(summary: Summary, path: Path) -> None:
    """All panels as a PNG."""
    name = f"{summary['task']} on {summary['family']}, steered by {summary['expert']}"
    png(panels(summary), path, name, note(summary))


def panels(summary: Summary) -> list[Panel]:
    """Empty where nothing was steered."""
    found = {curve["measure"]: curve for curve in curves_of(summary) if curve["points"]}
    own = [curve for name, curve in found.items() if name not in DIVERGENCES]
    apart = [found[name] for name in DIVERGENCES if name in found]
    chosen = summary["chosen"]
    drawn = [
        Panel(f"alpha-{one['measure']}", _spoken(one), _worded(one), partial(_alpha, curve=one, chosen=chosen))
        for one in own
    ]
    if apart:
        words = "; ".join(f"{title(one['measure'])}: {_worded(one)}" for one in apart)
        drawn.append(Panel("alpha-divergence", "divergence, nats per token", words, partial(_divergence, curves=apart)))
    by = summary["best"]["by"] if "best" in summary else None
    for x, y in _pairs(own, apart, by) if any(len(one["points"]) > 1 for one in own) else ():
        name = f"{title(y['measure'])} against {title(x['measure'])}"
        words = "; ".join(
            f"alpha {a['alpha']:g}: {a['value']:.3f}, {b['value']:.3f}"
            for a, b in zip(x["points"], y["points"], strict=True)
        )
        drawn.append(
            Panel(f"trade-{x['measure']}-{y['measure']}", name, words, partial(_trade, x=x, y=y, chosen=chosen))
        )
    if "best" in summary:
        shares = summary["best"]["shares"]
        words = ", ".join(f"alpha {one['alpha']:g}: {one['share']:.1%}" for one in shares)
        name = f"how often an alpha is best by {title(summary['best']['by']).partition(',')[0]}, on rows drawn anew"
        drawn.append(Panel("alpha-best", name, words, partial(_shares, shares=shares), height=2.6))
    return drawn


def _pairs(own: Sequence[Curve], apart: Sequence[Curve], by: str | None) -> Iterator[tuple[Curve, Curve]]:
    """Which measures are drawn against each other: what alpha is chosen by against divergence, and the two first
    metrics, or the loss and the metric."""
    metrics = [curve for curve in own if curve["measure"] != "loss"]
    if apart:
        yield apart[0], next((curve for curve in own if curve["measure"] == by), [*metrics, *own][0])
    pair = metrics[:2] if len(metrics) > 1 else own[:2]
    if len(pair) == 2 and len(pair[0]["points"]) == len(pair[1]["points"]):
        yield pair[0], pair[1]


def _alpha(axes: Axes, curve: Curve, chosen: float | None) -> None:
    """One measure of the steered base over alpha, with the other systems as level lines."""
    points = curve["points"]
    colour = COLOURS["steered"]
    _band(axes, points, colour)
    for point in points:
        if point["alpha"] == chosen:
            _mark(axes, point, curve)
    axes.margins(x=0.03, y=0.14)
    _levels(axes, curve)
    _over_alpha(axes, points)


def _divergence(axes: Axes, curves: Sequence[Curve]) -> None:
    for curve in curves:
        system = curve["measure"].removeprefix("kl_")
        _band(axes, curve["points"], COLOURS[system])
        last = curve["points"][-1]
        _named(axes, [(f"from {system}", COLOURS[system], last["value"])], at=last["alpha"])
    axes.set_ylim(bottom=0)
    _over_alpha(axes, curves[0]["points"])


def _trade(axes: Axes, x: Curve, y: Curve, chosen: float | None) -> None:
    """Two measures against each other, alpha along the curve; the other systems where both are known."""
    colour = COLOURS["steered"]
    xs, ys = ([point["value"] for point in curve["points"]] for curve in (x, y))
    alphas = [point["alpha"] for point in x["points"]]
    axes.plot(xs, ys, "o-", color=colour, linewidth=1.6, markersize=4)
    if chosen in alphas:
        place = alphas.index(chosen)
        axes.plot(xs[place], ys[place], "o", color="white", markeredgecolor=colour, markeredgewidth=2, markersize=8)
    others = [system for system in MARKS if system in x["levels"] and system in y["levels"]]
    for system in others:
        axes.plot(x["levels"][system], y["levels"][system], MARKS[system], color=COLOURS[system], markersize=7)
    axes.margins(0.16)
    axes.autoscale_view()
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()

    def place_of(a: float, b: float) -> tuple[float, float]:
        return (a - left) / (right - left), (b - low) / (high - low)

    named: list[tuple[float, float]] = []
    order = sorted(range(len(alphas)), key=lambda i: (alphas[i] != chosen, i not in (0, len(alphas) - 1), i))
    for i in order:  # where names would lie on each other the chosen alpha and the ends are told
        at = place_of(xs[i], ys[i])
        if all(abs(at[0] - a) > 0.08 or abs(at[1] - b) > 0.08 for a, b in named):
            named.append(at)
            text = f"alpha {alphas[i]:g}" if alphas[i] == chosen else f"{alphas[i]:g}"
            axes.annotate(
                text, (xs[i], ys[i]), (0, 7), textcoords="offset points", ha="center", color=colour, fontsize=9
            )
    for system in others:
        point = (x["levels"][system], y["levels"][system])
        side = -1 if place_of(*point)[0] > 0.7 else 1
        style: dict[str, Any] = {"color": COLOURS[system], "fontweight": "bold", "ha": "left" if side > 0 else "right"}
        axes.annotate(NAMES.get(system, system), point, (8 * side, -13), textcoords="offset points", **style)
    axes.set_xlabel(_spoken(x))
    axes.set_ylabel(_spoken(y))
    axes.grid(color=FAINT, linewidth=0.6)


def _shares(axes: Axes, shares: Sequence[Mapping[str, float]]) -> None:
    places = range(len(shares))
    axes.bar(places, [one["share"] for one in shares], color=COLOURS["steered"], width=0.7)
    for place, one in zip(places, shares, strict=True):
        if one["share"] >= 0.005:
            axes.annotate(f"{one['share']:.0%}", (place, one["share"]), (0, 2), textcoords="offset points", ha="center")
    axes.set_xticks(places, [f"{one['alpha']:g}" for one in shares])
    axes.set_xlabel("alpha")
    axes.set_ylim(0, 1.12)
    axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])


def _band(axes: Axes, points: Sequence[Point], colour: str) -> None:
    alphas, (lows, highs) = [point["alpha"] for point in points], zip(*map(bounds, points), strict=True)
    axes.fill_between(alphas, lows, highs, color=colour, alpha=0.18, linewidth=0)
    axes.plot(alphas, [point["value"] for point in points], "o-", color=colour, linewidth=2, markersize=4)


def _over_alpha(axes: Axes, points: Sequence[Point]) -> None:
    if len(points) <= MOST_TICKS:
        axes.set_xticks([point["alpha"] for point in points], [f"{point['alpha']:g}" for point in points])
    axes.set_xlabel("alpha")
    axes.grid(axis="y", color=FAINT, linewidth=0.6)


def _mark(axes: Axes, point: Point, curve: Curve) -> None:
    """The chosen alpha: a ring, and its numbers on the better side of the whole band."""
    points, colour, down = curve["points"], COLOURS["steered"], curve["better"] < 0
    edge = min(bounds(each)[0] for each in points) if down else max(bounds(each)[1] for each in points)
    axes.plot([point["alpha"]] * 2, [point["value"], edge], color=colour, linewidth=1, linestyle=(0, (2, 3)))
    axes.plot(
        [point["alpha"]],
        [point["value"]],
        "o",
        color="white",
        markeredgecolor=colour,
        markeredgewidth=2.2,
        markersize=9,
    )
    axes.annotate(
        f"alpha {point['alpha']:g}: {point['value']:.3f}",
        (point["alpha"], edge),
        (0, -5 if down else 5),
        textcoords="offset points",
        ha="left" if point is points[0] else "right" if point is points[-1] else "center",
        va="top" if down else "bottom",
        color=colour,
        fontweight="bold",
        bbox=HALO,
    )


def _levels(axes: Axes, curve: Curve) -> None:
    """The systems without an alpha as lines, and the name of every line at its right end."""
    for system, value in curve["levels"].items():
        axes.axhline(value, color=COLOURS[system], linewidth=1.4, linestyle="--")
    lines = [("steered", COLOURS["steered"], curve["points"][-1]["value"])]
    _named(axes, [*lines, *((NAMES.get(s, s), COLOURS[s], value) for s, value in curve["levels"].items())])


def _named(axes: Axes, lines: Sequence[tuple[str, str, float]], at: float | None = None) -> None:
    """Names at the right end of lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    heights = spread([(value - low) / (high - low) for *_, value in lines], apart=0.075)
    for (name, colour, value), height in zip(lines, heights, strict=True):
        if at is not None:  # beside the last point of its own line
            axes.annotate(
                name, (at, value), (7, 0), textcoords="offset points", va="center", color=colour, fontweight="bold"
            )
        else:
            axes.text(1.02, height, name, transform=axes.transAxes, va="center", color=colour, fontweight="bold")


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


def _spoken(curve: Curve) -> str:
    direction = {1: ", higher is better", -1: ", lower is better", 0: ", nats per token"}[curve["better"]]
    return title(curve["measure"]) + direction


def _worded(curve: Curve) -> str:
    return ", ".join(f"alpha {point['alpha']:g}: {point['value']:.3f}" for point in curve["points"])
