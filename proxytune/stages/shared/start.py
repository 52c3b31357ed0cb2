"""How every stage starts: on as many threads as asked, and with a record of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from proxytune.settings import Stage
from proxytune.tasks import catalog, sources
from proxytune.tasks.sources import Dataset
from proxytune.tracking import record


def start(settings: Stage, stage: str, tags: Sequence[str] = (), **resolved: Any) -> AbstractContextManager[record.Run]:
    """The record of this run of a stage. resolved: what the settings left open, such as the alpha that is used."""
    limit_threads(settings)
    return record.start(
        settings.tracker,
        settings.outputs,
        stage=stage,
        task=settings.task.name,
        family=settings.family.name,
        config=settings.model_dump(mode="json", exclude={"command"}) | resolved,
        command=settings.command,
        tags=tags,
    )


def limit_threads(settings: Stage) -> None:
    if settings.threads:
        import torch

        torch.set_num_threads(settings.threads)


def dataset(settings: Stage, *, pairs: bool = False) -> Dataset:
    """All rows of the task, as `sources.load` has them."""
    task, cache = catalog.get(settings.task.name), settings.outputs / "cache"
    return sources.load(settings.data, task, settings.family, cache, pairs=pairs)


def warn(data: Dataset) -> None:
    """Tell on standard error what the user should know of the rows."""
    for line in data.warnings():
        print(f"proxytune: {line}", file=sys.stderr)
