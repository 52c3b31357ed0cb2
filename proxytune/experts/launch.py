"""A training spread over the processes of one machine, which `accelerate launch` starts.

The command stays what it is: it composes, records, draws and registers, and its processes (ranks) only train. They read
what to do in a folder, leave the finished model where a training of one process would, and end when the command ends,
however that comes about: a rank that finds its command's lock free kills itself, and no other command begins there
before it has.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from proxytune import errors, files
from proxytune.errors import ModelError, SettingsError, require
from proxytune.experts import ranks
from proxytune.settings import Launch
from proxytune.tracking.progress import bar

NOTE = "proxytune: "  # what our own lines for the user begin with
STOP_SECONDS = 10.0

Log = Callable[[dict[str, float], int], None]


def spread(launch: Launch, folder: Path, module: str, settings: Mapping[str, Any], log: Log) -> None:
    """Run `python -m module folder` in every rank and return when all have ended well.

    Raises SettingsError before anything starts where this machine cannot do it, else the error of the rank that failed.
    """
    configuration = accelerate_configuration(launch, devices())
    with files.locked(ranks.lived(folder)):
        files.remove_folder(folder)
    files.write_json(folder / ranks.SETTINGS, settings)
    files.write_json(folder / ranks.CONFIG, configuration)
    own = uuid.uuid4().hex
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / ranks.CONFIG)]
    with files.locked(ranks.alive(folder, own)), (folder / ranks.LOG).open("wb") as out:
        process = subprocess.Popen(
            [*command, "-m", module, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {ranks.COMMAND: own},
            start_new_session=True,  # Ctrl-C is the command's, which then stops the ranks
        )
        try:
            _follow(process, folder / ranks.STEPS, log)
        finally:
            _stop(process)
    if process.returncode:
        raise _failure(launch, folder)
    printed = (folder / ranks.LOG).read_text("utf-8", "replace").splitlines()
    for line in dict.fromkeys(line for line in printed if line.startswith(NOTE)):
        print(line, file=sys.stderr)
    files.remove_folder(folder)


def resolved(launch: Launch) -> Launch:
    """With the number of processes that this machine makes of it; SettingsError where it cannot do it."""
    if launch.name == "single":
        return launch
    processes = accelerate_configuration(launch, devices())["num_processes"]
    return launch.model_copy(update={"processes": processes})


def devices() -> int:
    """GPUs of this machine that torch sees."""
    import torch

    return torch.cuda.device_count()


def accelerate_configuration(launch: Launch, gpus: int) -> dict[str, Any]:
    """What `accelerate config` would have written. Mixed precision is the trainer's own business."""
    if launch.name != "ddp" and not gpus:
        raise SettingsError(
            f"launch={launch.name} needs CUDA GPUs, and there is none here", "take launch=ddp or single"
        )
    if launch.name == "zero3":
        require("deepspeed", by="launch=zero3")
    processes = launch.processes or gpus
    if not processes:
        raise SettingsError(
            "launch=ddp takes one process for each GPU, and there is none here", "add launch.processes=2"
        )
    if gpus and processes > gpus:
        raise SettingsError(f"launch.processes={processes}, and there are {gpus} GPUs here", "give fewer")
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
    shared = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kinds[launch.name],  # torchrun starts the ranks of all of them, on CPUs too
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": processes,
        "main_process_port": 0,  # any free one
        "mixed_precision": "no",
        "use_cpu": False,
        "same_network": True,
        "rdzv_backend": "static",
        "main_training_function": "main",
        "downcast_bf16": "no",
        "debug": False,
    }
    match launch.name:
        case "fsdp2":
            return shared | {"fsdp_config": _fsdp2(launch)}
        case "zero3":
            return shared | {"deepspeed_config": _zero3(launch)}
        case _:
            return shared


def _fsdp2(launch: Launch) -> dict[str, Any]:
    return {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_offload_params": launch.offload,
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_sync_module_states": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT",  # what is saved is one model, readable without FSDP
        "fsdp_activation_checkpointing": False,  # method.gradient_checkpointing does it
    }


def _zero3(launch: Launch) -> dict[str, Any]:
    place = "cpu" if launch.offload else "none"
    return {
        "zero_stage": 3,
        "zero3_init_flag": True,
        "zero3_save_16bit_model": True,  # as above, one model
        "offload_optimizer_device": place,
        "offload_param_device": place,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def _follow(process: subprocess.Popen[bytes], path: Path, log: Log) -> None:
    """Record and draw what rank 0 writes until the ranks have ended."""
    with bar(note="{task.fields[loss]}", transient=False) as shown:
        task = shown.add_task("training", total=None, loss="")
        lines = _lines(path)
        while True:
            ended = process.poll() is not None
            for told in lines:
                if told is None:
                    break
                shown.update(task, completed=told["step"], **({"total": told["total"]} if "total" in told else {}))
                if values := told.get("values"):
                    log(values, told["step"])
                    if "train/loss" in values:
                        shown.update(task, loss=f"loss {values['train/loss']:.3f}")
            if ended:
                return
            time.sleep(ranks.LOOK_SECONDS)


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The whole lines of a file that grows; None each time there is no further one yet."""
    while not path.exists():
        yield None
    rest = b""
    with path.open("rb") as file:
        while True:
            rest += file.readline()
            if rest.endswith(b"\n"):
                yield json.loads(rest)
                rest = b""
            else:
                yield None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the ranks if they still run: asked first, then their lock goes with ours."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failure(launch: Launch, folder: Path) -> Exception:
    if (folder / ranks.FAILURE).exists():
        told = files.read_json(folder / ranks.FAILURE)
        kind = getattr(errors, told["kind"], None)
        return (
            kind(told["what"], told["hint"])
            if kind
            else RuntimeError(f"in a rank of launch={launch.name}: {told['what']}")
        )
    printed = (folder / ranks.LOG).read_text("utf-8", "replace")
    killed = re.search(r"exitcode\s*:\s*-(\d+)", printed)
    if killed:
        return ModelError(
            f"a process of launch={launch.name} was killed by signal {killed[1]}",
            f"where memory ran out, take smaller batches or fewer processes; what it printed: {folder / ranks.LOG}",
        )
    return RuntimeError(f"launch={launch.name} failed: {printed[-4000:]}")
