"""What steering changed in the tokens of a run (analysis/changes.py), in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from proxytune.analysis.tables import visible

TOLD = 12  # promoted and demoted tokens in the terminal; the file has more
SPACES = {" ": "␣", "\n": "⏎", "\t": "⇥"}
NAMES = {
    "changed": "likeliest token changed",
    "gain": "change of probability",
    "kl": "KL from base, nats",
    "base_agrees": "base's likeliest too",
}
Summary = Mapping[str, Any]


def tokens(summary: Summary) -> RenderableType:
    """The whole, then by kind of token, by position, differences between kinds, and the tokens that moved most."""
    title = (
        f"{summary['task']} on {summary['family']}, {summary['system']} at alpha {summary['alpha']:g} of "
        f"{summary['expert']}: {summary['tokens']:,} tokens of {summary['replies']:,} replies"
    )
    parts: list[RenderableType] = [Text(title, style="bold"), Text(overall(summary))]
    parts.append(
        _table(["kind of token", "tokens", *NAMES.values()], [_line(one, one["class"]) for one in summary["by_class"]])
    )
    parts += [Text(line) for line in differences(summary)]
    bands = [_line(one, band(one)) for one in summary["by_position"]]
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
    if one["value"] is None:
        return "-"
    low, high = ("?" if bound is None else format(bound, form) for bound in one["ci"])
    return f"{one['value']:{form}} [{low}, {high}]"


def _line(one: Mapping[str, Any], name: str) -> list[str]:
    forms = {"changed": ".1%", "gain": "+.3f", "kl": ".2f", "base_agrees": ".1%"}
    return [name, f"{one['tokens']:,}", *(value(one[figure], form) for figure, form in forms.items())]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        number = title != titles[0] if right is None else title in right
        table.add_column(Text(title), justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
