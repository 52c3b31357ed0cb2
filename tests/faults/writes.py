"""Every write of a process below a folder as a numbered moment, at which it is killed or finds the disk full.

Opening for writing, making, renaming, linking and removing are seen by Python's audit hook. What is written through
Python's files, os.write, os.sendfile and os.fsync by wrappers; what libraries write natively (safetensors, torch,
tokenizers) by wrappers of their functions. A kill in a write leaves half of it.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
GROWING = ("open", "mkdir", "write", "save", "link")
CHANGES = {"os.rename": 1, "os.link": 1, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0, "os.truncate": 0}


class Writes:
    """at: the moment of the fault, counted from 1; 0 never comes. kill: SIGKILL. full: no space from then on."""

    def __init__(self, root: Path, at: int = 0, fault: Literal["kill", "full"] = "kill"):
        self.root, self.at, self.fault = os.path.realpath(root), at, fault
        self.seen: list[str] = []

    def install(self) -> None:
        """In this process, for good."""
        sys.addaudithook(self._audit)
        real_open, real_write, real_fsync, real_sendfile = io.open, os.write, os.fsync, os.sendfile
        writes = self

        class File(io.FileIO):
            def write(self, data):
                size = memoryview(data).nbytes
                put = super().write
                writes.moment("write", self.name, lambda: put(memoryview(data).cast("B")[: size // 2]))
                return put(data)

        def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
            if not set(mode) & set("wax+") or not self._inside(file):
                return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = File(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            if buffering == 0:
                return raw
            binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return binary if "b" in mode else io.TextIOWrapper(binary, encoding or "utf-8", errors, newline)

        def wrote(handle, data):
            self.moment("write", handle, lambda: real_write(handle, bytes(data)[: len(data) // 2]))
            return real_write(handle, data)

        def copied(out, source, offset, count):
            self.moment("write", out, lambda: real_sendfile(out, source, offset, os.fstat(source).st_size // 2))
            return real_sendfile(out, source, offset, count)

        def synced(handle):
            self.moment("fsync", handle)
            return real_fsync(handle)

        builtins.open = io.open = opened
        os.write, os.fsync, os.sendfile = wrote, synced, copied
        self._install_native()

    def _install_native(self) -> None:
        import safetensors.torch
        import torch
        from transformers import PreTrainedTokenizerFast

        def saving(real: Callable[..., Any], path_of: Callable[..., Any]) -> Callable[..., Any]:
            def save(*args, **kwargs):
                def half() -> None:
                    real(*args, **kwargs)
                    os.truncate(path, os.path.getsize(path) // 2)

                path = path_of(*args, **kwargs)
                if isinstance(path, (str, os.PathLike)):
                    self.moment("save", path, half)
                return real(*args, **kwargs)

            return save

        safetensors.torch.serialize_file = saving(
            safetensors.torch.serialize_file, lambda tensors, filename, **rest: filename
        )
        torch.save = saving(torch.save, lambda obj, f, **rest: f)
        kind = next(k for k in PreTrainedTokenizerFast.__mro__ if "_save_pretrained" in vars(k))
        kind._save_pretrained = saving(
            kind._save_pretrained, lambda self, save_directory, **rest: os.path.join(save_directory, "tokenizer.json")
        )

    def moment(self, what: str, target: Any, half: Callable[[], Any] | None = None) -> None:
        if not (path := self._inside(target)):
            return
        self.seen.append(f"{what} {path}")
        number = len(self.seen)
        if self.fault == "kill" and number == self.at:
            self.at = 0  # what `half` does is no moment of its own
            if half:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "full" and 0 < self.at <= number and what in GROWING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if flags & WRITING and not isinstance(path, int):
                self.moment("open", path)
        elif event in CHANGES:
            place = CHANGES[event]
            handle = args[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
            target = args[place]
            if isinstance(handle, int) and handle >= 0 and not os.path.isabs(target):
                target = os.path.join(os.readlink(f"/proc/self/fd/{handle}"), os.fsdecode(target))
            if event == "os.mkdir" and os.path.isdir(target):
                return  # asked for in case it is missing
            self.moment(event.removeprefix("os."), target)

    def _inside(self, target: Any) -> str:
        """The path of a file or descriptor below the root, else nothing."""
        if isinstance(target, int):
            try:
                target = os.readlink(f"/proc/self/fd/{target}")
            except OSError:
                return ""
        path = os.path.abspath(os.fsdecode(target))
        return path if path.startswith(self.root + os.sep) else ""
