"""How a run ends: what was raised becomes a text for stderr and an exit code, and can travel between processes."""

from __future__ import annotations

import errno
import sys
import traceback
from typing import NamedTuple

from proxytune.errors import INTERRUPTED, ProxytuneError, StorageError

BUG = 1  # an exception that is not the user's to mend; it keeps its traceback
PIPE_CLOSED = 141  # the shell's code for a process ended by SIGPIPE, as in `proxytune decode ... | head -1`


class Failure(NamedTuple):
    code: int
    text: str

    def tell(self) -> int:
        if self.text:
            print(self.text, file=sys.stderr, flush=True)
        return self.code


def of(error: BaseException) -> Failure:
    """What to say of an exception, in one line wherever the user can mend it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" to write {error.filename}" if error.filename else ""
        error = StorageError(f"no space left on the disk{where}", "free some, or point outputs= at another disk")
    match error:
        case ProxytuneError():
            return Failure(error.exit_code, f"proxytune: {error}")
        case KeyboardInterrupt():
            return Failure(INTERRUPTED, "proxytune: interrupted")
        case BrokenPipeError():
            return Failure(PIPE_CLOSED, "")
        case _:
            return Failure(BUG, "".join(traceback.format_exception(error)).rstrip())
