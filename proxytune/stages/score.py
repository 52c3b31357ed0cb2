"""Score a file of outputs by a benchmark's published definition: a table for the eye, one JSON object for programs."""

from __future__ import annotations

import json
import sys
from typing import Any

from proxytune.errors import DataError, SettingsError
from proxytune.evaluation.benchmarks import catalog, predictions, rows, verdicts
from proxytune.evaluation.benchmarks.benchmark import Benchmark, Program
from proxytune.evaluation.benchmarks.report import report
from proxytune.files import check_target, write_jsonl
from proxytune.settings import Score


def run(settings: Score) -> dict[str, Any]:
    """Score, print the table on standard error and the metrics as the last line of standard output."""
    if settings.predictions is None:
        raise SettingsError("there is nothing to score", "set predictions=FILE")
    if settings.out:
        check_target(settings.out)
    benchmark = catalog.get(settings.benchmark.name)
    answered, columns, missing = _read(settings, benchmark)
    raw = settings.outputs == "raw"
    asked = [(one.reference, verdicts.trimmed(benchmark, one.outputs, raw)) for one in answered]
    if columns:
        judged, told = verdicts.recorded([one.recorded for one in answered], columns)
    else:
        judged, told = verdicts.judge(benchmark, asked, settings.benchmark)
    groups = [one.groups or {} for one in answered]
    found = report(benchmark, judged, groups, settings.bootstrap_samples, settings.seed) | told | missing
    _show(found, benchmark)
    if settings.out:
        records = zip(answered, asked, judged, groups, strict=True)
        write_jsonl(settings.out, [verdicts.record(a.id, outputs, v, g) for a, (_, outputs), v, g in records])
    print(json.dumps(found, ensure_ascii=False, allow_nan=False))
    return found


def _read(settings: Score, benchmark: Benchmark) -> tuple[list[predictions.Answered], tuple[str, ...], dict[str, int]]:
    """The file's answers, each with its reference; the columns of its own verdicts, where those are taken; and, where
    the benchmark's rows are known, how many of them are `missing` in the file.

    Verdicts in the file are taken, unless its programs may be run or another judge is named. References come from the
    rows if given, else from the file, else from the hub.
    """
    chosen, path = settings.benchmark, settings.predictions
    assert path is not None
    predictions.refuse_both(settings.fields, chosen.rows)
    found, named = predictions.lines(path, settings.fields, benchmark)
    asked_again = chosen.allow_code or chosen.judge.url or chosen.judge.models
    recorded = () if asked_again and not settings.fields.verdict else named.verdict
    if not recorded:
        verdicts.refuse_code(benchmark, chosen)
        if named.output is None:
            raise DataError(f"{path}: no column with outputs", "name it with fields.output=")
    own = bool(recorded) or (named.reference is not None and not isinstance(benchmark.judge, Program))
    if chosen.rows is None and own:
        return predictions.alone(found, path, named, benchmark, judged=bool(recorded)), recorded, {}
    known = rows.load(benchmark, chosen.rows, chosen.revision, chosen.seed)[: chosen.limit]
    answered = predictions.joined(found, known, path, benchmark)
    missing = len(known) - len(answered)
    if missing:
        print(f"proxytune: {missing} of {len(known)} rows have no output in {path}", file=sys.stderr)
    return answered, recorded, {"missing": missing}


def _show(found: dict[str, Any], benchmark: Benchmark) -> None:
    from rich.text import Text

    from proxytune.analysis import tables

    title = f"{benchmark.name}: {found['n']} rows, {found['outputs']} outputs, {found['unparsed']} unparsed"
    table = tables.tight(title=Text(title, style="bold"), title_justify="left")
    for name in ("", "measure", "over", f"value [{100 * found['level']:g}%]"):
        table.add_column(name, justify="left" if name in ("", "measure") else "right")
    grouped = {name: part for key, parts in found.items() if key.startswith("by_") for name, part in parts.items()}
    for name, part in {"all": found, **grouped}.items():
        for measure, interval in part["intervals"].items():
            value = tables.with_interval(part[measure], interval, ".4f")
            table.add_row(*map(Text, (name, measure, f"{part['over'][measure]:g}", value)))
    tables.console(sys.stderr).print(table)
    if recorded := found.get("recorded"):
        print(f"proxytune: verdicts are the file's own ({', '.join(recorded)})", file=sys.stderr)
