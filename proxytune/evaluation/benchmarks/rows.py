"""The rows of a benchmark: from a local file or folder in the public release's own format, or from the hub."""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from proxytune.errors import DataError
from proxytune.evaluation.benchmarks.benchmark import Benchmark, Hub, Row
from proxytune.tasks import hub as hubs
from proxytune.tasks import rowfiles
from proxytune.tasks.rows import check_whole

SEED = 42  # the paper's, wherever it draws
INSTEAD = "set benchmark.rows to a file of the public release"
SHOWN = 3  # bad rows that are named; of the others only their number is told
_READERS = {".jsonl": rowfiles._jsonl, ".csv": rowfiles._csv}


def load(benchmark: Benchmark, path: Path | None, revision: str | None = None, seed: int = SEED) -> list[Row]:
    """All rows that the benchmark asks, in the release's order. Raises DataError."""
    raws = read(path) if path else from_hub(benchmark.hub, revision, benchmark.name)
    source = str(path) if path else f"{benchmark.hub.path} on the hub" if benchmark.hub else ""
    rng = random.Random(seed)
    rows, bad = [], []
    for place, (where, raw) in enumerate(raws):
        try:
            check_whole(raw, "the row")
            rows.append(benchmark.row(raw, place, rng))
        except (DataError, KeyError, ValueError, TypeError, AttributeError, IndexError, StopIteration) as error:
            bad.append(f"{where}: {reason(error)}")
    refuse(bad, source, f"this is not {benchmark.name}'s public format")
    asked = benchmark.choose(rows, rng) if benchmark.choose else rows
    if not asked:
        raise DataError(f"{source} holds no rows that {benchmark.name} asks")
    return asked


def read(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, the row as it was written) of JSONL, JSON, CSV, any of them gzipped, or a folder of texts.

    A JSON file is a list of rows, or an object with one under `Data`. Of a folder each line of each .txt is a row.
    """
    path = path.expanduser()
    if path.is_dir():
        return _lines(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    if kind not in (*_READERS, ".json"):
        raise DataError(f"{path} is in no form that can be read", "files are .jsonl, .json or .csv, maybe with .gz")
    content = _content(path)
    return _READERS[kind](content, path) if kind in _READERS else _json(content, path)


def reason(error: Exception) -> str:
    """What was wrong with a row, in a few words."""
    if isinstance(error, KeyError):
        return f"there is no {error.args[0]!r}"
    if isinstance(error, DataError):
        return error.what
    return str(error) or type(error).__name__


def refuse(bad: list[str], source: str, hint: str = "") -> None:
    """DataError naming the first bad rows, if there are any."""
    if bad:
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        count = "a bad row" if len(bad) == 1 else f"{len(bad)} bad rows"
        raise DataError(f"{source} has {count}: {'; '.join(bad[:SHOWN])}{more}", hint)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return content.removeprefix(b"\xef\xbb\xbf")


def _json(content: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    hint = "one row a line belongs into a .jsonl file"
    try:
        whole = rowfiles.parsed(content, str(path)) if content.strip() else []
    except DataError as error:
        raise DataError(error.what, hint) from error
    rows = whole.get("Data") if isinstance(whole, Mapping) else whole
    if not isinstance(rows, list):
        raise DataError(f"{path} is not a list of rows", hint)
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _lines(folder: Path) -> Iterator[tuple[str, Any]]:
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise DataError(f"{folder} holds no .txt files")
    for file in files:
        try:
            lines = _content(file).decode().split("\n")
        except UnicodeDecodeError:
            raise DataError(f"{file}: not UTF-8") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{file.name}, line {number}", {"file": file.stem, "text": line, "line": number}


def from_hub(hub: Hub | None, revision: str | None, name: str) -> Iterator[tuple[str, Any]]:
    """The rows of a public set. Raises DataError where they cannot be had."""
    if hub is None:
        raise DataError(f"the rows of {name} are not on the hub", INSTEAD)
    hubs.check_reachable(hub.path)
    try:
        found = _dataset(hub, revision)
    except Exception as error:  # the library, its HTTP client and its file formats share no base
        told = f"{type(error).__name__}: {str(error)[:200]}"
        raise DataError(f"cannot read {hub.path} from the hub: {told}", INSTEAD) from error
    return ((f"row {number}", row) for number, row in enumerate(found, 1))


def _dataset(hub: Hub, revision: str | None) -> Any:
    import datasets

    if hub.file:
        at = f"@{revision}" if revision else ""
        return datasets.load_dataset("json", data_files=f"hf://datasets/{hub.path}{at}/{hub.file}", split=hub.split)
    return datasets.load_dataset(hub.path, hub.name, split=hub.split, revision=revision)
