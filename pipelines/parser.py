"""Command lines of options, for Hydra's flags and for the commands that take no settings."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from proxytune.errors import SettingsError


def at_least(least: int) -> Callable[[str], int]:
    """A type of option: a whole number that is not smaller."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return int(text)

    number.__name__ = "int"  # as argparse tells what a text is not
    return number


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as every other error here is told."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message, f"see {self.prog} --help")
