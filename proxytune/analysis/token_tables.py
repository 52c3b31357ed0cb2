"""What steering changed in the tokens of a run (analysis/changes.py), in the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from proxytune.analysis.tables import tight, visible, with_interval

TOLD = 12  # promoted and demoted tokens in the terminal; the file has more
SPACES = {" ": "␣", "\n": "⏎", "\t": "⇥"}
NAMES = {
    "changed": "likeliest token changed",
    "gain": "change of probability",
    "kl": "KL from base, nats",
    "base_agrees": "base's likeliest too",
}
FORMS = {"changed": ".1%", "gain": "+.3f", "kl": ".2f", "base_agrees": ".1%"}
HEADING = 13  # characters in a line of a column's title
NARROW = FORMS | {"changed": ".0%", "base_agrees": ".0%"}  # so that a table fits 100 columns
Summary = Mapping[str, Any]


def tokens(summary: Summary) -> RenderableType:
    """The whole, then by kind of token, by position, differences between kinds, and the tokens that moved most."""
    title = (
        f"{summary['task']} on {summary['family']}, {summary['system']} at alpha {summary['alpha']:g} of "
        f"{summary['expert']}: {summary['tokens']:,} tokens of {summary['replies']:,} replies"
    )
    parts: list[RenderableType] = [Text(title, style="bold"), Text(overall(summary))]
    kinds = [[one["class"], *figures(one, NARROW)] for one in summary["by_class"]]
    parts.append(_table(["kind", "tokens", *NAMES.values()], kinds))
    parts += [Text(line) for line in differences(summary)]
    bands = [[band(one), *figures(one, NARROW)] for one in summary["by_position"]]
    parts.append(_table(["position", "tokens", *NAMES.values()], bands))
    parts += [movers(summary, name) for name in ("promoted", "demoted")]
    return Group(*parts)


def overall(summary: Summary) -> str:
    whole, level = summary["overall"], f"{100 * summary['level']:g}%"
    return (
        f"Likeliest token changed at {value(whole['changed'], '.1%')} of positions; change of probability of what was "
        f"said {value(whole['gain'], '+.3f')}; KL from base {value(whole['kl'])} nats ({level} intervals over replies)."
    )


def differences(summary: Summary) -> list[str]:
    """A line for each pair of kinds."""
    told = []
    for one in summary["differences"]:
        test = "" if one["p_holm"] is None else f", p = {one['p_holm']:.2g}"
        told.append(f"{one['of']} - {one['against']}: {value(one, '+.3f')}{test} ({one['replies']} replies have both)")
    return [*told, "p: sign-flip test over replies, Holm's correction."] if told else []


def movers(summary: Summary, name: str) -> RenderableType:
    """Promoted tokens were said; demoted ones are what the base liked best."""
    rows = [
        [spelled(one["token"]), str(one["uses"]), f"{one['change']:+.3f}", context(one)] for one in summary[name][:TOLD]
    ]
    if not rows:
        return Text(f"No token with {summary['min_uses']} uses or more was {name}: min_uses= asks for fewer.")
    return _table([f"most {name}", "uses", "change", "for instance"], rows, right=("uses", "change"))


def context(one: Mapping[str, Any]) -> str:
    """The first of a token's contexts on one line, the token in brackets."""
    if not one["contexts"]:
        return ""
    before, token, after = one["contexts"][0]
    return visible(f"{before}[{token}]{after}").replace("\n", SPACES["\n"]).replace("\t", " ")


def band(one: Mapping[str, Any]) -> str:
    return f"{one['from']}" if one["from"] == one["to"] else f"{one['from']}-{one['to']}"


def spelled(token: str) -> str:
    """A token with its spaces seen."""
    return "".join(SPACES.get(char, char) for char in visible(token))


def value(one: Mapping[str, Any], form: str = ".3f") -> str:
    return with_interval(one["value"], one["ci"], form)


def figures(one: Mapping[str, Any], forms: Mapping[str, str] = FORMS) -> list[str]:
    """The cells of a group of tokens."""
    return [f"{one['tokens']:,}", *(value(one[figure], form) for figure, form in forms.items())]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] | None = None) -> Table:
    table = tight()
    for title in titles:
        number = title != titles[0] if right is None else title in right
        table.add_column(Text(textwrap.fill(title, HEADING)), justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
