"""Where rows come from: built in, the public sets on the hub, or the user's own files."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from proxytune import files, settings
from proxytune.errors import DataError, SettingsError, StorageError
from proxytune.models.prompts import text_of
from proxytune.tasks import preferences
from proxytune.tasks.task import SPLITS, Row, Task


@dataclass(frozen=True)
class Dataset:
    """The rows of a task, each with id, prompt and completion, and the hashes that name them.

    A split without rows is an empty list here; `held` refuses it. dropped: rows left out because their prompt is held
    out too; skipped: rows of a public set that could not be used. Both count by split, and are empty where none was.
    """

    rows: dict[str, list[Row]]
    source: str
    fingerprint: str
    fingerprints: dict[str, str]
    dropped: dict[str, int]
    skipped: dict[str, int]

    def held(self, split: str) -> list[Row]:
        """The rows of a split that a stage needs."""
        if not self.rows[split]:
            raise DataError(f"there are no {split} rows", f"set data.{split}=FILE")
        return self.rows[split]

    def warnings(self) -> list[str]:
        """What the user should know of the rows, a line each."""
        return [
            *(f"{count} {split} rows dropped: their prompts are held out" for split, count in self.dropped.items()),
            *(f"{count} {split} rows skipped: not usable for this task" for split, count in self.skipped.items()),
        ]


def load(data: settings.Data, task: Task, family: settings.Family, cache: Path, *, pairs: bool = False) -> Dataset:
    """All rows of a task; `cache` is a folder that may be emptied at any time. Raises DataError or SettingsError.

    pairs: training and validation rows are preferences (tasks/preferences.py) rather than completions.
    """
    source = family.data if data.source == "auto" else data.source
    _refuse_unread(data, source)
    skipped: dict[str, int] = {}
    if source == "builtin":
        rows = _built_in(task, cache)
        if pairs:
            rows |= {split: preferences.made_of(rows[split]) for split in ("train", "validation")}
    elif source == "files":
        from proxytune.tasks import rowfiles

        rows, skipped = rowfiles.read(data, task, pairs)
    else:
        from proxytune.tasks import hub

        rows, skipped = hub.read(task, data.revision, data.limit_train, pairs)
    rows, dropped = without_overlap(rows)
    assert source != "builtin" or not dropped, f"built-in rows of {task.name} stand in two splits: {dropped}"
    limits = {"train": data.limit_train, "validation": data.limit_validation, "test": data.limit_test}
    rows = {split: rows[split][: limits[split]] for split in SPLITS}
    return Dataset(
        rows=rows,
        source=source,
        fingerprint=files.hash_json(rows),
        fingerprints={split: files.hash_json(kept) for split, kept in rows.items()},
        dropped={split: count for split, count in dropped.items() if count},
        skipped={split: count for split, count in skipped.items() if count},
    )


def without_overlap(rows: dict[str, list[Row]]) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """Rows whose prompt stands in no earlier one of test, validation, train; and how many were dropped, by split."""
    kept, dropped, seen = {}, {}, set()
    for split in reversed(SPLITS):
        kept[split] = [row for row in rows[split] if text_of(row["prompt"]) not in seen]
        if len(kept[split]) < len(rows[split]):
            dropped[split] = len(rows[split]) - len(kept[split])
        seen |= {text_of(row["prompt"]) for row in kept[split]}
    return kept, dropped


def _refuse_unread(data: settings.Data, source: str) -> None:
    """A file or revision that the source would silently ignore is a slip of the user's."""
    for key in ("train", "validation", "test"):
        if getattr(data, key) and source != "files":
            raise SettingsError(f"data.{key} is not read from data={source}", "add data=files")
    if data.bad_rows == "skip" and source == "builtin":
        raise SettingsError("data.bad_rows is not read from data=builtin", "leave it out")
    if data.revision and source != "hub":
        raise SettingsError(f"data.revision is not read from data={source}", "add data=hub")


def _built_in(task: Task, cache: Path) -> dict[str, list[Row]]:
    """The task's own rows, from `cache` if they stand there whole: reading the library takes seconds."""
    path = cache / f"{task.name}-{_builtin_key()[:16]}.json"
    try:
        kept = files.read_json(path)
        if files.hash_json(kept["rows"]) == kept["hash"]:
            return kept["rows"]
    except (OSError, StorageError, KeyError, TypeError):
        pass  # absent or damaged: made anew
    rows = task.builtin()
    files.write_json(path, {"hash": files.hash_json(rows), "rows": rows})
    return rows


def _builtin_key() -> str:
    """Changes with whatever the rows are made from: this Python's own library, and the modules beside this one."""
    made_by = {path.name: files.hash_file(path) for path in sorted(Path(__file__).parent.glob("*.py"))}
    return files.hash_json([sys.version, sys.base_prefix, made_by])
