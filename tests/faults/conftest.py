from __future__ import annotations

import os

import pytest

from tests.faults import place as places
from tests.faults.warm import Warm

LONG = "PROXYTUNE_CRASH" in os.environ  # make crash


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("crash") and not LONG:
            item.add_marker(pytest.mark.skip(reason="long: make crash"))


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A place with an expert, kept as `trained`; before that there was nothing, kept as `empty`."""
    folder = tmp_path_factory.mktemp("faults")
    warm = Warm(folder)
    made = places.make(warm, folder)
    made.whole("empty", made.stage("expert"))  # leaves what it made
    made.keep("trained")
    yield made
    warm.close()
