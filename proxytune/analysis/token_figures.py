"""Pictures of what steering changed token by token (analysis/changes.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from proxytune.analysis.canvas import DOWN, FAINT, UP, Panel, bounds, png
from proxytune.analysis.token_tables import band, overall, spelled

SHOWN, LONGEST = 8, 14  # tokens in a picture, and characters of one
Summary = Mapping[str, Any]


def save(summary: Summary, folder: Path) -> dict[str, Path]:
    """The pictures as PNG in a folder, by name."""
    title = f"{summary['task']} on {summary['family']}, steered by {summary['expert']} at alpha {summary['alpha']:g}"
    path = folder / "tokens.png"
    png(panels(summary), path, title, overall(summary))
    return {"tokens": path}


def panels(summary: Summary) -> list[Panel]:
    kinds = summary["by_class"]
    found = [
        Panel(
            "token-gain-by-position",
            "change of probability by position",
            _worded({band(one): one["gain"]["value"] for one in summary["by_position"]}),
            partial(_by_position, bands=summary["by_position"], figure="gain"),
        ),
        Panel(
            "token-changed-by-position",
            "share of likeliest tokens changed, by position",
            _worded({band(one): one["changed"]["value"] for one in summary["by_position"]}),
            partial(_by_position, bands=summary["by_position"], figure="changed"),
        ),
    ]
    if len(kinds) > 1:
        found.append(
            Panel(
                "token-gain-by-kind",
                "change of probability by kind of token",
                _worded({one["class"]: one["gain"]["value"] for one in kinds}),
                partial(_by_kind, kinds=kinds),
                height=1.3 + 0.38 * len(kinds),
            )
        )
    moved = [*summary["promoted"][:SHOWN], *reversed(summary["demoted"][:SHOWN])]
    if moved:
        found.append(
            Panel(
                "tokens-moved",
                "tokens promoted and demoted most",
                _worded({repr(one["token"]): one["change"] for one in moved}),
                partial(_movers, moved=moved),
                height=1.0 + 0.21 * len(moved),
            )
        )
    return found


def _worded(values: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name}: {value:+.3f}" for name, value in values.items() if value is not None)


def _by_position(axes: Axes, bands: Sequence[Mapping[str, Any]], figure: str) -> None:
    places = range(len(bands))
    lows, highs = zip(*(bounds(one[figure]) for one in bands), strict=True)
    axes.fill_between(places, lows, highs, color=UP, alpha=0.18, linewidth=0)
    axes.plot(places, [one[figure]["value"] for one in bands], "o-", color=UP, linewidth=2, markersize=4)
    axes.set_xticks(places, [str(one["from"]) for one in bands])
    axes.set_xlabel("position in the reply, from this token on")
    if figure == "changed":
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)


def _by_kind(axes: Axes, kinds: Sequence[Mapping[str, Any]]) -> None:
    for y, one in enumerate(kinds):
        value, (low, high) = one["gain"]["value"], bounds(one["gain"])
        colour = UP if value >= 0 else DOWN
        axes.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="round")
        axes.plot([value], [y], "o", color=colour, markersize=7)
    axes.axvline(0, color="#888888", linewidth=1, zorder=0)
    axes.set_yticks(range(len(kinds)), [f"{one['class']}\n{one['tokens']:,} tokens" for one in kinds])
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_xlabel("steered minus base probability")
    axes.grid(axis="x", color=FAINT, linewidth=0.6)


def _movers(axes: Axes, moved: Sequence[Mapping[str, Any]]) -> None:
    changes = [one["change"] for one in moved]
    axes.barh(range(len(moved)), changes, color=[UP if change >= 0 else DOWN for change in changes], height=0.7)
    names = [f"{_short(spelled(one['token']))}  ({one['uses']})" for one in moved]
    axes.set_yticks(range(len(moved)), names, fontsize=9)
    axes.set_ylim(len(moved) - 0.4, -0.6)
    axes.axvline(0, color="#888888", linewidth=1)
    axes.set_xlabel("mean change of probability (uses)")
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _short(token: str) -> str:
    return token if len(token) <= LONGEST else token[: LONGEST - 1] + "\u2026"
