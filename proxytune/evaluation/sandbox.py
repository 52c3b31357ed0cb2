"""Programs that a model wrote, run without harm: each in a process of its own inside `confined.py`.

`isolated`, the default, gives every program an own process group and process namespace, so that all of it ends with it;
no network, not even loopback; a file system that holds the interpreter and the system's libraries, read-only, and one
empty folder in memory with a bounded size; a user that owns nothing and can gain nothing; an empty environment; limits
on processor time, memory, file size, open files, processes and output; a limit on time; and a filter of system calls
against what these limits do not count or cover (shared memory, new namespaces, other processes). It needs Linux 5.12 on
x86-64 or 64-bit Arm with user namespaces, or root. Where the kernel does not give all of this, nothing is run.
`limits`, which must be asked for, leaves out the namespaces and the filter: the program has limits, a folder and an
empty environment, but sees the files of the user who runs it, or as root those that anybody can read, and the network.

What is not covered. A fault of the kernel. Time and memory that programs within their limits take from others: memory
is bounded for each process, not for a program's processes together. A program that knows these very lines can say that
it came to its end when it did not, and, as in the published evaluation, return an object that claims to equal
everything: that harms a score and nothing else. With `limits` a program that keeps forking can outlive its end.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from proxytune.errors import SettingsError
from proxytune.evaluation.calls import filtered
from proxytune.tracking.progress import track

Confinement = Literal["isolated", "limits"]
Program = str | Sequence[str]
MEGABYTE = 1 << 20
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/nix/store")
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "MPLBACKEND": "agg",
}
SLACK = 30.0  # seconds beyond a program's own limit after which its server is given up
START_SECONDS = 120.0  # a server may import large libraries first


@dataclass(frozen=True)
class Limits:
    """Of one program: seconds, bytes, counts. wall_seconds 0 is three times cpu_seconds and a second more.

    The published time limit, 3 s for HumanEval, is of the clock, on idle processors; here it is of the processor, so
    that a busy machine fails nothing, and the clock's is wider.
    """

    cpu_seconds: int = 3
    wall_seconds: float = 0.0
    memory: int = 1024 * MEGABYTE
    disk: int = 32 * MEGABYTE
    open_files: int = 64
    processes: int = 16
    output: int = 1 << 16


@dataclass(frozen=True)
class Result:
    """How a program ended. passed: it came to its end. output: what it wrote, cut."""

    status: Literal["passed", "failed", "timed out"]
    output: str
    seconds: float


@dataclass(frozen=True)
class Box:
    """What programs run in. python: another interpreter than this one; preload: modules imported before they start."""

    limits: Limits = Limits()
    confinement: Confinement = "isolated"
    python: str | None = None
    preload: tuple[str, ...] = ()

    @property
    def wall_seconds(self) -> float:
        return self.limits.wall_seconds or 3.0 * self.limits.cpu_seconds + 1

    @property
    def interpreter(self) -> str:
        return self.python or sys.executable

    @cached_property
    def visible(self) -> list[str]:
        """Files and folders that a program needs to see: the system's libraries and the interpreter's own."""
        # Of the path only what is the interpreter's: a .pth file may name a folder of the user's.
        asks = (
            "import json, sys; own = [sys.prefix, sys.base_prefix, sys.exec_prefix]; "
            "print(json.dumps(own + [p for p in sys.path if p.startswith(tuple(own))]))"
        )
        try:
            asked = subprocess.run([self.interpreter, "-I", "-c", asks], capture_output=True, check=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SettingsError(f"{self.interpreter} runs no programs: {error}", "set benchmark.python") from error
        found = [path for path in json.loads(asked.stdout) if os.path.isdir(path)]
        own = {*found, *map(os.path.realpath, found)}
        kept: list[str] = []
        for path in [path for path in SYSTEM if os.path.lexists(path)] + sorted(own, key=len):
            if path != "/" and not any(Path(path).is_relative_to(other) for other in kept):
                kept.append(path)
        return kept


def run(programs: Sequence[Program], box: Box, workers: int = 0) -> list[Result]:
    """Run all programs, `workers` at a time (0: one a processor), and return how each ended, in order.

    A program in parts is run one part after the other in one module, with the builtins as they were before each.

    Raises SettingsError where the sandbox cannot be had.
    """
    count = max(1, min(workers or len(os.sched_getaffinity(0)), len(programs)))
    servers = [Server(box) for _ in range(count)]
    own, free = threading.local(), list(servers)

    def one(program: Program) -> Result:
        if not hasattr(own, "server"):
            own.server = free.pop()
        return own.server.run(program)

    pool = ThreadPoolExecutor(count)
    try:
        return list(track(pool.map(one, programs), "programs", len(programs)))
    finally:
        for server in servers:
            server.close()
        pool.shutdown(cancel_futures=True)


class Server:
    """A process of `confined.py`, started at its first program and again should it be lost."""

    def __init__(self, box: Box):
        self.box = box
        self.process: subprocess.Popen[bytes] | None = None
        self.root = tempfile.mkdtemp(prefix="sandbox-")
        self.closed = False

    def run(self, program: Program) -> Result:
        if self.process is None:
            self._start()
        try:
            self._send({"program": program})
            answer = self._receive(self.box.wall_seconds + SLACK)
        except (OSError, EOFError) as error:
            self._stop()
            return Result("failed", f"the sandbox was lost: {error}", 0.0)
        if answer["broken"]:
            raise _unusable(self.box, answer["broken"])
        return Result(answer["status"], answer["output"], answer["seconds"])

    def close(self) -> None:
        self.closed = True
        self._stop()
        with contextlib.suppress(OSError):
            os.rmdir(self.root)

    def _start(self) -> None:
        if self.closed:
            raise EOFError("the sandbox is closed")
        calls = b"" if self.box.confinement == "limits" else filtered()
        if calls is None:
            raise _unusable(self.box, f"the system calls of {platform.machine()} are not known here")
        config = {
            "confinement": self.box.confinement,
            "calls": calls.hex(),
            "limits": asdict(self.box.limits) | {"wall_seconds": self.box.wall_seconds},
            "visible": self.box.visible,
            "preload": self.box.preload,
            "root": self.root,
        }
        inside = Path(__file__).with_name("confined.py")
        self.process = subprocess.Popen(
            [self.box.interpreter, "-I", str(inside), json.dumps(config)],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
            **{"env": ENVIRONMENT, "cwd": "/", "start_new_session": True},
        )
        try:
            broken = self._receive(START_SECONDS)["broken"]
        except (OSError, EOFError):
            assert self.process.stderr is not None
            self.process.kill()
            broken = self.process.stderr.read().decode(errors="replace").strip().rpartition("\n")[2] or "no answer"
        if broken:
            raise _unusable(self.box, broken)

    def _stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
            self.process = None

    def _send(self, request: dict[str, Any]) -> None:
        assert self.process is not None and self.process.stdin is not None
        text = json.dumps(request).encode()
        self.process.stdin.write(struct.pack("!I", len(text)) + text)
        self.process.stdin.flush()

    def _receive(self, seconds: float) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        source, deadline = self.process.stdout.fileno(), time.monotonic() + seconds
        (count,) = struct.unpack("!I", _read(source, 4, deadline))
        return json.loads(_read(source, count, deadline))


def _read(source: int, count: int, deadline: float) -> bytes:
    parts = b""
    while len(parts) < count:
        ready, _, _ = select.select([source], [], [], max(0.0, deadline - time.monotonic()))
        part = os.read(source, count - len(parts)) if ready else b""
        if not part:
            raise EOFError("it does not answer")
        parts += part
    return parts


def _unusable(box: Box, why: str) -> SettingsError:
    if box.confinement == "limits":
        return SettingsError(f"the sandbox cannot be had here: {why}")
    instead = "benchmark.sandbox=limits runs the programs with limits on resources only"
    return SettingsError(f"this system gives no isolated sandbox: {why}", instead)
