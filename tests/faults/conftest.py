from __future__ import annotations

import os

import pytest

from tests.faults import place as places

LONG = "PROXYTUNE_CRASH" in os.environ  # make crash


def pytest_terminal_summary(terminalreporter) -> None:
    """What the tests counted, a line each."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        if LONG and report.user_properties:
            counted = ", ".join(f"{name} {value}" for name, value in report.user_properties)
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {counted}, {report.duration:.0f} s")


@pytest.fixture(scope="session")
def place(warm, tmp_path_factory):
    return places.make(warm, tmp_path_factory.mktemp("faults"))
