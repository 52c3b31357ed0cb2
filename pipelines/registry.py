"""List, show, tag, remove, export, import, push and pull registered experts.

  proxytune registry list
  proxytune registry show code@latest
  proxytune registry export code@best code.tar             import code.tar registers it elsewhere
  proxytune registry push code@best hub=my-org/code-expert
  proxytune registry pull hub=my-org/code-expert revision=COMMIT

An expert's manifest says what it came from, what it was tuned on, and how well it did.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import cli
from pipelines.parser import Parser
from proxytune.errors import SettingsError, did_you_mean

if TYPE_CHECKING:
    import argparse

REFERENCES = "REF is code (its newest version), code@v3, code@latest, code@best, or a tag of yours: code@mine."


def main(arguments: list[str]) -> int:
    given = parser().parse_args(arguments)

    from proxytune.experts.registry import Registry
    from proxytune.stages import registry as stage

    registry = Registry(given.outputs / "registry")
    match given.command:
        case "list":
            stage.show_all(registry, given.json)
        case "show":
            stage.show(registry, given.reference, given.json)
        case "tag":
            stage.tag(registry, given.reference, given.alias)
        case "remove":
            stage.remove(registry, given.reference, given.force)
        case "export":
            stage.export(registry, given.reference, given.file)
        case "import":
            stage.take(registry, given.file, given.name)
        case "push":
            stage.push(registry, given.reference, values(given.hub, "hub")["hub"], given.public)
        case "pull":
            named = values(given.hub, "hub", "revision")
            stage.pull(registry, named["hub"], named.get("revision"), given.name)
    return 0


def values(words: list[str], *known: str) -> dict[str, str]:
    """key=value words; the first known key must be among them."""
    found = dict(word.partition("=")[::2] for word in words)
    for key, value in found.items():
        if key not in known:
            raise SettingsError(f"unknown key {key!r}", did_you_mean(key, known))
        if not value:
            raise SettingsError(f"{key} needs a value", f"{key}=...")
    if known[0] not in found:
        raise SettingsError(f"{known[0]}= is missing", "for instance hub=my-org/code-expert")
    return found


def parser() -> Parser:
    parser = Parser(
        prog="proxytune registry", description="Look at and look after the registered experts.", epilog=REFERENCES
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary, epilog=REFERENCES)
        where = "folder that holds registry/ (default: %(default)s)"
        command.add_argument("--outputs", type=Path, default=Path("outputs"), metavar="DIR", help=where)
        return command

    def add_for_one(name: str, summary: str) -> argparse.ArgumentParser:
        command = add(name, summary)
        command.add_argument("reference", metavar="REF", help="which expert")
        return command

    listing = add("list", "All experts in a table.")
    listing.add_argument("--json", action="store_true", help="everything known, as a JSON list")
    show = add_for_one("show", "Where an expert comes from, how it scored, and where its files lie.")
    show.add_argument("--json", action="store_true", help="everything known, as one JSON object")
    tag = add_for_one("tag", "Give a version a name of its own, or move that name to it.")
    tag.add_argument("alias", metavar="ALIAS", help="a-z, 0-9 and '-', first a letter; for instance best")
    remove = add_for_one("remove", "Delete a version; its number is never given again.")
    remove.add_argument("--force", action="store_true", help="even if it is tagged; its tags go too")
    export = add_for_one("export", "Write a version to one file, to be read by import elsewhere.")
    export.add_argument("file", metavar="FILE", type=Path, help="a new file, for instance code.tar")
    taken = add("import", "Register the expert in a file: checked first, and given a number of its own here.")
    taken.add_argument("file", metavar="FILE", type=Path, help="what export wrote")
    taken.add_argument("--name", help="what to call it here (default: its own name)")
    push = add_for_one("push", "Make a repository of the hub hold a version, with a model card.")
    push.add_argument("hub", metavar="hub=ORG/NAME", nargs="+", help="which repository; made if it is not there")
    push.add_argument("--public", action="store_true", help="a repository that this makes is public, not private")
    pull = add("pull", "Register the expert in a repository of the hub: checked first, as by import.")
    pull.add_argument("hub", metavar="KEY=VALUE", nargs="+", help="hub=ORG/NAME, and revision=COMMIT to pin it")
    pull.add_argument("--name", help="what to call it here (default: its own name)")
    return parser


if __name__ == "__main__":
    sys.exit(cli.main(["registry", *sys.argv[1:]]))
