"""Rows from the user's own files: JSONL (also gzipped), a JSON list, or CSV. What is wrong is told by file and line."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from proxytune import settings
from proxytune.errors import DataError, did_you_mean
from proxytune.models.prompts import text_of
from proxytune.tasks import preferences
from proxytune.tasks import rows as forms
from proxytune.tasks.task import SPLITS, Row, Task

VALIDATION_SHARE = 0.05  # of the training rows, where no validation file is named
TOLD = 8  # places of bad rows that a message names

T = TypeVar("T")


def read(data: settings.Data, task: Task, pairs: bool = False) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """(rows of each split, how many of each were left out as bad, where data.bad_rows=skip).

    A split without a file is empty, but validation rows are cut from the training rows. pairs: training and validation
    rows are preferences; test rows are what the task measures on in either case.
    """
    named = {"train": data.train, "validation": data.validation, "test": data.test}
    if not any(named.values()):
        raise DataError("data=files was given no file", "set data.train=FILE and data.test=FILE")
    splits: dict[str, list[Row]] = {}
    skipped: dict[str, int] = {}
    for split, name in named.items():
        path = Path(name or "").expanduser()
        skip = data.bad_rows == "skip"
        splits[split], skipped[split] = (
            read_file(path, split, task, pairs=pairs and split != "test", skip=skip) if name else ([], 0)
        )
    if splits["train"] and not data.validation:
        splits["train"], splits["validation"] = cut(splits["train"], str(data.train))
    return splits, skipped


def read_file(path: Path, split: str, task: Task, *, pairs: bool = False, skip: bool = False) -> tuple[list[Row], int]:
    """(rows of one file, how many bad ones were left out). A row's id is its own, or `<split>-<place>`.

    Without `skip` any bad row refuses the file: DataError says of the first one what is wrong, and where others are.
    """
    assert split in SPLITS
    found: dict[str, Row] = {}
    bad: list[tuple[str, DataError]] = []
    for where, raw in _raw_rows(path):
        try:
            row = {"id": f"{split}-{len(found)}", **_row(raw, task, pairs)}
            if row["id"] in found:
                raise DataError(f"the id {row['id']!r} is already that of another row")
            if split != "test":  # what a trainer reads must be of one form
                forms.same_form(next(iter(found.values()), row), row)
            found[row["id"]] = row
        except DataError as error:
            bad.append((where, error))
    if bad and not skip:
        where, error = bad[0]
        others = ", ".join(where for where, _ in bad[1 : TOLD + 1]) + (" ..." if len(bad) > TOLD + 1 else "")
        more = f"; {len(bad) - 1} more rows are bad: {others}" if others else ""
        hint = "; ".join(filter(None, [error.hint, "data.bad_rows=skip leaves bad rows out" if more else ""]))
        raise DataError(f"{path}, {where}: {error.what}{more}", hint) from error.__cause__
    if not found:
        raise DataError(f"{path} holds no rows" + (" that can be used" if bad else ""))
    return list(found.values()), len(bad)


def read_each(path: Path, read: Callable[[Any], T]) -> list[T]:
    """What `read` makes of each row of a file. DataError names the place of the first that it refuses."""
    found = []
    for where, raw in _raw_rows(path):
        try:
            found.append(read(raw))
        except DataError as error:
            raise DataError(f"{path}, {where}: {error.what}", error.hint) from error.__cause__
    if not found:
        raise DataError(f"{path} holds no rows")
    return found


def _row(raw: Any, task: Task, pairs: bool) -> Row:
    """Preferences are rows of the chosen reply wherever a single reply is wanted."""
    if pairs:
        return preferences.read(raw)
    if isinstance(raw, dict) and "chosen" in raw:
        return preferences.as_completion(preferences.read(raw))
    return forms.read(raw, task)


def cut(rows: list[Row], source: str) -> tuple[list[Row], list[Row]]:
    """(training, validation) rows: about 5%, at least one, by a hash of the prompt, so equal prompts stay together."""
    places = [int(hashlib.sha256(text_of(row["prompt"]).encode()).hexdigest()[:8], 16) / 2**32 for row in rows]
    lowest, highest = min(places), max(places)
    if lowest == highest:
        raise DataError(f"{source} holds one prompt only, so no validation rows can be cut", "set data.validation=FILE")
    # The lowest place is always cut and the highest one never, so that neither part is empty.
    held = [place < highest and place <= max(lowest, VALIDATION_SHARE) for place in places]
    return (
        [row for row, out in zip(rows, held, strict=True) if not out],
        [row for row, out in zip(rows, held, strict=True) if out],
    )


def _raw_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, row as it was written) for each row of a file."""
    readers: dict[str, Callable[[bytes, Path], Iterator[tuple[str, Any]]]]
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}
    packed = path.suffix.lower() == ".gz"
    kind = (path.with_suffix("") if packed else path).suffix.lower()
    if kind not in readers:
        raise DataError(f"{path} is in no form that can be read", f"files are {', '.join(readers)}, also with .gz")
    try:
        content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
        content = content.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as spreadsheets write it
    except FileNotFoundError:
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, beside, otherwise="paths start from where you are")
        raise DataError(f"there is no file {path}", hint) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return readers[kind](content, path)


def _jsonl(content: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"line {number}", parsed(line, f"{path}, line {number}")


def _json(content: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    rows = parsed(content, str(path)) if content.strip() else []
    if not isinstance(rows, list):
        raise DataError(f"{path} is not a list of rows", "one row a line belongs into a .jsonl file")
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def parsed(text: bytes, where: str) -> Any:
    """What a JSON text says. Raises DataError, naming `where` it stands, for what is not JSON in UTF-8."""
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8") from None
    except ValueError as error:  # a number of thousands of digits too
        raise DataError(f"{where}: not JSON: {error}") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deep") from None


def _csv(content: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8") from None
    end = 1
    try:
        for row in reader:
            where, end = f"line {end + 1}", reader.line_num
            if None in row:
                raise DataError(f"{path}, {where}: more fields than the header has", "quote texts that hold commas")
            yield where, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
