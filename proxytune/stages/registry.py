"""What `proxytune registry` does and prints, for people and for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from proxytune.experts.registry import Expert, Registry

_EMPTY = "No expert is registered yet. Make one: proxytune expert task=code"


def loss_of(scores: Mapping[str, Any]) -> float | None:
    """The loss per token that speaks for an expert: on test rows, else on validation rows."""
    for split in ("test", "validation"):
        of_split = scores.get(split)
        loss = of_split.get("loss") if isinstance(of_split, Mapping) else None
        if isinstance(loss, int | float):
            return loss
    return None


def show_all(registry: Registry, as_json: bool) -> None:
    experts = registry.experts()
    if as_json:
        _print_json([_record(registry, expert) for expert in experts])
    elif experts:
        _print_table(registry, experts)
    else:
        print(_EMPTY)


def show(registry: Registry, reference: str, as_json: bool) -> None:
    expert = registry.resolve(reference)
    if as_json:
        _print_json(_record(registry, expert))
        return
    lines = list(_lineage(registry, expert))
    width = max(len(label) for label, _ in lines)
    for label, value in lines:
        print(f"{label:<{width}}  {value}".rstrip())


def tag(registry: Registry, reference: str, alias: str) -> None:
    expert = registry.tag(reference, alias)
    print(f"{expert.name}@{alias} now means {expert.reference}")


def remove(registry: Registry, reference: str, force: bool) -> None:
    print(f"{registry.remove(reference, force=force)} is removed")


def export(registry: Registry, reference: str, file: Path) -> None:
    from proxytune.experts import archive

    expert = registry.resolve(reference)
    size = archive.write(registry, expert, file).stat().st_size
    print(f"{expert.reference} is in {file}, {size / 1e6:,.1f} MB")


def take(registry: Registry, file: Path, name: str | None) -> None:
    """What `export` wrote."""
    from proxytune.experts import archive

    _taken(archive.read(registry, file, name))


def push(registry: Registry, reference: str, repo: str, public: bool) -> None:
    from proxytune.experts import hub

    expert = registry.resolve(reference)
    tags = [tag for tag in _tags(registry, expert) if tag != "latest"]
    commit = hub.push(registry, expert, repo, tags, public=public)
    print(f"{expert.reference} is at {repo}: proxytune registry pull hub={repo} revision={commit}")


def pull(registry: Registry, repo: str, revision: str | None, name: str | None) -> None:
    from proxytune.experts import hub

    _taken(hub.pull(registry, repo, revision, name))


def _taken(expert: Expert) -> None:
    came = expert.manifest.origins[-1]
    at = f" at {came.revision}" if came.revision else ""
    print(f"{expert.reference} is registered: {came.reference} of {came.source}{at}")


def _tags(registry: Registry, expert: Expert) -> list[str]:
    return sorted(tag for tag, version in registry.tags(expert.name).items() if version == expert.version)


def _record(registry: Registry, expert: Expert) -> dict[str, Any]:
    about = {"reference": expert.reference, "tags": _tags(registry, expert), "folder": str(expert.folder)}
    return about | expert.manifest.model_dump(mode="json")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _print_table(registry: Registry, experts: list[Expert]) -> None:
    from rich.console import Console
    from rich.text import Text

    from proxytune.analysis.tables import tight

    table = tight()
    for heading in ("expert", "tags", "task", "family", "kind", "role", "anti", "alpha", "loss", "created"):
        table.add_column(heading, justify="right" if heading in ("alpha", "loss") else "left", overflow="fold")
    for expert in experts:
        table.add_row(*map(Text, _cells(registry, expert)))
    # A pipe has no width: give every row one line there.
    Console(width=None if sys.stdout.isatty() else 240).print(table)


def _cells(registry: Registry, expert: Expert) -> list[str]:
    known = expert.manifest
    return [
        expert.reference,
        ", ".join(_tags(registry, expert)),
        known.task,
        known.family,
        known.kind,
        known.role,
        known.anti.model,
        _number(known.alpha),
        _number(loss_of(known.scores)),
        known.created[:10],
    ]


def _lineage(registry: Registry, expert: Expert) -> Iterator[tuple[str, str]]:
    """Label and value of each line of `show`."""
    known = expert.manifest
    anti, data = known.anti, known.data
    role = "steers a larger base" if known.role == "expert" else "a base tuned directly, to compare with"
    size = sum(entry.size for entry in known.files.values())
    yield "expert", expert.reference
    yield "tags", ", ".join(_tags(registry, expert)) or "-"
    yield "created", known.created
    for before in known.lineage:
        rows = f"{before.data.train:,} rows of {before.data.source}"
        yield "went on from", f"{before.reference}: {before.method} on {rows}"
    for came in known.origins:
        at = f" at {came.revision}" if came.revision else ""
        yield "taken from", f"{came.reference} of {came.source}{at}, {came.taken}"
    yield "role", f"{known.role}: {role}"
    yield "kind", "LoRA adapter" if known.kind == "lora" else "whole model"
    yield "task", f"{known.task}, prompts in {known.prompt_format} form"
    yield "family", known.family
    yield "tuned from", anti.model + (f" at revision {anti.revision}" if anti.revision else "")
    yield "  weights", f"sha256 {anti.weights}"
    yield "  tokenizer", f"sha256 {anti.tokenizer}"
    yield "rows", f"{data.source}: {data.train:,} train, {data.validation:,} validation, {data.test:,} test"
    yield "  fingerprint", data.fingerprint
    yield "alpha", "not chosen yet: proxytune sweep" if known.alpha is None else _number(known.alpha)
    yield from _section("scores", known.scores)
    yield from _section("training", known.training)
    yield "command", known.command
    yield "code", f"proxytune {known.code.version}" + (f", commit {known.code.commit}" if known.code.commit else "")
    yield from _section("settings", known.config)
    yield "files", f"{len(known.files)} in {expert.folder}, {size / 1e6:,.1f} MB"
    for path, entry in known.files.items():
        yield f"  {path}", f"{entry.size:,} bytes, sha256 {entry.sha256}"


def _section(title: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Nested values under dotted names, as they are given on a command line; those that are null are left out."""
    yield title, "" if values else "-"
    for key, value in _flat(values):
        if value is not None:
            yield f"  {key}", _told(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _told(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(inner, list | Mapping) for inner in value):
        return f"{len(value)} rows, see --json"
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
