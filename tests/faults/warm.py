"""A process that has imported everything and runs each command line in a fork of itself, in tenths of a second.

Settings are composed once for each command line, in the parent: Hydra takes longer than the stages do here.

`Warm()` starts one and `run` asks it; as a program it reads a job a line and answers each with a line.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300
PLAIN = ("registry", "report", "sync", "compare")  # commands with options of their own
# What takes long to import; whatever else a run had to import is imported once it has ended.
NEEDED = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "safetensors.torch",
    "peft",
    "trl.trainer.sft_trainer",
    "pipelines.launch",
    "proxytune.stages.expert",
    "proxytune.stages.evaluate",
)


@dataclass(frozen=True)
class Ended:
    """How a run ended: code is -9 after a kill, as subprocess has it, -6 after a hang; seen: its writes, if it lived.

    seconds: of a processor, so that a busy machine does not count. wall: by the clock.
    """

    code: int
    seconds: float
    wall: float
    out: str
    err: str
    seen: list[str]


class Warm:
    def __init__(self, folder: Path, **environment: str):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.warm"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        arguments: Sequence[str],
        *,
        at: int = 0,
        fault: str = "kill",
        after: float = 0,
        root: Path | None = None,
        program: str = "",
        **environment: str,
    ) -> Ended:
        """One command line of proxytune. at, fault: as `Writes`, below `root`; after: killed at so many seconds (wall).

        program: statements to run first in the fork; all there is to run where no arguments are given.
        """
        root = root or self.folder
        job = {"arguments": list(arguments), "at": at, "fault": fault, "after": after, "root": str(root)}
        assert self.process.stdin and self.process.stdout
        print(json.dumps(job | {"program": program, "environment": environment}), file=self.process.stdin, flush=True)
        return Ended(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import(NEEDED)
    # transformers compiles 900 patterns before it loads its first model, and keeps them
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    for line in sys.stdin:
        job = json.loads(line)
        stage, *_ = job["arguments"] or PLAIN
        values = None if stage in PLAIN else _composed(*job["arguments"])
        with tempfile.TemporaryDirectory() as folder:
            for name in ("out", "err"):
                Path(folder, name).touch()  # a kill may come before the fork opens them
            child = os.fork()
            if child == 0:
                _child(job, values, Path(folder))
            code, seconds, wall = _wait(child, job["after"])
            if code < 0:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)  # what it had started would go on in the folder
            told = Path(folder, "told")
            known: dict[str, Any] = json.loads(told.read_text()) if told.exists() else {"seen": [], "modules": []}
            out, err = (Path(folder, name).read_text("utf-8", "replace") for name in ("out", "err"))
        _import(known["modules"])
        ended = {"code": code, "seconds": seconds, "wall": wall, "out": out, "err": err, "seen": known["seen"]}
        print(json.dumps(ended), file=answers, flush=True)


def _wait(child: int, after: float) -> tuple[int, float, float]:
    """Exit code, seconds of a processor, seconds by the clock."""
    began, limit = time.monotonic(), after or SECONDS
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, time.monotonic() - began
        if time.monotonic() - began > limit:
            os.kill(child, signal.SIGKILL if after else signal.SIGABRT)  # a hang is not the kill that a test wants
            limit = float("inf")
        time.sleep(0.002)


@functools.cache
def _composed(stage: str, *overrides: str) -> dict[str, Any]:
    import hydra

    from pipelines import launch
    from proxytune.files import resource

    options = launch.parser(stage).parse_intermixed_args(overrides)
    with hydra.initialize_config_dir(str(resource("conf")), job_name=stage, version_base="1.3"):
        config = hydra.compose(stage, [*options.overrides, *launch.search_path(options.config_dir)])
    return launch.plain(config, f"proxytune {stage}", None)


def _run(arguments: list[str], values: dict[str, Any] | None) -> int:
    from pipelines import cli, exits

    if values is None:
        return cli.main(arguments)
    try:
        importlib.import_module(f"pipelines.{arguments[0]}").run(values)
    except Exception as error:
        return exits.of(error).tell()
    return 0


def _child(job: dict[str, Any], values: dict[str, Any] | None, folder: Path) -> None:
    code = 70
    os.setpgid(0, 0)
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
        os.environ |= job["environment"]
        os.chdir(job["root"])
        from tests.faults.writes import Writes

        writes = Writes(Path(job["root"]), job["at"], job["fault"])
        writes.install()
        exec(job["program"], {})
        code = _run(job["arguments"], values) if job["arguments"] else 0
        sys.stdout.flush()
        writes.root = "/nowhere"
        (folder / "telling").write_text(json.dumps({"seen": writes.seen, "modules": list(sys.modules)}))
        (folder / "telling").rename(folder / "told")  # whole, or a kill came before
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def _import(names: Sequence[str]) -> None:
    """What a run had to import, the next one finds."""
    for name in names:
        if name not in sys.modules and not name.startswith(("__", "tests.")):
            with contextlib.suppress(BaseException):
                importlib.import_module(name)
    gc.freeze()  # what is shared with every fork is not looked through, and so not copied, in each of them


if __name__ == "__main__":
    serve()
