"""An expert as one file: a plain tar with the manifest first, then every file that it lists.

The same expert always makes the same bytes. Reading accepts regular members only and never asks `tarfile` to unpack:
headers are read one by one, so links, devices, sparse files and extended headers have no way in, and nothing is
compressed, so no member is larger than it looks.
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import BinaryIO

from proxytune import files
from proxytune.errors import RegistryError
from proxytune.experts import intake
from proxytune.experts.manifest import FILENAME
from proxytune.experts.registry import Expert, Registry, check_name

BLOCK = tarfile.BLOCKSIZE


def write(registry: Registry, expert: Expert, target: Path) -> Path:
    """Write an expert to `target`, whole or not at all. RegistryError where it is damaged or cannot travel."""
    if target.exists():
        raise RegistryError(f"{target} is there already", "remove it or name another file")
    for name in expert.manifest.files:
        intake.check_name(name, expert.reference)
    registry.verify(expert)
    part = target.with_name(f".{target.name}.part")
    with files.told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                for name in (FILENAME, *sorted(expert.manifest.files)):
                    _add(file, name, expert.folder / name)
                file.write(bytes(2 * BLOCK))
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
        files.sync_folder(target.parent)
    return target


def read(registry: Registry, source: Path, name: str | None = None) -> Expert:
    """Register the expert of an archive as the next version of its name (or of `name`), everything checked first."""
    if name is not None:
        check_name(name)
    where = str(source)
    try:
        opened = source.open("rb")
    except OSError as error:
        raise RegistryError(f"cannot read {source}: {error.strerror}", "proxytune registry export makes one") from error
    with opened as file:
        raw = _manifest(file, where)
        manifest = intake.read_manifest(raw, where)
        if there := intake.taken_before(registry, manifest, raw, name):
            return there
        intake.check_room(manifest, registry.root)
        with registry.staging() as folder:
            taken = intake.Intake(folder, manifest, where)
            while member := _next(file, where):
                if member.name in manifest.files and member.size != manifest.files[member.name].size:
                    raise intake.refused(where, f"{member.name} has {member.size:,} bytes, not what its manifest says")
                taken.take(member.name, file)
                file.seek(-member.size % BLOCK, io.SEEK_CUR)
            taken.finish()
            return registry.publish(folder, intake.arrived(manifest, raw, source.name, None, name))


def _add(file: BinaryIO, name: str, source: Path) -> None:
    member = tarfile.TarInfo(name)
    member.size = size = source.stat().st_size
    file.write(member.tobuf(tarfile.GNU_FORMAT))
    with source.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            file.write(chunk)
            size -= len(chunk)
    assert size == 0, f"{source} changed while it was read"
    file.write(bytes(-member.size % BLOCK))


def _manifest(file: BinaryIO, where: str) -> bytes:
    first = _next(file, where)
    if first is None or first.name != FILENAME or not 0 < first.size <= intake.MANIFEST_BYTES:
        raise intake.refused(where, f"it does not begin with a {FILENAME} of up to {intake.MANIFEST_BYTES:,} bytes")
    raw = file.read(first.size)
    file.seek(-first.size % BLOCK, io.SEEK_CUR)
    return raw


def _next(file: BinaryIO, where: str) -> tarfile.TarInfo | None:
    """The next member's header, the file standing at its content; None at the end."""
    header = file.read(BLOCK)
    if header == bytes(BLOCK):
        return None
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise intake.refused(where, f"it is cut, or no archive of proxytune: {error}") from error
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise intake.refused(where, f"{member.name!r} is no plain file")
    return member
