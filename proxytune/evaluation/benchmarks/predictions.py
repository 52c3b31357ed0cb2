"""Files of outputs made by anyone, read for scoring: which output belongs to which question and reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from proxytune.errors import DataError, SettingsError, did_you_mean
from proxytune.evaluation.benchmarks.benchmark import Benchmark, Row, Verdict
from proxytune.evaluation.benchmarks.rows import read, reason, refuse
from proxytune.settings import Fields
from proxytune.tasks.rows import check_whole

Column = str | tuple[str, ...]
# What files call outputs, where no column has the release's own name; the plural ones hold several samples.
OUTPUTS = ("outputs", "completions", "samples", "generations", "generation", "response", "responses", "prediction")


@dataclass(frozen=True)
class Answered:
    """A question with what was answered, one text a sample. recorded: verdicts that the file tells, one a sample."""

    id: str
    outputs: tuple[str, ...]
    reference: Any = None
    groups: Mapping[str, str] | None = None
    recorded: tuple[Verdict, ...] = ()


@dataclass(frozen=True)
class Line:
    """One line of a file of predictions, not yet joined with anything."""

    where: str
    raw: Mapping[str, Any]
    outputs: tuple[str, ...]
    id: str | None
    recorded: tuple[Verdict, ...]


@dataclass(frozen=True)
class Named:
    """The columns that are used of a file; None is not there."""

    output: str | None
    reference: str | None
    id: Column | None
    verdict: tuple[str, ...]

    @staticmethod
    def of(path: Path, first: Mapping[str, Any], fields: Fields, benchmark: Benchmark) -> Named:
        """Those that were asked for, else those of the release, as far as the first row has them."""
        columns = benchmark.columns
        for asked in (fields.output, fields.reference, *_parts(fields.id), *_parts(fields.verdict)):
            if asked is not None and asked not in first:
                raise DataError(f"{path}: the first row has no {asked!r}", did_you_mean(asked, map(str, first)))
        verdict = _parts(fields.verdict) or columns.verdict
        return Named(
            fields.output or next((name for name in (*columns.output, *OUTPUTS) if name in first), None),
            fields.reference or next((name for name in columns.reference if name in first), None),
            _parts(fields.id)
            or next((name for name in columns.id if all(part in first for part in _parts(name))), None),
            verdict if benchmark.recorded and all(name in first for name in verdict) else (),
        )


def lines(path: Path, fields: Fields, benchmark: Benchmark) -> tuple[list[Line], Named]:
    """The lines of a file, and the columns that were used of it. Raises DataError that names the bad ones."""
    raws = list(read(path))
    if not raws:
        raise DataError(f"{path} holds no rows")
    first = next((raw for _, raw in raws if isinstance(raw, Mapping)), {})
    named = Named.of(path, first, fields, benchmark)
    if named.output is None and not named.verdict:
        known = ", ".join(map(str, first)) or "none"
        raise DataError(f"{path}: no column with outputs (there are: {known})", "name it with fields.output=")
    found, bad = [], []
    for where, raw in raws:
        try:
            found.append(_line(where, raw, named, benchmark))
        except (DataError, KeyError, ValueError, TypeError) as error:
            bad.append(f"{where}: {reason(error)}")
    refuse(bad, str(path))
    return found, named


def _line(where: str, raw: Any, named: Named, benchmark: Benchmark) -> Line:
    if not isinstance(raw, Mapping):
        raise DataError(f"not an object but {type(raw).__name__}")
    recorded = _recorded([raw[name] for name in named.verdict], benchmark) if named.verdict else ()
    written = [""] * len(recorded) if named.output is None else raw[named.output]
    outputs = tuple(_text(one, named.output) for one in (written if isinstance(written, list) else [written]))
    if not outputs:
        raise DataError(f"{named.output!r} is empty")
    if recorded and len(recorded) != len(outputs):
        raise DataError(f"{len(recorded)} verdicts for {len(outputs)} outputs")
    identity = None if named.id is None else "/".join(str(raw[part]) for part in _parts(named.id))
    return Line(where, raw, outputs, identity, recorded)


def _text(output: Any, column: str | None) -> str:
    """An output as text that can be written again: null is what many tools write for an empty one."""
    if output is not None and not isinstance(output, str):
        raise DataError(f"{column!r} is no text")
    return (output or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _recorded(columns: Sequence[Any], benchmark: Benchmark) -> tuple[Verdict, ...]:
    """The verdicts of one line: where its columns are lists, one a sample."""
    assert benchmark.recorded is not None
    listed = all(isinstance(column, list) for column in columns)
    return tuple(
        Verdict({}, parsed=False)
        if any(value is None or value != value or value == "" for value in values)
        else benchmark.recorded(values)
        for values in (zip(*columns, strict=True) if listed else [columns])
    )


def alone(found: Sequence[Line], path: Path, named: Named, benchmark: Benchmark, *, judged: bool) -> list[Answered]:
    """Lines that carry their own reference, or (`judged`) need none because they carry verdicts."""
    answered, bad = [], []
    for line in found:
        try:
            reference = None if judged else benchmark.reference(line.raw[named.reference or ""])
            identity = line.id if line.id is not None else line.where
            answered.append(Answered(identity, line.outputs, reference, benchmark.groups(line.raw), line.recorded))
        except (DataError, KeyError, ValueError, TypeError, IndexError) as error:
            bad.append(f"{line.where}: {named.reference!r}: {reason(error)}")
    refuse(bad, str(path))
    for line, one in zip(found, answered, strict=True):
        check_whole([one.id, one.groups], f"{path}, {line.where}: its id or group")
    return _sampled(answered) if benchmark.decoding.samples > 1 and named.id is not None else answered


def joined(found: Sequence[Line], rows: Sequence[Row], path: Path, benchmark: Benchmark) -> list[Answered]:
    """Lines with the references of rows: by id where every line has one that is a row's, else by order.

    By order are joined as many lines as there are rows, unless the ids that are known say another order.
    """
    known = _by_name(rows)
    places = [known.get(line.id.strip()) if line.id is not None else None for line in found]
    told = [place for place in places if place is not None]
    if len(told) < len(found) == len(rows) and all(a < b for a, b in pairwise(told)):
        places = list(range(len(rows)))
    elif not told:
        counts = f"{len(found)} rows for {len(rows)} of {benchmark.name}"
        raise DataError(f"{path} has {counts}, and no id that both know", "name the id with fields.id=")
    unknown = [line for line, place in zip(found, places, strict=True) if place is None]
    refuse([f"{line.where}: no row is called {line.id!r}" for line in unknown], str(path))
    pairs = [(line, rows[place]) for line, place in zip(found, places, strict=True) if place is not None]
    answered = [Answered(row.id, line.outputs, row.reference, row.groups, line.recorded) for line, row in pairs]
    merged = _sampled(answered)
    if benchmark.decoding.samples == 1 and len(merged) < len(answered):
        twice = next(one.id for one in merged if len(one.outputs) > 1)
        raise DataError(f"{path} answers {twice!r} more than once", "an id names one row")
    return merged


def _by_name(rows: Sequence[Row]) -> dict[str, int]:
    """Places of rows by every name that is one row's only; an id goes before other names."""
    known: dict[str, int] = {}
    twice = set()
    for place, row in enumerate(rows):
        for name in {name.strip() for name in row.names}:
            if name in known:
                twice.add(name)
            known[name] = place
    of_one = {name: place for name, place in known.items() if name not in twice}
    return of_one | {row.id: place for place, row in enumerate(rows)}


def _sampled(answered: Sequence[Answered]) -> list[Answered]:
    """One for each id, with the samples of all lines that have it."""
    found: dict[str, list[Answered]] = {}
    for one in answered:
        found.setdefault(one.id, []).append(one)
    return [
        replace(
            several[0],
            outputs=tuple(output for one in several for output in one.outputs),
            recorded=tuple(verdict for one in several for verdict in one.recorded),
        )
        for several in found.values()
    ]


def refuse_both(fields: Fields, rows: Path | None) -> None:
    """A reference named in two places is a slip of the user's."""
    if fields.reference and rows:
        raise SettingsError("both fields.reference and benchmark.rows give references", "leave one of them out")


def _parts(column: Column | Sequence[str] | None) -> tuple[str, ...]:
    return () if column is None else (column,) if isinstance(column, str) else tuple(column)
