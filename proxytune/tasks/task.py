"""What a task is: rows to train on and to hold out, how to ask, where to stop, how to score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SPLITS = ("train", "validation", "test")

# A row is in one of TRL's two prompt-completion forms, with an id of its own:
#   {"id": str, "prompt": str, "completion": str}
#   {"id": str, "prompt": [{"role", "content"}, ...], "completion": [{"role": "assistant", "content"}]}
Row = dict[str, Any]


@dataclass(frozen=True)
class HubData:
    """Where the public rows lie on the Hugging Face hub and how one of them becomes a `Row`.

    splits maps ours to slices in `datasets` syntax, for instance {"train": "train[:95%]", ...}. `to_row` returns None
    for a row that this task cannot use; a row without an id is named by its split and place.

    streamed: for a set too large to fetch whole. Its files are read in turn, one row of each, so that a slice is a
    mixture of all of them, and reading stops where the last slice ends; slices then are row numbers, "train[0:1000]".
    """

    path: str
    splits: Mapping[str, str]
    to_row: Callable[[Mapping[str, Any]], Row | None]
    name: str | None = None
    streamed: bool = False


@dataclass(frozen=True)
class Task:
    """A named task.

    `builtin()` returns all splits without a network. `metrics` maps each metric's name to its scorer: `score(reference,
    output)` is in 0..1, 1 for the reference itself, and is averaged over rows. The first metric is the task's own, the
    one that tables and alpha selection use. `preferences`: public rows of a chosen and a rejected reply, if any; their
    `to_row` gives what `tasks/preferences.py` reads.
    """

    name: str
    summary: str
    builtin: Callable[[], dict[str, list[Row]]]
    hub: HubData
    metrics: Mapping[str, Callable[[str, str], float]]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    preferences: HubData | None = None

    @property
    def metric_name(self) -> str:
        return next(iter(self.metrics))
