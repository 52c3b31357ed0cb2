"""Checkpoints that a killed training can trust: complete only with a marker that was written after all their files.

A trainer saves in place and takes the highest number for the newest, without looking inside. Here a checkpoint counts
only if its marker lists files that are there in their sizes and with their hashes, and an old one goes only after a
newer one is complete.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from proxytune.experts.manifest import FileEntry
from proxytune.files import read_json, remove_folder, write_json

MARKER = "complete.json"

_MARKED = TypeAdapter(dict[str, FileEntry])


def mark(folder: Path, marker: Path | None = None) -> None:
    """Declare everything that lies in the folder now to be all of it; in `marker`, else in a file of the folder."""
    marker = marker or folder / MARKER
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file != marker]
    write_json(marker, {file.relative_to(folder).as_posix(): FileEntry.of(file).model_dump() for file in files})


def is_complete(folder: Path, marker: Path | None = None) -> bool:
    """Whether every file that the marker lists is there, of its size and content."""
    try:
        marked = _MARKED.validate_json((marker or folder / MARKER).read_bytes())
    except (FileNotFoundError, ValidationError):
        return False
    # sizes first: they cost nothing, and a checkpoint that was cut is the common case
    return not any(entry.fault(folder / name, read) for read in (False, True) for name, entry in marked.items())


def last_complete(folder: Path) -> Path | None:
    """The newest complete checkpoint (`checkpoint-<step>`) in a folder; newer ones that are broken are removed.

    So are those whose best one so far, which the trainer loads in the end, is broken: nobody would see it.
    """
    for checkpoint in reversed(_numbered(folder)):
        if is_complete(checkpoint) and ((best := _best_of(checkpoint)) == checkpoint or is_complete(best)):
            return checkpoint
        remove_folder(checkpoint)
    return None


def _best_of(checkpoint: Path) -> Path:
    """The best checkpoint when this one was made, where the trainer looked for one; else itself."""
    state = checkpoint / "trainer_state.json"
    best = read_json(state)["best_model_checkpoint"] if state.is_file() else None
    return checkpoint.with_name(Path(best).name) if best else checkpoint


def prune(folder: Path, keep: int, spare: Path | None = None) -> None:
    """Remove all but the newest `keep` checkpoints, and `spare`. Call it once the newest is marked."""
    old = _numbered(folder)[: -max(keep, 1)]
    for checkpoint in old:
        if spare is None or checkpoint.name != spare.name:
            (checkpoint / MARKER).unlink(missing_ok=True)  # a kill while it goes must not leave half of it marked
            remove_folder(checkpoint)


def _numbered(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
