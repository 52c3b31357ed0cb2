"""The registry of experts: folders and JSON, readable with any tool, safe with several writers.

    <root>/<name>/v<N>/             a published model's files and its manifest.json
    <root>/<name>/aliases.json      {"best": 3, ...} and a checksum; `latest` is computed, never stored
    <root>/<name>/counter.json      {"last": 3} and a checksum: the highest number ever given
    <root>/.staging/<writer>/       what is being written or deleted; not read by anyone

A version appears, and goes, by one rename, and every JSON file is replaced whole. So readers take no lock and never see
a part, and a writer that is killed leaves a whole version or none.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from proxytune import files
from proxytune.errors import RegistryError, StorageError, did_you_mean
from proxytune.experts.manifest import FILENAME, NAME, Manifest, seal

ALIASES, COUNTER = "aliases.json", "counter.json"

_TAG = re.compile(r"[a-z][a-z0-9-]*")
_VERSION = re.compile(r"v([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Expert:
    name: str
    version: int
    folder: Path
    manifest: Manifest

    @property
    def reference(self) -> str:
        return f"{self.name}@v{self.version}"


def check_name(name: str) -> str:
    if not re.fullmatch(NAME, name):
        hint = "use up to 100 of a-z, 0-9, '.', '_', '-'; first a letter or digit"
        raise RegistryError(f"{name!r} cannot name an expert", hint)
    return name


def check_tag(tag: str) -> str:
    if tag in ("latest", files.CHECK) or re.fullmatch(r"v[0-9]+", tag) or not _TAG.fullmatch(tag):
        hint = f"use a-z, 0-9 and '-', first a letter; not latest, not {files.CHECK}, not v<number>"
        raise RegistryError(f"{tag!r} cannot be a tag", hint)
    return tag


class Registry:
    def __init__(self, root: Path):
        self.root = root.absolute()

    # Reading: no locks.

    def names(self) -> list[str]:
        """Names that have a version."""
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if re.fullmatch(NAME, p.name) and self.versions(p.name))

    def versions(self, name: str) -> list[int]:
        folder = self.root / name
        found = map(_VERSION.fullmatch, os.listdir(folder) if folder.is_dir() else [])
        return sorted(int(match[1]) for match in found if match)

    def tags(self, name: str) -> dict[str, int]:
        """Version by tag; `latest` is among them wherever there is a version."""
        aliases = self._aliases(name)
        versions = self.versions(name)
        return aliases | ({"latest": versions[-1]} if versions else {})

    def experts(self) -> list[Expert]:
        """Every version of every name, sorted. Raises RegistryError naming the first whose manifest is damaged."""
        found = []
        for name in self.names():
            for version in self.versions(name):
                try:
                    found.append(self._load(name, version))
                except RegistryError:
                    if self._folder(name, version).exists():  # else it was removed since it was listed
                        raise
        return found

    def resolve(self, reference: str) -> Expert:
        """The expert that `code`, `code@latest`, `code@v3` or `code@<tag>` means, its files present in their sizes.

        Raises RegistryError for an unknown name, version or tag (with the closest known one), or a damaged expert.
        """
        expert = self._load(*self._locate(reference))
        _check(expert, read=False)
        return expert

    def verify(self, expert: Expert) -> None:
        """Read every file of an expert; RegistryError names the first that is not what was published."""
        _check(expert, read=True)

    def checked(self, reference: str) -> Expert:
        """`resolve` and `verify`: what is about to be used."""
        expert = self.resolve(reference)
        self.verify(expert)
        return expert

    # Writing: one writer at a time for each name.

    @contextlib.contextmanager
    def staging(self) -> Generator[Path]:
        """An empty folder inside the registry to write a model into; what was not published is removed on leaving.

        Clears away what dead writers left: a living one holds the lock in its folder.
        """
        place = self.root / ".staging"
        with contextlib.ExitStack() as stack:
            with files.locked(place / ".lock"), files.told(place):
                for old in place.iterdir():
                    if old.is_dir() and not files.is_locked(old / "lock"):
                        files.remove_folder(old)
                own = Path(tempfile.mkdtemp(dir=place))
                stack.callback(files.remove_folder, own)
                stack.enter_context(files.locked(own / "lock"))
                (own / "model").mkdir()
            yield own / "model"

    def publish(self, folder: Path, draft: Manifest) -> Expert:
        """Move a finished model folder (from `staging()`, or else on the same file system) into the next version of
        `draft.name`. The folder's files become readable to all. Numbers are never given twice."""
        check_name(draft.name)
        entries = seal(folder)
        with files.locked(self._lock(draft.name)):
            version = max(self._counted(draft.name), *self.versions(draft.name), 0) + 1
            manifest = draft.model_copy(update={"version": version, "files": entries})
            manifest.write(folder)
            target = self._folder(draft.name, version)
            files.replace_folder(folder, target)
            self._count(draft.name, version)  # now: a number that was counted and not given would be missing
        return Expert(draft.name, version, target, manifest)

    def settle(self, expert: Expert) -> Expert:
        """Do what is left to do for a version whose writer was killed just after it appeared."""
        with files.locked(self._lock(expert.name)):
            self._count(expert.name, expert.version)
        return expert

    def update(self, expert: Expert, *, alpha: float | None = None, scores: Mapping[str, Any] | None = None) -> Expert:
        """Set alpha (None keeps it) and merge scores, key by key, into an expert's manifest."""
        with self._held(expert.reference) as (name, version):
            known = self._load(name, version).manifest
            changes = {"alpha": known.alpha if alpha is None else alpha, "scores": known.scores | dict(scores or {})}
            manifest = Manifest.model_validate(known.model_dump() | changes)
            manifest.write(expert.folder)
        return Expert(name, version, expert.folder, manifest)

    def tag(self, reference: str, alias: str) -> Expert:
        """Let `alias` mean this version from now on, whatever it meant before."""
        check_tag(alias)
        with self._held(reference) as (name, version):
            expert = self.resolve(f"{name}@v{version}")
            self._write_aliases(name, self._aliases(name) | {alias: version})
        return expert

    def remove(self, reference: str, force: bool = False) -> str:
        """Delete a version, damaged or not, and return its full reference. A tagged one takes force, its tags go."""
        with self._held(reference) as (name, version):
            aliases = self._aliases(name)
            pointing = sorted(tag for tag, n in aliases.items() if n == version)
            if pointing and not force:
                hint = "tag another version, or remove this one with --force"
                raise RegistryError(f"{name}@v{version} is tagged {', '.join(pointing)}", hint)
            self._count(name, version)
            with self.staging() as grave:
                files.replace_folder(self._folder(name, version), grave)
                if pointing:  # last: a kill before must not leave the version without its tags
                    there = self.versions(name)
                    self._write_aliases(name, {tag: n for tag, n in aliases.items() if n in there})
        return f"{name}@v{version}"

    def _folder(self, name: str, version: int) -> Path:
        return self.root / name / f"v{version}"

    def _lock(self, name: str) -> Path:
        return self.root / name / ".lock"

    @contextlib.contextmanager
    def _held(self, reference: str) -> Generator[tuple[str, int]]:
        """The version that a reference means, kept from other writers."""
        name, _ = self._locate(reference)  # before the lock's file is made: an unknown name leaves nothing behind
        with files.locked(self._lock(name)):
            yield self._locate(reference)

    def _locate(self, reference: str) -> tuple[str, int]:
        """Name and number of a reference, whether or not its files are sound."""
        name, at, selector = reference.partition("@")
        known = self.names()
        if name not in known:
            hint = did_you_mean(name, known) if known else "there is none yet; make one: proxytune expert"
            raise RegistryError(f"no expert is named {name!r}", hint)
        selector = selector if at else "latest"
        tags = self.tags(name)
        versions = self.versions(name)  # listed last, so that a version just published is among them
        number = _VERSION.fullmatch(selector)
        version = int(number[1]) if number else tags.get(selector)
        if version in versions:
            return name, version
        if selector in tags:
            hint = f"tag another: proxytune registry tag {name} {selector}"
            raise RegistryError(f"{reference} means v{version}, which is gone", hint)
        if selector == "best":
            hint = f"run: proxytune sweep expert={name}, or tag one: proxytune registry tag {name} best"
            raise RegistryError(f"{name} has no best version yet", hint)
        known = [*tags, *(f"v{n}" for n in versions)]
        raise RegistryError(f"{name} has no version or tag {selector!r}", did_you_mean(selector, known))

    def _load(self, name: str, version: int) -> Expert:
        folder = self._folder(name, version)
        try:
            manifest = Manifest.read((folder / FILENAME).read_bytes())
        except FileNotFoundError:
            raise _damaged(folder, f"{folder / FILENAME} is missing") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise _damaged(folder, f"{folder / FILENAME}: {where} {first['msg']}") from error
        except ValueError as error:
            raise _damaged(folder, f"{folder / FILENAME}: {error}") from error
        if (manifest.name, manifest.version) != (name, version):
            raise _damaged(folder, f"its {FILENAME} is that of {manifest.name}@v{manifest.version}")
        return Expert(name, version, folder, manifest)

    def _counted(self, name: str) -> int:
        """The highest number ever given, but for one whose writer was killed just then: that one's folder is there."""
        counter = self.root / name / COUNTER
        return _numbers(counter, "remove it: versions are counted from the newest there is").get("last", 0)

    def _count(self, name: str, version: int) -> None:
        if version > self._counted(name):
            files.write_json(self.root / name / COUNTER, {"last": version}, checked=True)

    def _aliases(self, name: str) -> dict[str, int]:
        return _numbers(self.root / name / ALIASES, "remove it and tag again what it named")

    def _write_aliases(self, name: str, aliases: dict[str, int]) -> None:
        files.write_json(self.root / name / ALIASES, dict(sorted(aliases.items())), checked=True)


def _numbers(path: Path, hint: str) -> dict[str, int]:
    """What aliases and counter hold; {} where there is no such file yet. RegistryError names one that is damaged."""
    try:
        found = files.read_json(path)
    except FileNotFoundError:
        return {}
    except StorageError as error:
        raise RegistryError(error.what, hint) from error
    if not isinstance(found, dict) or not all(isinstance(number, int) for number in found.values()):
        raise RegistryError(f"{path} is damaged: it does not hold numbers by name", hint)
    return found


def _check(expert: Expert, read: bool) -> None:
    for path, entry in expert.manifest.files.items():
        if fault := entry.fault(expert.folder / path, read):
            raise _damaged(expert.folder, fault)


def _damaged(folder: Path, how: str) -> RegistryError:
    reference = f"{folder.parent.name}@{folder.name}"
    if not folder.exists():
        return RegistryError(f"{reference} was removed just now", "proxytune registry list")
    return RegistryError(
        f"{reference} is damaged: {how}", f"remove it and train it again: proxytune registry remove {reference}"
    )
