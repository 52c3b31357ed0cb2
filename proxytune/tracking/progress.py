"""What a stage shows while it works: one bar on standard error, so that standard output holds results only."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")


def bar(*, note: str = "", transient: bool = True) -> Progress:
    """A bar to be used in a `with`; `note` is a format that shows fields of its task.

    In a pipe a transient bar shows nothing and a lasting one how it ended.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    console = Console(stderr=True)
    hidden = transient and not console.is_terminal  # else a pipe gets an empty line of it
    return Progress(
        *columns,
        TextColumn(note),
        console=console,
        transient=transient,
        disable=hidden,
        redirect_stdout=False,
        auto_refresh=console.is_terminal,  # a pipe sees the end only, and drawing takes time from the work
        refresh_per_second=4,
    )


def track(items: Iterable[T], label: str, total: int) -> Generator[T]:
    with bar() as progress:
        yield from progress.track(items, total=total, description=label)
