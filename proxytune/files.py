"""Files that are whole or not there: atomic writes, hashes, locks, and where the project's own files lie."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from proxytune.errors import StorageError


def resource(name: str) -> Path:
    """`conf` or `data`: inside the package once installed, beside it in a clone."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


@contextlib.contextmanager
def told(path: Path) -> Generator[None]:
    """Turn what the operating system says of a write into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"no space left to write {path}", "free some, or point outputs= at another disk"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(f"not allowed to write {path}", "point outputs= at a folder of yours") from error
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG):
            raise StorageError(f"cannot write {path}: {error.strerror}", "name another place for it") from error
        raise


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file or nothing: beside it, synced, then renamed over it."""
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StorageError(f"{path} is damaged: {error}", "remove it and run the stage again") from error


def read_jsonl(path: Path) -> list[Any]:
    """The rows of a file that `write_jsonl` wrote whole."""
    try:
        # not splitlines: JSON leaves a line separator (U+2028) inside a text as it is
        return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StorageError(f"{path} is damaged: {error}", "remove it and run the stage again") from error


class Journal:
    """Rows of JSON written one by one as work is done, so that a kill costs the row in hand and no more.

    Opening reads the rows that are there, and drops the last if a kill cut it. StorageError names a file that is
    damaged in the middle.
    """

    def __init__(self, path: Path):
        with told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes() if path.is_file() else b""
            whole = data.rpartition(b"\n")[0] + b"\n" if b"\n" in data else b""
            if len(whole) < len(data):
                os.truncate(path, len(whole))
            self.path, self.rows = path, read_jsonl(path) if whole else []
            self._file = path.open("ab")

    def append(self, row: Any) -> None:
        with told(self.path):
            self._file.write(json.dumps(row).encode() + b"\n")
            self._file.flush()

    def remove(self) -> None:
        """When its rows stand elsewhere."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON: the content name of settings and rows."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Generator[None]:
    """Hold an exclusive lock on `path` (made if missing) against other processes; freed by the kernel on a kill."""
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:  # what is done under the lock tells its own errors
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_locked(path: Path) -> bool:
    """Whether a living process holds `path` by `locked`."""
    with contextlib.suppress(FileNotFoundError), path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def replace_folder(source: Path, target: Path) -> None:
    """Move a finished folder to where it is looked for, in one step; `target` must not hold files."""
    with told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
        sync_folder(target.parent)


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
