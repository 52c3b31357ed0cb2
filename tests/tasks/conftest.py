from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

from proxytune.tasks import catalog, stdlib
from proxytune.tasks.task import Row


@pytest.fixture(scope="session")
def built_in() -> Iterator[dict[str, dict[str, list[Row]]]]:
    """Every task's built-in rows, made once, and the library read once: it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stdlib, "functions", cache(stdlib.functions))
        yield {name: catalog.get(name).builtin() for name in catalog.names()}
