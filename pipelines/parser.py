"""Command lines of options, for Hydra's flags and for the commands that take no settings."""

from __future__ import annotations

import argparse
from typing import NoReturn

from proxytune.errors import SettingsError


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as every other error here is told."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message, f"see {self.prog} --help")
