"""Typed, validated settings of every stage: what Hydra composed, checked before anything else happens.

Unknown keys are refused with a suggestion, numbers must be finite and in range. A stage's `run(settings)` takes one of
these; `conf/` holds the values. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from proxytune.errors import SettingsError, did_you_mean
from proxytune.settings.benchmarks import Benchmark, Fields, Harness, Judge
from proxytune.settings.sections import (
    Count,
    Data,
    Decode,
    Family,
    Launch,
    Method,
    ModelRef,
    Peft,
    Remote,
    Section,
    Share,
    TaskChoice,
    Tracker,
)
from proxytune.settings.stages import (
    Analyze,
    Bench,
    DecodeStage,
    Demo,
    Doctor,
    Evaluate,
    Expert,
    Healing,
    Pretrain,
    Score,
    Serve,
    Stage,
    Steer,
    Steering,
    Sweep,
    Twin,
)

__all__ = [
    "Analyze",
    "Bench",
    "Benchmark",
    "Count",
    "Data",
    "Decode",
    "DecodeStage",
    "Demo",
    "Doctor",
    "Evaluate",
    "Expert",
    "Family",
    "Fields",
    "Harness",
    "Healing",
    "Judge",
    "Launch",
    "Method",
    "ModelRef",
    "Peft",
    "Pretrain",
    "Remote",
    "S",
    "Score",
    "Section",
    "Serve",
    "Share",
    "Stage",
    "Steer",
    "Steering",
    "Sweep",
    "TaskChoice",
    "Tracker",
    "Twin",
    "load",
]

S = TypeVar("S", bound=BaseModel)


def load(kind: type[S], values: Mapping[str, Any]) -> S:
    """Validate composed values into the settings of a stage.

    Raises SettingsError in one line: the first thing that is wrong, what was given, and what would do.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            parent, _, key = where.rpartition(".")
            raise SettingsError(f"unknown key {where}", did_you_mean(key, _keys(kind, parent))) from None
        if first["type"] == "missing":
            raise SettingsError(f"{where} is missing") from None
        message, section = first["msg"].removeprefix("Value error, "), isinstance(first["input"], Mapping)
        if not where or (section and first["type"] == "value_error"):  # it names the keys of a section itself
            raise SettingsError(message) from None
        given = "" if section else f"={first['input']!r}"
        raise SettingsError(f"{where}{given}: {message}") from None


def _keys(kind: type[BaseModel], parent: str) -> list[str]:
    for name in filter(None, parent.split(".")):
        field = kind.model_fields.get(name)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        kind = field.annotation
    return [field.alias or name for name, field in kind.model_fields.items()]
