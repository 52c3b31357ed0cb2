"""The tasks by name. A task's module is imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module

from proxytune.errors import SettingsError, did_you_mean
from proxytune.tasks.task import Task

TASKS = {
    "code": "proxytune.tasks.code",
    "instruction": "proxytune.tasks.instruction",
    "math": "proxytune.tasks.math",
    "qa": "proxytune.tasks.qa",
}


def names() -> list[str]:
    return sorted(TASKS)


def get(name: str) -> Task:
    """The task of that name; SettingsError where there is none."""
    if name not in TASKS:
        raise SettingsError(f"there is no task {name!r}", did_you_mean(name, TASKS))
    return import_module(TASKS[name]).TASK
