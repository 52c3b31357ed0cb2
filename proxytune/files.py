"""Files that are whole or not there: atomic writes, hashes, locks, and where the project's own files lie."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from proxytune.errors import StorageError

CHECK = "check"  # the key of a checksum, last in what carries one
UNFINISHED = ".tmp"
SYSTEM = ("dev", "proc")  # below /; links there are the system's own, such as /dev/stdout sent to a file
LEFTOVER_SECONDS = 60.0  # between a file's making and the lock on it

# An object's text that ends with its checksum, be it with one letter of its key damaged.
_ALMOST = "|".join(f"{CHECK[:n]}.{CHECK[n + 1 :]}" for n in range(len(CHECK)))
_CHECKED = re.compile(rf'"(?:{_ALMOST})": "[^"]{{8}}"}}\s*\Z')


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
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG):
            raise StorageError(f"cannot write {path}: {error.strerror}", "name another place for it") from error
        raise


def check_target(path: Path) -> None:
    """StorageError where no file can be put: a folder is there, or a device or pipe, which a rename would replace."""
    with told(path):
        own = path.is_symlink() and path.absolute().parts[1] in SYSTEM
        if own or (path.exists() and not path.is_file()):
            raise StorageError(f"cannot write {path}: it is there and is no file", "name another place for it")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file or nothing: beside it, synced, then renamed over it."""
    check_target(path)
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
        try:
            with os.fdopen(handle, "wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
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


def _clear_leftovers(path: Path) -> None:
    """Remove what killed writers of `path` began: nobody holds it, and it is older than the start of any living one."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{UNFINISHED}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS and not is_locked(leftover):
                leftover.unlink()


def write_json(path: Path, value: Any, *, checked: bool = False) -> None:
    """checked: an object gets a checksum as its last key, which `read_json` holds it against."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (with_check(text) if checked else text) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    write_atomic(path, _text(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows))


def read_json(path: Path) -> Any:
    """StorageError names a file that is no JSON, or has a checksum and is not what that was made for."""
    with _seen(path):
        return _read(path.read_text("utf-8"))


def read_jsonl(path: Path, *, grown: bool = False) -> list[Any]:
    """The rows of a file that `write_jsonl` or `write_checked` wrote whole; checked where any has a checksum.

    grown: it was written line by line, so a kill may have cut the last, which is left out then.
    """
    with _seen(path):
        text = path.read_text("utf-8")
        lines = _lines(text.rpartition("\n")[0] + "\n" if grown else text)
        return _without_checks(lines) if any(map(_CHECKED.search, lines)) else [json.loads(line) for line in lines]


def _read(text: str) -> Any:
    """What a JSON text says, held against its checksum where it has one."""
    return without_check(text) if _CHECKED.search(text) else json.loads(text)


def with_check(text: str, salt: str = "") -> str:
    """A JSON object's text, with a checksum of itself as its last key."""
    head = text.rstrip().removesuffix("}").rstrip()
    head += "" if head == "{" else ", "
    return f'{head}"{CHECK}": "{zlib.crc32((salt + head).encode()):08x}"}}'


def without_check(text: str, salt: str = "") -> dict[str, Any]:
    """The object that `with_check` was given the text of. Raises ValueError where that is not what it was."""
    head, mark, check = text.rstrip().rpartition(f'"{CHECK}": "')
    if not mark or check != f'{zlib.crc32((salt + head).encode()):08x}"}}':
        raise ValueError("its content changed since it was written")
    return json.loads(head.removesuffix(", ") + "}")  # which may have a key of that name too


def write_checked(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of JSON to be read again by `read_checked`: a checksum in each tells it from any other, and its place."""
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    write_atomic(path, _text(with_check(line, _place(n, len(lines))) for n, line in enumerate(lines)))


def read_checked(path: Path) -> list[dict[str, Any]]:
    """StorageError names a file that lost a row or a bit."""
    with _seen(path):
        return _without_checks(_lines(path.read_text("utf-8")))


def part_of(path: Path) -> Path:
    """The journal of a checked file: what is done of it while it is made."""
    return path.with_suffix(".part")


def finish(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A checked file in place of its journal."""
    write_checked(path, rows)
    part_of(path).unlink(missing_ok=True)


def read_finished(path: Path) -> list[dict[str, Any]] | None:
    """A checked file's rows; None where it is not there yet."""
    if not path.is_file():
        return None
    part_of(path).unlink(missing_ok=True)  # a kill came just after the file was whole
    return read_checked(path)


def _text(lines: Iterable[str]) -> str:
    """Of no lines a line's end: a file that holds nothing at all lost what it had."""
    return "\n".join(lines) + "\n"


def _lines(text: str) -> list[str]:
    """Not splitlines: JSON leaves a line separator (U+2028) inside a text as it is."""
    if not text:
        raise ValueError("it is empty")
    return text.removesuffix("\n").split("\n") if text != "\n" else []


def _without_checks(lines: Sequence[str]) -> list[dict[str, Any]]:
    return [without_check(line, _place(n, len(lines))) for n, line in enumerate(lines)]


@contextlib.contextmanager
def _seen(path: Path) -> Generator[None]:
    """Turn what is wrong with a file's content into one clear line."""
    try:
        yield
    except ValueError as error:
        raise StorageError(f"{path} is damaged: {error}", "remove it and run the stage again") from error


def _place(number: int, count: int) -> str:
    return f"{number}/{count} "


class Journal:
    """Rows of JSON written one by one as work is done, so that a kill costs the row in hand and no more.

    Opening reads the rows that are there, and drops the last if a kill cut it. StorageError names a file that is
    damaged in the middle, and the line; each row has a checksum. old: but those from before there were any.
    """

    def __init__(self, path: Path, *, old: bool = False):
        with told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes() if path.is_file() else b""
            whole = data.rpartition(b"\n")[0] + b"\n" if b"\n" in data else b""
            self.path, self.rows = path, _rows_of(path, whole, _read if old else without_check)
            if len(whole) < len(data):
                os.truncate(path, len(whole))
            self._file = path.open("ab")

    def append(self, row: Mapping[str, Any]) -> None:
        with told(self.path):
            self._file.write(with_check(json.dumps(row, allow_nan=False)).encode() + b"\n")
            self._file.flush()

    def remove(self) -> None:
        """When its rows stand elsewhere."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def _rows_of(path: Path, lines: bytes, read: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    with _seen(path):
        for number, line in enumerate(lines.split(b"\n"), 1):
            try:
                rows += [read(line.decode())] if line else []
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return rows


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
def locked(path: Path, shared: bool = False) -> Generator[None]:
    """Hold a lock on `path` (made if missing) against other processes; freed by the kernel on a kill.

    shared: beside others that share it, against those that want it alone.
    """
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:  # what is done under the lock tells its own errors
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
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
    """Gone in one step; a kill leaves only a hidden rest, which the next removal of that folder takes along."""
    rest = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(rest, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.replace(folder, rest)
    shutil.rmtree(rest, ignore_errors=True)
