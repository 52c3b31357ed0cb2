"""What is known of a registered expert: its lineage, what it scored, and every file it consists of.

`manifest.json` lies in the expert's folder, beside the model's own files, and is written last.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat

from proxytune import files
from proxytune.errors import RegistryError
from proxytune.models.identity import ModelId
from proxytune.models.prompts import Format
from proxytune.settings import Section

FILENAME = "manifest.json"
NAME = r"[a-z0-9][a-z0-9._-]{0,99}"

Size = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class FileEntry(Section):
    """size in bytes."""

    size: Size
    sha256: Sha256

    @classmethod
    def of(cls, file: Path) -> FileEntry:
        return cls(size=file.stat().st_size, sha256=files.hash_file(file))

    def fault(self, file: Path, read: bool) -> str | None:
        """What is wrong with a file that should be this one; its content counts only if `read`."""
        try:
            size = file.stat().st_size
            if size != self.size:
                return f"{file} has {size:,} bytes, not {self.size:,}"
            if read and files.hash_file(file) != self.sha256:
                return f"{file} is not what was published: its content changed"
        except (FileNotFoundError, NotADirectoryError):
            return f"{file} is missing"
        return None


class DataLineage(Section):
    """Where the rows came from, a hash of all of them, and how many each split has."""

    source: str
    fingerprint: str
    train: Size
    validation: Size
    test: Size


class CodeVersion(Section):
    """The package's version, and the commit where it ran from a clone."""

    version: str
    commit: str | None = None


class Ancestor(Section):
    """An expert that this one was tuned on from: its reference in the registry, how it came about, and its weights.

    files: SHA-256 of each of its weight files.
    """

    reference: str
    method: str
    kind: Literal["lora", "full"]
    data: DataLineage
    files: dict[str, Sha256]


class Origin(Section):
    """Where a version was taken over from: its reference there, the archive or `hub:org/name`, the hub's revision.

    manifest: SHA-256 of the manifest as it came. taken: ISO 8601, UTC.
    """

    reference: str
    source: str
    revision: str | None = None
    manifest: Sha256
    taken: str = Field(default_factory=_now)


class Manifest(Section):
    """A draft until published: the registry gives it its `version` and lists its `files` (paths within the folder).

    role: an `expert` is a small model that steers, `tuned` is a base that was tuned itself, to compare with.
    anti: the untouched checkpoint that this one was tuned from, in either role. created: ISO 8601, UTC.
    training: what the trainer reported (losses, steps, seconds). scores: what was measured since, by split:
    {"test": {"loss": ..., ...}}. alpha: the best one, where a sweep chose it. origins: the registries that it went
    through before this one, oldest first. lineage: the experts that this one was tuned on from, oldest first.
    NaN in free fields is written as null.
    """

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    version: Annotated[int, Field(ge=0)] = 0
    created: str = Field(default_factory=_now)
    task: str
    family: str
    role: Literal["expert", "tuned"]
    kind: Literal["lora", "full"]
    anti: ModelId
    data: DataLineage
    prompt_format: Format
    config: dict[str, Any]
    code: CodeVersion
    command: str
    training: dict[str, Any]
    scores: dict[str, Any] = {}
    alpha: FiniteFloat | None = None
    origins: list[Origin] = []
    lineage: list[Ancestor] = []
    files: dict[str, FileEntry] = {}

    def write(self, folder: Path) -> None:
        files.write_atomic(folder / FILENAME, files.with_check(self.model_dump_json(indent=2)) + "\n")

    @classmethod
    def read(cls, raw: bytes) -> Manifest:
        """Raises ValidationError; ValueError where it has a checksum and is not what that was made for."""
        text = raw.decode()
        if f'"{files.CHECK}": "' not in text:  # written before there were checksums
            return cls.model_validate_json(text)
        return cls.model_validate(files.without_check(text))


def seal(folder: Path) -> dict[str, FileEntry]:
    """Open a model folder's files to all readers, force them to disk, and describe them (a manifest aside).

    PEFT writes adapters for their owner alone (0600), and a shared registry is read by others.
    """
    entries = {}
    with files.told(folder):
        for rest in folder.rglob(f".*{files.UNFINISHED}"):
            rest.unlink()  # of a publisher that was killed
        for path in [folder, *sorted(folder.rglob("*"))]:
            if path.is_symlink():
                raise RegistryError(f"{path} is a link and cannot be published", "put the file itself there")
            if path.exists():
                path.chmod(0o755 if path.is_dir() else 0o644)
                files.sync_folder(path)  # syncs a file as well
            if path.is_file() and path != folder / FILENAME:
                entries[path.relative_to(folder).as_posix()] = FileEntry.of(path)
    if not entries:
        raise RegistryError(f"{folder} holds no files to publish", "save the model into it first")
    return entries
