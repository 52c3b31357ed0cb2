"""How a run ends: what was raised becomes a text for stderr and an exit code, and can travel between processes."""

from __future__ import annotations

import contextlib
import errno
import sys
import traceback
from typing import NamedTuple

from proxytune.errors import INTERRUPTED, ModelError, ProxytuneError, StorageError, out_of_memory

BUG = 1  # an exception that is not the user's to mend; it keeps its traceback
# safetensors and tokenizers; torch, whose file came out shorter than what it wrote
NO_SPACE = ("No space left on device", "inline_container.cc")
PIPE_CLOSED = 141  # the shell's code for a process ended by SIGPIPE, as in `proxytune decode ... | head -1`


class Failure(NamedTuple):
    code: int
    text: str

    def tell(self) -> int:
        if self.text:
            with contextlib.suppress(OSError):  # stderr goes to the full disk too: the code still tells
                print(self.text, file=sys.stderr, flush=True)
        return self.code


def of(error: BaseException) -> Failure:
    """What to say of an exception, in one line wherever the user can mend it."""
    if not isinstance(error, ProxytuneError) and (full := _of_a_full_disk(error)):
        where = f" to write {full.filename}" if isinstance(full, OSError) and full.filename else ""
        error = StorageError(f"no space left on the disk{where}", "free some, or point outputs= at another disk")
    elif out_of_memory(error):
        error = ModelError("out of memory", "a smaller batch, a smaller model, or quantization=4bit")
    match error:
        case ProxytuneError():
            return Failure(error.exit_code, f"proxytune: {error}")
        case KeyboardInterrupt():
            return Failure(INTERRUPTED, "proxytune: interrupted")
        case BrokenPipeError():
            return Failure(PIPE_CLOSED, "")
        case _:
            return Failure(BUG, "".join(traceback.format_exception(error)).rstrip())


def _of_a_full_disk(error: BaseException | None) -> BaseException | None:
    """The error, or the one behind it, that a full disk caused. What writes natively says so in its text alone."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        if any(words in str(error) for words in NO_SPACE):
            return error
        error = error.__cause__ or error.__context__
    return None
