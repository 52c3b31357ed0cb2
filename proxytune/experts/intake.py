"""Experts that come from elsewhere: files are taken only if their manifest lists them, and looked into before use.

Nothing that could run is taken: no pickles, no code, no links. What is refused leaves nothing in the registry, because
everything is written into a staging folder first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pydantic import ValidationError

from proxytune import files
from proxytune.errors import RegistryError, StorageError
from proxytune.experts.manifest import FILENAME, Manifest, Origin
from proxytune.experts.registry import Expert, Registry
from proxytune.files import read_json

KINDS = (".safetensors", ".json", ".jinja", ".txt", ".md", ".model")  # .model: a SentencePiece vocabulary
MANIFEST_BYTES = 16 << 20
TEXT_BYTES = 256 << 20  # of a file that is read whole, such as a tokenizer
HEADER_BYTES = 100_000_000  # what the safetensors format itself allows
FILES = 10_000
ADAPTER = "adapter_config.json"
NEEDED = {"lora": (ADAPTER, "adapter_model.safetensors"), "full": ("config.json",)}
NAME_BYTES = 100  # what a tar header holds

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # could paint over a terminal
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_PICKLED = (b"\x80", b"PK\x03\x04")


class Intake:
    """One expert on its way into `folder` (a staging folder of the registry). where: what messages call its source."""

    def __init__(self, folder: Path, manifest: Manifest, where: str):
        self.folder, self.manifest, self.where = folder, manifest, where
        self._missing = dict(manifest.files)

    def take(self, name: str, content: BinaryIO) -> None:
        """Read exactly the listed size from `content` into the folder, and hold it against the listed hash."""
        entry = self._missing.pop(name, None)
        if entry is None:
            raise refused(self.where, f"{name} is not listed in its manifest, or comes twice")
        target, digest, left = self.folder / name, hashlib.sha256(), entry.size
        with files.told(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                while left and (chunk := content.read(min(left, 1 << 20))):
                    digest.update(chunk)
                    file.write(chunk)
                    left -= len(chunk)
        if left:
            raise refused(self.where, f"{name} is cut: {left:,} bytes are missing")
        if digest.hexdigest() != entry.sha256:
            raise refused(self.where, f"{name} is not what was published: its content changed")
        _look_into(target, name, self.where)

    def finish(self) -> None:
        """All is there, and of the kind that the manifest tells: else a loader would look for the rest elsewhere."""
        if self._missing:
            raise refused(self.where, f"{next(iter(self._missing))} is missing")
        for name in NEEDED[kind := self.manifest.kind]:
            if name not in self.manifest.files:
                raise refused(self.where, f"it is of the kind {kind} and has no {name}")
        if kind == "full" and ADAPTER in self.manifest.files:
            raise refused(self.where, f"it is of the kind full and has an {ADAPTER}")
        told = read_json(self.folder / ADAPTER) if kind == "lora" else None
        if told is not None and (not isinstance(told, dict) or told.get("peft_type") != "LORA"):
            raise refused(self.where, f"{ADAPTER} is not that of a LoRA adapter")


def read_manifest(raw: bytes, where: str) -> Manifest:
    """A manifest from elsewhere, with names and sizes that are safe to act upon. RegistryError says what is not."""
    try:
        manifest = Manifest.read(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise refused(where, f"{FILENAME}: {'.'.join(map(str, first['loc']))} {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise refused(where, f"{FILENAME}: {error}") from error
    if any(_CONTROL.search(text) for text in _texts(json.loads(raw))):
        raise refused(where, f"{FILENAME} has control characters in it")
    if not 0 < len(manifest.files) <= FILES:
        raise refused(where, f"{FILENAME} lists {len(manifest.files):,} files")
    for name, entry in manifest.files.items():
        check_name(name, where)
        if not name.endswith(".safetensors") and entry.size > TEXT_BYTES:
            raise refused(where, f"{name} has {entry.size:,} bytes, more than the {TEXT_BYTES:,} allowed")
    return manifest


def check_name(name: str, where: str) -> None:
    """A file name that stays in its folder, wherever it is unpacked, and that names a kind of file that cannot run."""
    parts = name.split("/")
    if not all(map(_PART.fullmatch, parts)) or len(name) > NAME_BYTES:
        raise refused(where, f"{name!r} is not a plain file name")
    if PurePosixPath(name).suffix not in KINDS or name == FILENAME:
        raise refused(where, f"{name} is not of a kind that is taken: {', '.join(KINDS)}")


def check_room(manifest: Manifest, root: Path) -> None:
    """StorageError before anything is fetched that cannot be kept."""
    needed = sum(entry.size for entry in manifest.files.values())
    there = next(folder for folder in [root, *root.parents] if folder.exists())
    if needed > shutil.disk_usage(there).free:
        raise StorageError(
            f"{manifest.name} takes {needed / 1e9:,.1f} GB and {there} has less", "free some, or use another --outputs"
        )


def taken_before(registry: Registry, manifest: Manifest, raw: bytes, name: str | None) -> Expert | None:
    """The version that this very expert is here already, so that taking it again, as after a kill, makes no second."""
    digest = hashlib.sha256(raw).hexdigest()
    for version in reversed(registry.versions(name or manifest.name)):
        with contextlib.suppress(RegistryError):  # one that is damaged does not count
            expert = registry.resolve(f"{name or manifest.name}@v{version}")
            if expert.manifest.origins and expert.manifest.origins[-1].manifest == digest:
                registry.verify(expert)
                return registry.settle(expert)
    return None


def arrived(manifest: Manifest, raw: bytes, source: str, revision: str | None, name: str | None) -> Manifest:
    """The draft to publish here: all of the lineage, and one origin more. name: what it is called here."""
    origin = Origin(
        reference=f"{manifest.name}@v{manifest.version}",
        source=source,
        revision=revision,
        manifest=hashlib.sha256(raw).hexdigest(),
    )
    return manifest.model_copy(update={"name": name or manifest.name, "origins": [*manifest.origins, origin]})


def refused(where: str, what: str) -> RegistryError:
    return RegistryError(f"{where} is refused: {what}", "nothing was taken from it")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _look_into(file: Path, name: str, where: str) -> None:
    """The content must be what the name says."""
    if file.suffix == ".safetensors":
        _look_into_tensors(file, name, where)
        return
    content = file.read_bytes()
    if content.startswith(_PICKLED):
        raise refused(where, f"{name} is a pickle or an archive, whatever its name says")
    if file.suffix == ".model":
        return
    try:
        text = content.decode("utf-8")
        if file.suffix == ".json":
            json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refused(where, f"{name} cannot be read: {error}") from error


def _look_into_tensors(file: Path, name: str, where: str) -> None:
    from safetensors import SafetensorError, safe_open

    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    if header > min(HEADER_BYTES, file.stat().st_size - 8):
        raise refused(where, f"{name} claims a header of {header:,} bytes")
    try:
        with safe_open(file, framework="numpy"):  # reads and checks the header alone
            pass
    except SafetensorError as error:
        raise refused(where, f"{name} is not in the safetensors format: {error}") from error
