"""When memory runs out: fewer rows at a time, and at one row a clear stop. What was kept before is not done again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from proxytune.errors import ModelError, out_of_memory

T = TypeVar("T")


def in_smaller_batches(work: Callable[[int], T], rows: int) -> T:
    """work(rows), or of half as many, and so on. ModelError where not even one row has room."""
    while True:
        try:
            return work(rows)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if rows == 1:
                raise ModelError(
                    "out of memory with one row at a time; what is finished is kept",
                    "take a smaller base, quantization=4bit, fewer decode.max_new_tokens or a shorter prompt",
                ) from error
        # Here the error is gone, and with it the frames that held tensors.
        rows //= 2
        print(
            f"proxytune: out of memory; going on with {'one row' if rows == 1 else f'{rows} rows'} at a time",
            file=sys.stderr,
        )
        _release()


def _release() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
