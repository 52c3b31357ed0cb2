"""Write replies to prompts with a steered base, or with base, expert and steered side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from proxytune.decoding.engine import build
from proxytune.decoding.request import Reply, Request, sampling, variant
from proxytune.decoding.streaming import Pieces
from proxytune.errors import DataError, ProxytuneError
from proxytune.files import check_target, write_jsonl
from proxytune.models.identity import stamp
from proxytune.models.prompts import Turns, plain_text
from proxytune.models.trio import Trio
from proxytune.settings import DecodeStage
from proxytune.stages.shared import trio as trios
from proxytune.stages.shared.kept import Kept
from proxytune.stages.shared.room import in_smaller_batches
from proxytune.stages.shared.served import Writing, certificate
from proxytune.stages.shared.start import start
from proxytune.stages.shared.trio import Held
from proxytune.tasks import catalog
from proxytune.tasks.rows import check_whole
from proxytune.tracking.progress import track

Prompt = dict[str, Any]


def run(settings: DecodeStage) -> list[dict[str, Any]]:
    """Decode all prompts and return the records that are also written as JSONL.

    A single prompt on a terminal is streamed; `compare=true` shows the systems side by side. With a base behind an API
    what is finished is written, and kept for the same command, when a fault or a spent budget ends the run.
    """
    if settings.out:
        check_target(settings.out)
    asked = read_prompts(settings.prompt, settings.prompts)
    expert = trios.find(settings)
    settings = trios.pinned(settings, expert)
    beside = trios.held(settings)
    alpha = trios.alpha_of(settings, expert)
    experts = [(expert, alpha), *beside]
    trio = trios.load(settings, expert, beside)
    content = _content(settings, experts, asked)
    served = Writing(settings, trio, content) if settings.base else None
    kept = Kept(settings.outputs, content)
    streams = len(asked) == 1 and not settings.compare
    with start(settings, "decode", alpha=alpha, out=settings.out and settings.out.absolute()) as tracked:
        out = settings.out or tracked.folder / "replies.jsonl"
        systems = ("base", "expert", "steered") if settings.compare else ("steered",)
        records: list[dict[str, Any]] = []
        try:
            for system in systems:
                records += write(settings, trio, experts, system, asked, kept, stream=streams, served=served)
        except ProxytuneError:
            if served:
                finished = [row for s in systems for row in _records(settings, experts, s, asked, served.kept(s))]
                write_jsonl(out, finished)
                print(f"replies: {out} has the {len(finished)} that are finished", file=sys.stderr)
            raise
        if settings.compare:
            show(asked, records)
        elif not streams and settings.out is None:
            _show_list(records)
        write_jsonl(out, records)
        if served:
            tracked.summary(served.measured)
        columns = ["id", "prompt", "system", "alpha", "text"]
        tracked.table("generations", columns, [[_flat(row[column]) for column in columns] for row in records])
        tracked.use(expert.reference, "model", {"folder": str(expert.folder)})
    for journal in [kept.journal, *([served.journal] if served else [])]:
        journal.remove()  # last: until then a killed run goes on from it
    print(f"replies: {out}", file=sys.stderr)
    return records


def write(
    settings: DecodeStage,
    trio: Trio,
    experts: Held,
    system: str,
    asked: Sequence[Prompt],
    kept: Kept | None = None,
    *,
    stream: bool = False,
    served: Writing | None = None,
) -> list[dict[str, Any]]:
    """The records of one system's replies, in the prompts' order. experts: all of them, each with its alpha."""
    limits = trios.limits(settings, catalog.get(settings.task.name), trio.end_ids)
    tokenizer, how = trio.tokenizers["base"], variant(settings.decode)
    alphas = tuple(alpha for _, alpha in experts)
    remote = served if served and system in served.systems else None
    mixture = None if remote else trios.mixtures(trio)[system]
    if mixture is None:
        alphas = alphas if system == "steered" else (0.0,) * len(alphas)
    elif not mixture.pairs:
        alphas = ()
    requests = [
        Request(trio.encode(row["prompt"]), limits, alphas, sampling(settings.decode, place), how)
        for place, row in enumerate(asked)
    ]
    pieces = Pieces(limits, tokenizer)

    def show_piece(_: int, reply: Reply) -> None:
        print(pieces.next(reply), end="" if reply.finish_reason is None else "\n", flush=True)

    def answered(rows: int) -> dict[int, Reply]:
        if remote:
            answer = partial(remote.run, system, rows)
        else:
            assert mixture is not None
            answer = build(mixture, tokenizer, settings.decode.at_most(rows)).run
            answer = partial(kept.run, system, answer) if kept else answer
        found = answer(requests, on_token=show_piece if stream else None)
        return dict(found if stream else track(found, f"{system}: replies", len(asked)))

    most = min(settings.decode.batch_size, len(asked))
    replies = in_smaller_batches(answered, remote.served.at_once(most) if remote else most)
    return _records(settings, experts, system, asked, replies)


def _records(
    settings: DecodeStage,
    experts: Held,
    system: str,
    asked: Sequence[Prompt],
    replies: Mapping[int, Reply],
) -> list[dict[str, Any]]:
    (expert, alpha), *beside = experts
    models = {"base": trios.base_name(settings), "expert": expert.reference, "anti": expert.manifest.anti.model}
    for number, (other, other_alpha) in enumerate(beside, 2):
        models[f"expert{number}"] = f"{other.reference} at {other_alpha:g}"
    used = {"base": ("base",), "expert": ("expert",), "steered": tuple(models)}[system]
    return [
        {
            "id": row["id"],
            "prompt": row["prompt"],
            "system": system,
            "text": replies[place].text,
            "token_ids": replies[place].token_ids,
            "alpha": alpha if system == "steered" else None,
            "finish_reason": replies[place].finish_reason,
            "models": {role: models[role] for role in used},
            "seed": settings.decode.seed + place,
            **certificate(replies[place]),
        }
        for place, row in enumerate(asked)
        if place in replies
    ]


def _content(settings: DecodeStage, experts: Held, asked: Sequence[Prompt]) -> dict[str, Any]:
    """All that decides what is said, the server aside. A base that is here may be of any size: it is not hashed."""
    return {
        "asked": asked,
        "experts": [[trios.weights_of(one), one.manifest.prompt_format, its_alpha] for one, its_alpha in experts],
        "base": [settings.base_ref.model_dump(), [] if settings.base else stamp(settings.base_ref)],
        "decode": settings.decode.content(),
        "task": settings.task.model_dump(),
        "dtype": settings.family.dtype,
    }


def read_prompts(prompt: str | None, prompts: str | None) -> list[Prompt]:
    """Prompts from the argument, a JSONL file (prompt or messages, id optional), a text file (one a line), stdin (`-`).

    Raises DataError naming the line of a broken row, or saying that there is nothing to decode.
    """
    if prompt is not None and prompts is not None:
        raise DataError("both prompt= and prompts= are given", "give one of them")
    if prompt is None and prompts is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise DataError("there is no prompt", "give prompt='...', prompts=FILE, or pipe text in")
        prompts = "-"
    if prompt is not None:
        rows = _single(prompt, "the prompt")
    elif prompts == "-":
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise DataError("standard input is not UTF-8 text", "pipe text in") from error
        rows = _single(text.rstrip("\n"), "standard input") if text.strip() else []
    else:
        rows = _read_file(Path(prompts or ""))
    if not rows or any(not plain_text(row["prompt"]).strip() for row in rows):
        raise DataError(
            f"{'the prompt' if prompt is not None else prompts} is empty", "give at least one prompt with text"
        )
    if spaced := sum(plain_text(row["prompt"]).endswith((" ", "\t")) for row in rows):
        told = "the prompt ends" if len(rows) == 1 else f"{spaced} of {len(rows)} prompts end"
        print(f"proxytune: {told} in a space, which belongs to the next word: better without", file=sys.stderr)
    return rows


def _read_file(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # not splitlines: JSON may hold U+2028
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "prompts= takes a JSONL or text file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text", "prompts= takes a JSONL or text file") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix.lower() not in (".jsonl", ".json"):
        return [{"id": str(number), "prompt": line} for number, line in numbered]
    found: dict[str, Prompt] = {}
    for number, line in numbered:
        row, _ = read_row(path, number, line)
        if row["id"] in found:
            raise DataError(f"{path} line {number}: the id {row['id']!r} is already that of another prompt")
        found[row["id"]] = row
    return list(found.values())


def read_row(path: Path, number: int, line: str) -> tuple[Prompt, Mapping[str, Any]]:
    """(id and prompt, all that the row holds) of a line of JSON; a row without an id is called by its line."""
    try:
        row = json.loads(line)
        turns: Turns = row["prompt"] if "prompt" in row else row["messages"]
        if not turns or not isinstance(plain_text(turns), str):
            raise TypeError
        if not isinstance(turns, str) and not all(isinstance(turn["role"], str) for turn in turns):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(
            f"{path} line {number} is not a prompt: {line[:60]}", 'give {"prompt": "..."} or {"messages": [...]}'
        ) from None
    check_whole(row, f"{path} line {number}", "give UTF-8 text")
    return {"id": str(number if row.get("id") in (None, "") else row["id"]), "prompt": turns}, row


def _single(prompt: str, where: str) -> list[Prompt]:
    check_whole(prompt, where, "give UTF-8 text")
    return [{"id": "0", "prompt": prompt}]


def show(asked: Sequence[Prompt], records: Sequence[dict[str, Any]], lines: int | None = None) -> None:
    """Every prompt with the replies to it, whole or their first `lines`."""
    from proxytune.analysis import tables

    console = tables.console()
    for row in asked:
        texts = {record["system"]: record["text"] for record in records if record["id"] == row["id"]}
        console.print(tables.generations(plain_text(row["prompt"]), texts, console.width, lines))


def _show_list(records: Sequence[dict[str, Any]]) -> None:
    for row in records:
        print(json.dumps({"id": row["id"], "text": row["text"]}, ensure_ascii=False))


def _flat(value: Any) -> Any:
    return plain_text(value) if isinstance(value, list) else value
