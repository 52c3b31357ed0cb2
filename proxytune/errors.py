"""One tree of errors that are the user's to mend. Each is one line, says what was given and what to do, and has an
exit code of its own kind. Anything else that is raised is a bug of ours and keeps its traceback."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterable


class ProxytuneError(Exception):
    """An error to be told in one line: `what` happened, and what to do about it (`hint`)."""

    exit_code = 1

    def __init__(self, what: str, hint: str = ""):
        self.what, self.hint = bare(" ".join(what.split())), " ".join(hint.split())
        super().__init__(f"{self.what} ({self.hint})" if self.hint else self.what)


class SettingsError(ProxytuneError):
    """A key, value or name in the configuration that does not exist or does not hold."""

    exit_code = 2


class DataError(ProxytuneError):
    """Rows or prompts that are missing, broken or empty."""

    exit_code = 3


class ModelError(ProxytuneError):
    """A model or tokenizer that is missing, broken or cannot be reached."""

    exit_code = 4


class TrioError(ProxytuneError):
    """Base, expert and anti that do not belong together."""

    exit_code = 5


class RegistryError(ProxytuneError):
    """An expert that is not registered, or a registry entry that is damaged."""

    exit_code = 6


class StorageError(ProxytuneError):
    """The disk is full, or a file cannot be written or is damaged."""

    exit_code = 7


INTERRUPTED = 130  # the shell's code for a process ended by Ctrl-C


def bare(text: str) -> str:
    """A text without the users and passwords that addresses in it may have, such as HF_ENDPOINT's."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine's or a GPU's memory ran out: each library says so in its own way."""
    words = (
        "out of memory",
        "can't allocate memory",
        "Cannot allocate memory",
        "could not create a primitive",
        "_STATUS_ALLOC_FAILED",  # of cuBLAS and its kin, whose handles need memory too
    )
    told = not isinstance(error, ProxytuneError) and any(each in str(error) for each in words)
    return isinstance(error, MemoryError) or told


def require(library: str, by: str, install: str | None = None) -> None:
    """SettingsError where what is asked for (`by`) needs a library that is not installed. install: its name for pip."""
    if importlib.util.find_spec(library) is None:
        raise SettingsError(f"{by} needs {library}, which is not installed", f"pip install {install or library}")


def did_you_mean(given: str, known: Iterable[str], otherwise: str = "") -> str:
    """A hint naming the closest known words; where none is close `otherwise`, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(given, known, n=2, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(word) for word in close) + "?"
    return otherwise or ("known: " + ", ".join(known) if known else "there is none yet")
