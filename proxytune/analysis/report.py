"""One HTML file that tells what a run found: it fetches nothing, runs nothing but its own script, and escapes all text.

Tables and pictures are in the page itself; the generations are data that page/report.js draws ten at a time.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from proxytune.analysis import canvas, curve_figures, curves, figures, token_figures
from proxytune.analysis.canvas import NAMES, Panel
from proxytune.analysis.generations import Generations, packed
from proxytune.analysis.tables import CHOSEN_HERE, gap_line
from proxytune.analysis.token_tables import NAMES as FIGURES
from proxytune.analysis.token_tables import band, spelled, value
from proxytune.analysis.token_tables import figures as cells
from proxytune.evaluation.summary import spoken

PAGE = Path(__file__).parent / "page"
MOVERS = 12  # promoted and demoted tokens in the page; tokens.json has more
Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """What a report tells. summary: of an evaluation or sweep; tokens: content of `tokens.json`; either may be None.

    terms: what it was made with, by name. commands: to make it again, in order. settings: as JSON. notes: what the
    reader should know of what is missing.
    """

    title: str
    summary: Summary | None
    tokens: Summary | None
    generations: Generations
    terms: Mapping[str, str]
    commands: Sequence[str]
    settings: Mapping[str, Any]
    notes: Sequence[str] = field(default_factory=list)


def panels(found: Found) -> list[Panel]:
    """Every picture of the report."""
    drawn: list[Panel] = []
    if found.summary:
        drawn += figures.panels(found.summary)
        drawn += curve_figures.panels(found.summary) if _alphas(found.summary) > 1 else []
    return drawn + (token_figures.panels(found.tokens) if found.tokens else [])


def page(found: Found, most: int) -> str:
    """The whole file. most: generations at most."""
    data, told = packed(found.generations, most)
    sections = {
        "results": ("Results", _results(found.summary) if found.summary else ""),
        "alpha": ("Alpha", _alpha(found.summary) if found.summary and _alphas(found.summary) > 1 else ""),
        "tokens": ("Tokens", _tokens(found.tokens) if found.tokens else ""),
        "generations": ("Generations", _generations(data, told, found) if data["rows"] else ""),
        "provenance": ("Provenance", _provenance(found)),
    }
    sections = {id: section for id, section in sections.items() if section[1]}
    script = (PAGE / "report.js").read_text("utf-8")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    links = "".join(f'<a href="#{id}">{name}</a>' for id, (name, _) in sections.items())
    notes = "".join(f"<p>{escape(note)}</p>" for note in found.notes)
    body = "".join(
        f'<section aria-labelledby="{id}"><h2 id="{id}">{name}</h2>{content}</section>'
        for id, (name, content) in sections.items()
    )
    verdict = f'<p class="verdict">{escape(found.summary["verdict"])}</p>' if found.summary else ""
    packed_data = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(found.title)}</title><style>{(PAGE / 'report.css').read_text('utf-8')}</style></head><body>"
        f'<a class="skip" href="#results">skip to the results</a><header><h1>{escape(found.title)}</h1>'
        f'{verdict}{_facts(found)}{notes}</header><nav aria-label="sections">{links}</nav><main>{body}</main>'
        '<div id="told" role="status" aria-live="polite" hidden></div>'
        f'<script id="data" type="application/json">{packed_data}</script><script>{script}</script></body></html>\n'
    )


def _facts(found: Found) -> str:
    """The numbers one looks for first."""
    facts: list[tuple[str, str, str]] = []
    if found.summary:
        chosen = next((row for row in found.summary["rows"] if row["alpha"] == found.summary["chosen"]), None)
        base = next((row for row in found.summary["rows"] if row["system"] == "base"), None)
        if chosen and chosen["alpha"] is not None:
            facts.append(("alpha", f"{chosen['alpha']:g}", _best(found.summary)))
        for key in ("loss", "metric"):
            if chosen and chosen[key] is not None:
                name = "loss" if key == "loss" else spoken(chosen["metric_name"])
                before = f"base {base[key]:.3f}" if base and base[key] is not None else ""
                facts.append((name, f"{chosen[key]:.3f}", before))
        for key, gap in found.summary["gap_closed"].items():
            name = "loss" if key == "loss" else spoken(found.summary["rows"][0]["metric_name"])
            if gap["value"] is not None and not gap["unstable"] and not gap.get("backwards"):
                facts.append(
                    (f"gap to tuned closed, {name}", f"{gap['value']:.0%}", value(gap, ".0%").partition(" ")[2])
                )
    if found.tokens:
        changed = found.tokens["overall"]["changed"]
        facts.append(("likeliest token changed", f"{changed['value']:.1%}", f"of {found.tokens['tokens']:,} positions"))
    told = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(number)}<small>{escape(beside)}</small></dd></div>"
        for name, number, beside in facts
    )
    return f'<dl class="facts">{told}</dl>'


def _best(summary: Summary) -> str:
    if "best" not in summary:
        return ""
    low, high = summary["best"]["ci"]
    return f"best by {spoken(summary['best']['by'])} [{low:g}, {high:g}]"


def _results(summary: Summary) -> str:
    measures = list(dict.fromkeys(name for row in summary["rows"] for name in curves.row_measures(row)))
    rows = []
    for row in summary["rows"]:
        own = curves.row_measures(row)
        cells = [_alpha_of(row), f"{row['n']:,}", *(value(own[name]) if name in own else "-" for name in measures)]
        cells += [str(row["unparsed"])] if "unparsed" in row else []
        rows.append((NAMES.get(row["system"], row["system"]), cells, _class(row, summary)))
    titles = ["system", "alpha", "rows", *(curves.title(name).partition(",")[0] for name in measures)]
    titles += ["unparsed"] if any("unparsed" in row for row in summary["rows"]) else []
    level = f"{100 * summary['level']:g}%"
    about = f"{summary['task']} on {summary['family']}, {summary['split']} rows, {level} bootstrap intervals over rows"
    lines = []
    for one in summary["differences"]:
        told = [
            f"{name} {value({'value': one[key], 'ci': one[f'{key}_ci']}, '+.3f')}"
            for key, name in (("loss", "loss"), ("metric", spoken(summary["rows"][0]["metric_name"])))
            if one[key] is not None
        ]
        lines.append(f"{one['of']} minus {one['against']}, on the same rows: {', '.join(told)}")
    lines += [gap_line(summary)] if summary["gap_closed"] else []
    lines += [CHOSEN_HERE] if "best" in summary else []
    return _table(about, titles, rows) + _paragraphs(lines) + _pictures(figures.panels(summary))


def _alpha(summary: Summary) -> str:
    told = [curves.best_line(summary["best"])] if "best" in summary else []
    return _paragraphs(told) + _pictures(curve_figures.panels(summary))


def _tokens(tokens: Summary) -> str:
    whole = tokens["overall"]
    opening = (
        f"At every token of {tokens['replies']:,} {tokens['system']} replies: what base, expert, anti and steered base "
        f"gave it. The likeliest token changed at {value(whole['changed'], '.1%')} of positions; what was said gained "
        f"{value(whole['gain'], '+.3f')} in probability. Intervals are over replies."
    )
    titles = ["kind of token", "tokens", *FIGURES.values()]
    kinds = [(one["class"], cells(one), "") for one in tokens["by_class"]]
    tests = [
        (
            f"{one['of']} minus {one['against']}",
            [value(one, "+.3f"), "-" if one["p_holm"] is None else f"{one['p_holm']:.2g}", f"{one['replies']:,}"],
            "",
        )
        for one in tokens["differences"]
    ]
    bands = [(band(one), cells(one), "") for one in tokens["by_position"]]
    parts = [_paragraphs([opening]), _pictures(token_figures.panels(tokens))]
    parts.append(_table("By kind of token", titles, kinds))
    if tests:
        heads = ["change of probability", "difference", "p", "replies with both"]
        parts.append(_table("Kinds within the same replies: sign-flip test, Holm's correction", heads, tests))
    meanings = {"promoted": "tokens that were said", "demoted": "tokens that the base liked best"}
    movers = "".join(f"<div>{_movers(tokens, name, meaning)}</div>" for name, meaning in meanings.items())
    parts.append(f'<div class="movers">{movers}</div>')
    position = _table("By position in the reply", ["position", *titles[1:]], bands)
    return "".join(parts) + f"<details><summary>by position</summary>{position}</details>"


def _movers(tokens: Summary, name: str, meaning: str) -> str:
    if not tokens[name]:
        return _paragraphs([f"No token with {tokens['min_uses']} uses or more was {name}."])
    rows = "".join(
        f'<tr><th scope="row"><span class="token">{escape(spelled(one["token"]))}</span></th>'
        f'<td>{one["uses"]:,}</td><td>{one["change"]:+.3f}</td><td class="wide">{_contexts(one)}</td></tr>'
        for one in tokens[name][:MOVERS]
    )
    about = f"Most {name}: {meaning}, {tokens['min_uses']} uses or more"
    titles = [name, "uses", "change"]
    return _framed(about, _heads(titles) + '<th scope="col" class="text">for instance</th>', rows)


def _contexts(one: Mapping[str, Any]) -> str:
    return "".join(
        f"<code>{escape(before)}<mark>{escape(spelled(token))}</mark>{escape(after)}</code>".replace("\n", "⏎")
        for before, token, after in one["contexts"]
    )


def _generations(data: Mapping[str, Any], told: int, found: Found) -> str:
    rows = len(data["rows"])
    total = len({id for texts in found.generations.texts.values() for id in texts})
    note = f"{rows:,} of {total:,} prompts." if rows < total else f"All {rows:,} prompts."
    if 0 < told < rows:
        note += f" The first {told:,} tell of their tokens; to keep the page small the others do not."
    heated = (
        '<p class="legend"><span>colour of a token: <span class="ramp" aria-hidden="true"></span> lowered (orange) to '
        "raised (blue)</span><span>underlined: the base's likeliest token was another</span><span>point at a token, or "
        "use the arrow keys in a reply, to see what each model gave it</span></p>"
    )
    by = (
        '<label>colour by<select id="by"><option value="gain">steered minus base probability</option>'
        '<option value="tuning">expert minus anti probability</option>'
        '<option value="surprise">how unlikely the base found it</option></select></label>'
    )
    scored = bool(found.generations.scores)
    options = '<option value="better">steered scores better than base</option><option value="worse">worse</option>'
    return (
        f"<p>{escape(note)}</p>{heated if told else ''}<noscript><p>This part needs JavaScript.</p></noscript>"
        '<div class="controls"><label>search<input id="search" type="search"></label>'
        f'<label>show<select id="filter"><option value="all">all</option>{options if scored else ""}</select></label>'
        f"{by if told else by.replace('<label>', '<label hidden>')}"
        '<button id="previous" type="button">previous</button><button id="next" type="button">next</button>'
        '<span id="place" role="status"></span></div><div id="replies"></div>'
    )


def _provenance(found: Found) -> str:
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(told)}</dd>" for name, told in found.terms.items() if told)
    settings = escape(json.dumps(found.settings, indent=2, ensure_ascii=False))
    commands = escape("\n".join(found.commands))
    return (
        f'<dl class="terms">{terms}</dl><h3>The commands that make it again</h3><pre>{commands}</pre>'
        f"<details><summary>all settings</summary><pre>{settings}</pre></details>"
    )


def _pictures(drawn: Iterable[Panel]) -> str:
    framed = (f"<figure><figcaption>{escape(one.title)}</figcaption>{canvas.svg(one)}</figure>" for one in drawn)
    return f'<div class="pictures">{"".join(framed)}</div>'


def _table(about: str, titles: Sequence[str], rows: Iterable[tuple[str, Sequence[str], str]]) -> str:
    """rows: name, cells, class."""
    lines = "".join(
        f'<tr class="{kind}"><th scope="row"><span class="{kind.partition(" ")[0]}">{escape(name)}</span></th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, cells, kind in rows
    )
    return _framed(about, _heads(titles), lines)


def _heads(titles: Sequence[str]) -> str:
    return "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)


def _framed(about: str, heads: str, rows: str) -> str:
    """A table that scrolls by itself where the window is narrow, by keyboard too."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(about)}"><table>'
        f"<caption>{escape(about)}</caption><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _alphas(summary: Summary) -> int:
    return sum(row["system"] == "steered" for row in summary["rows"])


def _alpha_of(row: Mapping[str, Any]) -> str:
    return "-" if row["alpha"] is None else f"{row['alpha']:g}"


def _class(row: Mapping[str, Any], summary: Summary) -> str:
    best = row["system"] == "steered" and row["alpha"] == summary["chosen"] and _alphas(summary) > 1
    return row["system"] + (" best" if best else "")
