"""One HTML file of what a run found, its pictures as PNG, and a record of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proxytune.errors import ProxytuneError
from proxytune.evaluation.summary import SCORES, SYSTEMS, better, spoken
from proxytune.experts.registry import Expert, Registry
from proxytune.files import check_target, read_checked, read_json, read_jsonl, write_atomic
from proxytune.settings import Analyze, Evaluate
from proxytune.stages.shared import past
from proxytune.stages.shared.past import Past
from proxytune.stages.shared.start import start

NAME, PICTURES = "report.html", "pictures"  # in the run's folder


def run(
    folder: Path,
    *,
    out: Path | None = None,
    generations: int = 500,
    tokens: bool = True,
    tracker: str | None = None,
    command: str = "",
) -> Path:
    """Write the report of a run and print its path last; returns the path."""
    from proxytune.analysis import canvas, report

    if out:
        check_target(out)
    of = past.read(folder)
    changes: dict[str, Any] = {"command": command}
    if tracker:
        changes["tracker"] = of.settings(Evaluate).tracker.model_copy(update={"name": tracker})
    settings = of.settings(Evaluate, **changes)
    told, missing = _tokens(of, tokens, changes)
    found = _found(of, settings, told, missing, command)
    target = out or of.folder / NAME
    with start(settings, "report", [of.stage]) as tracked:
        write_atomic(target, report.page(found, generations))
        drawn = report.panels(found)
        if drawn:
            picture = target.parent / PICTURES / "report.png"
            canvas.png(drawn, picture, found.title, "")
            tracked.image("report", picture)
        name = of.expert.partition("@")[0] or settings.task.name
        tracked.artifact(f"{name}-report", "result", target, {"of": of.folder.name}, uses=[of.expert])
    print(target)
    return target


def _tokens(of: Past, wanted: bool, changes: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, list[str]]:
    """What steering changed, scored now where that was not done; else None and why."""
    from proxytune.stages import analyze  # torch, which a folder that no run left does not wait for

    path = of.folder / analyze.TOKENS
    kept = read_json(path) if path.is_file() else None
    alpha = of.summary["chosen"] if of.summary else None
    fits = kept and kept["system"] == "steered" and (alpha is None or kept["alpha"] == alpha)
    if fits and (of.outputs / kept["records"]).is_file():
        return kept, []
    again = f"proxytune analyze run={of.folder}"
    if not wanted or not _has_replies(of):
        return None, [f"Tokens were not looked at: {again} does that."]
    try:
        asked = of.settings(Analyze, run=of.folder, **{**changes, "command": again})
        return analyze.run(asked), []
    except ProxytuneError as error:
        return None, [f"Tokens could not be looked at: {error}"]


def _has_replies(of: Past) -> bool:
    """Whether there is something to look at without writing it first."""
    return of.summary is None or bool(of.texts("steered", of.summary["chosen"]))


def _found(of: Past, settings: Evaluate, tokens: Mapping[str, Any] | None, missing: Sequence[str], command: str):
    from proxytune.analysis.report import Found

    expert = _expert(of)
    generations, notes = _generations(of, settings, tokens)
    task = of.summary["task"] if of.summary else settings.task.name
    commands = [expert.manifest.command if expert else "", _command(of), tokens["command"] if tokens else "", command]
    return Found(
        title=f"{task} on {settings.family.name}, steered by {of.expert}",
        summary=of.summary,
        tokens=tokens,
        generations=generations,
        terms=_terms(of, settings, expert),
        commands=list(dict.fromkeys(filter(None, commands))),
        settings=of.config,
        notes=[*missing, *notes],
    )


def _generations(of: Past, settings: Evaluate, tokens: Mapping[str, Any] | None):
    """What every system wrote, with its scores; and what could not be found of it."""
    from proxytune.analysis.generations import Generations

    records = read_checked(of.outputs / tokens["records"]) if tokens else []
    looked_at = {record["id"]: record for record in records}
    names = {"base": "base", "expert": "expert alone", "steered": "steered", "tuned": "base, tuned"}
    if of.summary is None:
        replies = of.replies()
        texts = {system: {r["id"]: r["text"] for r in replies if r["system"] == system} for system in SYSTEMS}
        questions = {row["id"]: (past.shown(row["prompt"]), "") for row in replies}
        return Generations(names, questions, texts, tokens=looked_at), []
    chosen, name = of.summary["chosen"], of.summary["rows"][0]["metric_name"]
    names["steered"] = f"steered, alpha {chosen:g}" if chosen is not None else "steered"
    texts = {system: of.texts(system, chosen if system == "steered" else None) for system in SYSTEMS}
    notes: list[str] = []
    questions = {record["id"]: (record["prompt"], "") for record in records}
    try:
        if any(texts.values()):
            questions |= {id: (past.shown(asked), told) for id, (asked, told) in past.questions(settings).items()}
    except ProxytuneError as error:
        notes.append(f"The prompts could not be read again: {error}")
    return Generations(
        names, questions, texts, _scores(of), looked_at, better=better("metric", name) if name else 1
    ), notes


def _scores(of: Past) -> dict[str, dict[str, dict[str, float]]]:
    """By system and row id the value of every metric that counts in it, by its spoken name."""
    path = of.folder / SCORES
    found: dict[str, dict[str, dict[str, float]]] = {}
    for line in read_jsonl(path) if path.is_file() else []:
        if line["system"] == "steered" and line["alpha"] != (of.summary or {})["chosen"]:
            continue
        for name, columns in line["measures"].items():
            if name != "loss":
                for id, one, weight in zip(line["ids"], columns["values"], columns["weights"], strict=True):
                    if weight:
                        found.setdefault(line["system"], {}).setdefault(id, {})[spoken(name)] = one / weight
    return found


def _expert(of: Past) -> Expert | None:
    try:
        return Registry(of.outputs / "registry").resolve(of.expert)
    except ProxytuneError:
        return None


def _command(of: Past) -> str:
    return of.told.get("command") or (of.summary or {}).get("command", "")


def _terms(of: Past, settings: Evaluate, expert: Expert | None) -> dict[str, str]:
    """What the numbers were made with."""
    code = of.told.get("commit") or (of.summary or {}).get("commit") or ""
    terms = {
        "run": of.folder.name,
        "when": f"{of.told['started']} to {of.told['ended']}" if of.told.get("started") else "",
        "code": f"proxytune {of.told.get('version', '')} {code}".strip(),
        "base": settings.base_ref.model + (f" at {settings.base_ref.revision}" if settings.base_ref.revision else ""),
        "expert": of.expert,
    }
    if expert:
        anti, data = expert.manifest.anti, expert.manifest.data
        terms |= {
            "anti": f"{anti.model}{f' at {anti.revision}' if anti.revision else ''}, weights {anti.weights[:16]}",
            "tuned on": f"{data.train:,} rows of {data.source}, fingerprint {data.fingerprint[:16]}",
            "expert's code": f"proxytune {expert.manifest.code.version} {expert.manifest.code.commit or ''}".strip(),
        }
    return terms
