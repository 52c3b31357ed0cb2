"""What steering changed in replies that are written, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxytune.analysis import changes
from proxytune.decoding.request import variant
from proxytune.errors import DataError
from proxytune.evaluation import batches
from proxytune.evaluation.benchmarks.benchmark import Prompt
from proxytune.evaluation.system import System, of_trio
from proxytune.experts.registry import Expert
from proxytune.files import Journal, finish, hash_json, part_of, read_finished, write_json
from proxytune.models.prompts import Turns
from proxytune.settings import Analyze, Evaluate
from proxytune.stages import evaluate
from proxytune.stages.decode import read_row
from proxytune.stages.shared import past
from proxytune.stages.shared import trio as trios
from proxytune.stages.shared.past import Past
from proxytune.stages.shared.room import in_smaller_batches
from proxytune.stages.shared.start import limit_threads, start
from proxytune.tracking import record
from proxytune.tracking.progress import track

TOKENS = "tokens.json"  # in the run's folder, and in that of the run that was looked at
CLASSES = {"math": "math", "code": "code", "gsm8k": "math", "humaneval": "code", "ds1000": "code"}  # else text
# what is asked of the analysis; all else is the run's
OWN = "run replies system classes top min_uses bootstrap_samples score_batch_size tracker threads command".split()


@dataclass(frozen=True)
class Written:
    """A reply to look at. ids: as they were said, where that is known."""

    id: str
    prompt: Turns | Prompt
    text: str
    ids: Sequence[int] | None = None


def run(settings: Analyze) -> dict[str, Any]:
    """Analyse, print the tables, write tokens.json and print its path last; returns its content."""
    from proxytune.analysis import tables, token_figures, token_tables

    of = past.read(settings.run) if settings.run else None
    settings = _as_in(of, settings) if of else settings
    expert = trios.find(settings)
    alpha = _alpha(settings, expert, of)
    limit_threads(settings)
    written = replies(settings, expert, alpha, of)
    with start(settings, "analyze", [settings.expert.replace("@", "-")], alpha=alpha) as tracked:
        rows, path = records(settings, expert, alpha, written)
        about = of.summary["task"] if of and of.summary else settings.task.name
        classes = CLASSES.get(about, "text") if settings.classes == "auto" else settings.classes
        summary = {
            "task": about,
            "family": settings.family.name,
            "expert": expert.reference,
            "system": settings.system,
            "alpha": alpha,
            **changes.summarise(
                rows, classes, min_uses=settings.min_uses, samples=settings.bootstrap_samples, seed=settings.seed
            ),
            "records": str(path.relative_to(settings.outputs)),
            "command": settings.command,
            "commit": record.code_version()["commit"] or "",
        }
        for folder in dict.fromkeys([tracked.folder, *([of.folder] if of else [])]):
            write_json(folder / TOKENS, summary, checked=True)
        tables.console().print(token_tables.tokens(summary))
        for name, picture in token_figures.save(summary, tracked.folder).items():
            tracked.image(name, picture)
        _mirror(tracked, summary, expert)
    print(tracked.folder / TOKENS)
    return summary


def _as_in(of: Past, settings: Analyze) -> Analyze:
    """The run's settings, and of these what is asked of the analysis."""
    kept = {name: getattr(settings, name) for name in OWN}
    if settings.alpha is not None:
        kept["alpha"] = settings.alpha
    if settings.base_model is not None:  # a run with a base behind an API needs one that is here
        kept |= {"base_model": settings.base_model, "base": None}
    return of.settings(Analyze, **kept)


def _alpha(settings: Analyze, expert: Expert, of: Past | None) -> float:
    """The one asked for, else that which the run was judged at."""
    if settings.alpha is None and of is not None and of.summary is not None and of.summary["chosen"] is not None:
        return of.summary["chosen"]
    return trios.alpha_of(settings, expert)


def replies(settings: Analyze, expert: Expert, alpha: float, of: Past | None = None) -> list[Written]:
    """The replies to look at, in their order. Raises DataError where there is none."""
    if settings.replies is not None:
        return _from_file(settings.replies)
    if of is not None and of.summary is None:
        found = [
            Written(row["id"], row["prompt"], row["text"], row["token_ids"])
            for row in of.replies()
            if row["system"] == settings.system
        ]
    else:
        found = _evaluated(settings, expert, alpha, of)
    if not found:
        raise DataError(f"there are no replies of {settings.system}", "name a run that has some, or another system=")
    return found


def _evaluated(settings: Analyze, expert: Expert, alpha: float, of: Past | None) -> list[Written]:
    """Those that an evaluation kept beside its summary; of a task they are written first where they are missing."""
    changes: dict[str, Any] = {"generate": True, "alpha": alpha, "alphas": [], "command": settings.command}
    if of is not None:
        asked = of.settings(Evaluate, **changes, threads=settings.threads)
    else:
        given = {name: getattr(settings, name) for name in Evaluate.model_fields if name in Analyze.model_fields}
        asked = Evaluate(**given | changes)
    own = alpha if settings.system == "steered" else None
    rows = of.rows(settings.system, own) if of else []
    if not rows and asked.benchmark is None:
        rows = evaluate.measure(asked, expert, evaluate.asked(asked, expert), [alpha]).get((settings.system, own), [])
    questions = past.questions(asked) if rows else {}
    return [
        Written(row["id"], questions[row["id"]][0], row["text"], row.get("token_ids"))
        for row in rows
        if row["id"] in questions
    ]


def _from_file(path: Path) -> list[Written]:
    """Rows with prompt (or messages) and text (or completion). DataError names the line of a broken one."""
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}", "replies= takes a JSONL file") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            asked, row = read_row(path, number, line)
            text, ids = row.get("text", row.get("completion")), row.get("token_ids")
            if not isinstance(text, str) or not (ids is None or _are_ids(ids)):
                what = f"{path} line {number} is no reply: {line[:60]}"
                raise DataError(what, 'give {"prompt": "...", "text": "..."}; token_ids, if any, are a list of numbers')
            found.append(Written(asked["id"], asked["prompt"], text, ids))
    if not found:
        raise DataError(f"{path} is empty", "give at least one reply")
    return found


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def records(
    settings: Analyze, expert: Expert, alpha: float, written: Sequence[Written]
) -> tuple[list[dict[str, Any]], Path]:
    """The records of all replies (analysis/tokens.py), and where they are kept under a name that is their content's."""
    from proxytune.analysis import tokens

    beside = trios.held(settings)
    content = {
        "version": tokens.VERSION,
        "replies": [[one.id, past.shown(one.prompt), one.text, one.ids] for one in written],
        "models": trios.identity(settings, expert, beside),
        "alpha": alpha,
        "rules": [settings.decode.base_top_p, settings.decode.alpha_by, settings.decode.alpha_steps],
        "top": settings.top,
        "dtype": settings.family.dtype,
    }
    name = f"tokens-{settings.task.name}-{settings.system}-{hash_json(content)[:24]}.jsonl"
    path = settings.outputs / "analysis" / name
    if (known := read_finished(path)) is not None:
        return known, path
    trio = trios.load(settings, expert, beside)
    (system,) = of_trio(trio, {"steered": trios.mixtures(trio)["steered"]})
    alphas = trios.alphas(system.mixture, alpha, beside)

    def looked_at(some: Sequence[Written]) -> list[list[dict[str, Any]]]:
        (found,) = tokens.records(
            system.mixture,
            [_said(system, one) for one in some],
            alphas,
            system.tokenizer,
            variant=variant(settings.decode),
            top=settings.top,
            batch_size=len(some),
        )
        return [[record] for record in found]

    def at_most(size: int) -> list[dict[str, Any]]:
        found = batches.scored(looked_at, written, size, [Journal(part_of(path))])
        return [record for (record,) in track(found, "tokens", len(written))]

    found = in_smaller_batches(at_most, settings.score_batch_size)
    finish(path, found)
    return found, path


def _said(system: System, one: Written):
    """A reply's ids: those that were said, without what a stop string cut off, or those that spell its text."""
    from proxytune.analysis.tokens import Said

    if one.ids is None:
        plain = one.prompt.plain if isinstance(one.prompt, Prompt) else one.prompt
        ids = system.encode_completion(plain, one.text, ended=False) if one.text else []
    elif max(one.ids, default=0) >= system.mixture.vocabulary.size:
        raise DataError(f"the reply {one.id!r} has token ids that these models do not know", "leave token_ids out")
    else:
        ids = list(one.ids)
        while ids and system.tokenizer.decode(ids[:-1], skip_special_tokens=True).startswith(one.text):
            ids.pop()  # the end token, and whatever stands behind the text
    return Said(one.id, past.shown(one.prompt), system.encode(one.prompt), ids)


def _mirror(tracked: record.Run, summary: Mapping[str, Any], expert: Expert) -> None:
    """Numbers and tables to the record and its mirror."""
    tracked.summary({name: one["value"] for name, one in summary["overall"].items()})
    figures = ("changed", "gain", "kl", "base_agrees")
    rows = [[one["class"], one["tokens"], *(one[name]["value"] for name in figures)] for one in summary["by_class"]]
    tracked.table("tokens by class", ("class", "tokens", *figures), rows)
    movers = [(name, one) for name in ("promoted", "demoted") for one in summary[name]]
    columns = ("which", "token", "uses", "change", "context")
    tracked.table(
        "tokens moved",
        columns,
        [
            [name, one["token"], one["uses"], one["change"], "".join(one["contexts"][0]) if one["contexts"] else ""]
            for name, one in movers
        ],
    )
    tracked.use(expert.reference, "model", {"folder": str(expert.folder)})
    tracked.artifact(f"{expert.name}-tokens", "result", tracked.folder / TOKENS, {}, uses=[expert.reference])
