"""The libraries' own bars and notes of what they will rename, kept off the terminal: ours says what goes on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator
from types import ModuleType


@contextlib.contextmanager
def quiet(*libraries: ModuleType) -> Generator[None]:
    """No bars of transformers and of these libraries and no FutureWarning inside; whatever else they say is heard.

    libraries: modules with the three switches that transformers.utils.logging and datasets.utils have in common.
    """
    from transformers.utils import logging

    shown = [library for library in (logging, *libraries) if library.is_progress_bar_enabled()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        # PEFT looks for the model of an adapter by a name that is ours
        warnings.filterwarnings("ignore", message="Could not find a config file in embedded:")
        for library in shown:
            library.disable_progress_bar()
        try:
            yield
        finally:
            for library in shown:
                library.enable_progress_bar()
