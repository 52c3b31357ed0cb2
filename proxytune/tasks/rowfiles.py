"""Rows from the user's own files: JSONL, a JSON list, or CSV. What is wrong is told by file and line."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proxytune import settings
from proxytune.errors import DataError, did_you_mean
from proxytune.models.prompts import text_of
from proxytune.tasks import rows as forms
from proxytune.tasks.task import SPLITS, Row, Task

VALIDATION_SHARE = 0.05  # of the training rows, where no validation file is named


def read(data: settings.Data, task: Task) -> dict[str, list[Row]]:
    """All splits; one without a file is empty, but validation rows are cut from the training rows."""
    named = {"train": data.train, "validation": data.validation, "test": data.test}
    if not any(named.values()):
        raise DataError("data=files was given no file", "set data.train=FILE and data.test=FILE")
    splits = {split: read_file(Path(path).expanduser(), split, task) if path else [] for split, path in named.items()}
    if splits["train"] and not data.validation:
        splits["train"], splits["validation"] = cut(splits["train"], str(data.train))
    return splits


def read_file(path: Path, split: str, task: Task) -> list[Row]:
    """The rows of one file, each with an id: its own, or `<split>-<place>`. One bad row refuses the file."""
    assert split in SPLITS
    found: dict[str, Row] = {}
    for where, raw in _raw_rows(path):
        try:
            row = forms.read(raw, task)
        except DataError as error:
            raise DataError(f"{path}, {where}: {error.what}", error.hint) from error.__cause__
        row = {"id": f"{split}-{len(found)}", **row}
        if row["id"] in found:
            raise DataError(f"{path}, {where}: the id {row['id']!r} is already that of another row")
        found[row["id"]] = row
    if not found:
        raise DataError(f"{path} holds no rows")
    return list(found.values())


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
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path} is in no form that can be read", f"files are {', '.join(readers)}")
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as spreadsheets write it
    except FileNotFoundError:
        beside = sorted(other.name for other in path.parent.iterdir()) if path.parent.is_dir() else []
        raise DataError(f"there is no file {path}", did_you_mean(path.name, beside) if beside else "") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return readers[path.suffix.lower()](content, path)


def _jsonl(content: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"line {number}", _parsed(line, f"{path}, line {number}")


def _json(content: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    rows = _parsed(content, str(path)) if content.strip() else []
    if not isinstance(rows, list):
        raise DataError(f"{path} is not a list of rows", "one row a line belongs into a .jsonl file")
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8") from None
    except json.JSONDecodeError as error:
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
