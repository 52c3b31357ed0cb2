"""Rows of public sets on the Hugging Face hub."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from proxytune.errors import DataError
from proxytune.models.online import answers
from proxytune.tasks import preferences
from proxytune.tasks import rows as forms
from proxytune.tasks.task import HubData, Row, Task

INSTEAD = "go online, or set data=builtin, or data=files data.train=FILE data.test=FILE"


def read(
    task: Task, revision: str | None, limit_train: int | None, pairs: bool = False
) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """(rows of each split, how many of each could not be used).

    Of the training rows only the first `limit_train` are looked at; held-out rows are read whole, as they decide which
    training rows must go. pairs: the task's public preferences instead.
    """
    hub = task.preferences if pairs else task.hub
    if hub is None:
        raise DataError(f"{task.name} has no public preference rows", "set data=files data.train=FILE, or data=builtin")
    checked = preferences.read if pairs else forms.checked
    check_reachable(hub.path)
    found: dict[str, list[Row]] = {}
    skipped: dict[str, int] = {}
    for split in hub.splits:
        raws = list(_slice(hub, split, revision, limit_train if split == "train" else None))
        named = ((f"{split}-{place}", raw) for place, raw in enumerate(raws))
        found[split] = [row for name, raw in named if (row := _row(hub, raw, name, checked))]
        skipped[split] = len(raws) - len(found[split])
        if not found[split]:
            raise DataError(f"no row of {hub.path} ({hub.splits[split]}) can be used for {task.name}", INSTEAD)
    return found, skipped


def _row(hub: HubData, raw: Mapping[str, Any], name: str, checked: Callable[[Mapping[str, Any]], Row]) -> Row | None:
    try:
        row = hub.to_row(raw)
        return {"id": name, **checked(row)} if row else None
    except (DataError, KeyError, TypeError, AttributeError):
        return None  # public sets hold a few empty turns


def _slice(hub: HubData, split: str, revision: str | None, limit: int | None) -> Iterable[Mapping[str, Any]]:
    import datasets

    spec = hub.splits[split]
    try:
        if hub.streamed:
            return _streamed(hub, spec, revision, limit)
        rows = datasets.load_dataset(hub.path, hub.name, split=spec, revision=revision)
        return rows.select(range(min(limit, len(rows)))) if limit else rows
    except Exception as error:  # the library, its HTTP client and its file formats share no base
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise DataError(f"cannot read {hub.path} from the hub: {reason}", INSTEAD) from error


def _streamed(hub: HubData, spec: str, revision: str | None, limit: int | None) -> list[Mapping[str, Any]]:
    import datasets

    match = re.fullmatch(r"(\w+)\[(\d+):(\d+)\]", spec)
    assert match, f"a streamed slice is written split[from:to], not {spec}"
    start, stop = int(match[2]), int(match[3])
    stop = min(stop, start + limit) if limit else stop
    whole = datasets.load_dataset(hub.path, hub.name, split=match[1], revision=revision, streaming=True)
    parts = [whole.shard(whole.num_shards, index) for index in range(whole.num_shards)]
    return list(itertools.islice(datasets.interleave_datasets(parts), start, stop))


def check_reachable(path: str) -> None:
    """DataError within seconds where nothing answers: the hub's own client would try for most of a minute."""
    from huggingface_hub import constants

    if Path(path).is_dir() or constants.is_offline_mode():
        return
    if not answers(constants.ENDPOINT):
        cached = "HF_HUB_OFFLINE=1 reads what was fetched before"
        raise DataError(f"cannot read {path}: {constants.ENDPOINT} does not answer", f"{INSTEAD}; {cached}")
