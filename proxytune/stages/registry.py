"""`proxytune registry list | show | tag | remove | export | import | push | pull`: for people and for scripts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from proxytune.errors import SettingsError, did_you_mean
from proxytune.experts.registry import Expert, Registry

_EMPTY = "No expert is registered yet. Make one: proxytune expert task=code"


def main(arguments: list[str]) -> int:
    """Run one command line, without its leading `proxytune registry`. Errors are raised as ProxytuneError."""
    given = _parser().parse_args(arguments)
    return given.run(Registry(given.outputs / "registry"), given)


def loss_of(scores: Mapping[str, Any]) -> float | None:
    """The loss per token that speaks for an expert: on test rows, else on validation rows."""
    for split in ("test", "validation"):
        of_split = scores.get(split)
        loss = of_split.get("loss") if isinstance(of_split, Mapping) else None
        if isinstance(loss, int | float):
            return loss
    return None


def _list(registry: Registry, given: argparse.Namespace) -> int:
    experts = registry.experts()
    if given.json:
        _print_json([_record(registry, expert) for expert in experts])
    elif experts:
        _print_table(registry, experts)
    else:
        print(_EMPTY)
    return 0


def _show(registry: Registry, given: argparse.Namespace) -> int:
    expert = registry.resolve(given.reference)
    if given.json:
        _print_json(_record(registry, expert))
        return 0
    lines = list(_lineage(registry, expert))
    width = max(len(label) for label, _ in lines)
    for label, value in lines:
        print(f"{label:<{width}}  {value}".rstrip())
    return 0


def _tag(registry: Registry, given: argparse.Namespace) -> int:
    expert = registry.tag(given.reference, given.alias)
    print(f"{expert.name}@{given.alias} now means {expert.reference}")
    return 0


def _remove(registry: Registry, given: argparse.Namespace) -> int:
    print(f"{registry.remove(given.reference, force=given.force)} is removed")
    return 0


def _export(registry: Registry, given: argparse.Namespace) -> int:
    from proxytune.experts import archive

    expert = registry.resolve(given.reference)
    size = archive.write(registry, expert, given.file).stat().st_size
    print(f"{expert.reference} is in {given.file}, {size / 1e6:,.1f} MB")
    return 0


def _import(registry: Registry, given: argparse.Namespace) -> int:
    from proxytune.experts import archive

    return _taken(archive.read(registry, given.file, given.name))


def _push(registry: Registry, given: argparse.Namespace) -> int:
    from proxytune.experts import hub

    expert = registry.resolve(given.reference)
    repo = _values(given.hub, "hub")["hub"]
    tags = [tag for tag in _tags(registry, expert) if tag != "latest"]
    commit = hub.push(registry, expert, repo, tags, public=given.public)
    print(f"{expert.reference} is at {repo}: proxytune registry pull hub={repo} revision={commit}")
    return 0


def _pull(registry: Registry, given: argparse.Namespace) -> int:
    from proxytune.experts import hub

    values = _values(given.hub, "hub", "revision")
    return _taken(hub.pull(registry, values["hub"], values.get("revision"), given.name))


def _values(words: list[str], *known: str) -> dict[str, str]:
    """key=value words; the first known key must be among them."""
    values = dict(word.partition("=")[::2] for word in words)
    for key, value in values.items():
        if key not in known:
            raise SettingsError(f"unknown key {key!r}", did_you_mean(key, known))
        if not value:
            raise SettingsError(f"{key} needs a value", f"{key}=...")
    if known[0] not in values:
        raise SettingsError(f"{known[0]}= is missing", "for instance hub=my-org/code-expert")
    return values


def _taken(expert: Expert) -> int:
    came = expert.manifest.origins[-1]
    at = f" at {came.revision}" if came.revision else ""
    print(f"{expert.reference} is registered: {came.reference} of {came.source}{at}")
    return 0


def _tags(registry: Registry, expert: Expert) -> list[str]:
    return sorted(tag for tag, version in registry.tags(expert.name).items() if version == expert.version)


def _record(registry: Registry, expert: Expert) -> dict[str, Any]:
    about = {"reference": expert.reference, "tags": _tags(registry, expert), "folder": str(expert.folder)}
    return about | expert.manifest.model_dump(mode="json")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _print_table(registry: Registry, experts: list[Expert]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("expert", "tags", "task", "family", "kind", "role", "anti", "alpha", "loss", "created (UTC)"):
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
        known.created[:16].replace("T", " "),
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
    """Nested values under dotted names, as they are given on a command line."""
    yield title, "" if values else "-"
    for key, value in _flat(values):
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


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as every other error here is told."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message, f"{self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="proxytune registry",
        description="Look at and look after the registered experts.",
        epilog="REF is code (its newest version), code@v3, code@latest, code@best, or a tag of yours: code@mine.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")

    def add(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary, epilog=parser.epilog)
        command.set_defaults(run=run)
        where = "folder that holds registry/ (default: %(default)s)"
        command.add_argument("--outputs", type=Path, default=Path("outputs"), metavar="DIR", help=where)
        return command

    listing = add("list", _list, "All experts in a table.")
    listing.add_argument("--json", action="store_true", help="everything known, as a JSON list")
    show = add("show", _show, "Where an expert comes from, how it scored, and where its files lie.")
    show.add_argument("reference", metavar="REF", help="which expert")
    show.add_argument("--json", action="store_true", help="everything known, as one JSON object")
    tag = add("tag", _tag, "Give a version a name of its own, or move that name to it.")
    tag.add_argument("reference", metavar="REF", help="which expert")
    tag.add_argument("alias", metavar="ALIAS", help="a-z, 0-9 and '-', first a letter; for instance best")
    remove = add("remove", _remove, "Delete a version; its number is never given again.")
    remove.add_argument("reference", metavar="REF", help="which expert")
    remove.add_argument("--force", action="store_true", help="even if it is tagged; its tags go too")
    export = add("export", _export, "Write a version to one file, to be read by import elsewhere.")
    export.add_argument("reference", metavar="REF", help="which expert")
    export.add_argument("file", metavar="FILE", type=Path, help="a new file, for instance code.tar")
    taken = add("import", _import, "Register the expert in a file: checked first, and given a number of its own here.")
    taken.add_argument("file", metavar="FILE", type=Path, help="what export wrote")
    taken.add_argument("--name", help="what to call it here (default: its own name)")
    push = add("push", _push, "Make a repository of the hub hold a version, with a model card.")
    push.add_argument("reference", metavar="REF", help="which expert")
    push.add_argument("hub", metavar="hub=ORG/NAME", nargs="+", help="which repository; made if it is not there")
    push.add_argument("--public", action="store_true", help="a repository that this makes is public, not private")
    pull = add("pull", _pull, "Register the expert in a repository of the hub: checked first, as by import.")
    pull.add_argument("hub", metavar="KEY=VALUE", nargs="+", help="hub=ORG/NAME, and revision=COMMIT to pin it")
    pull.add_argument("--name", help="what to call it here (default: its own name)")
    return parser
