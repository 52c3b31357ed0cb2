"""Many processes that register versions of one name at once, some of them killed, while others read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from proxytune.experts.registry import Registry
from tests.faults.conftest import LONG

WRITERS, TURNS, READERS, KILLED = (16, 25, 8, 4) if LONG else (4, 8, 2, 1)

PROGRAM = """
import json, os, random, signal, sys, time
from pathlib import Path
from proxytune.errors import RegistryError
from proxytune.experts.manifest import CodeVersion, DataLineage, Manifest
from proxytune.experts.registry import Registry
from proxytune.models.identity import ModelId

root, writers, turns, readers, killed = Path(sys.argv[1]), *map(int, sys.argv[2:])
registry = Registry(root / "registry")
told = os.open(root / "told", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
stop = root / "stop"
draft = Manifest(
    name="crowd", task="qa", family="random", role="expert", kind="lora", prompt_format="plain", config={}, command="",
    anti=ModelId(model="m", revision=None, weights="0" * 64, tokenizer="0" * 64), training={},
    code=CodeVersion(version="0"),
    data=DataLineage(source="files", fingerprint="0" * 64, train=1, validation=0, test=0),
)

def write(writer):
    for turn in range(turns if writer >= killed else sys.maxsize):
        with registry.staging() as folder:
            (folder / "adapter_model.safetensors").write_bytes(f"{writer}.{turn}".encode() * 500)
            made = registry.publish(folder, draft)
        os.write(told, (json.dumps([writer, turn, made.version]) + "\\n").encode())

def read(_):
    while not stop.exists():
        for expert in registry.experts():
            registry.verify(expert)

def child(job, number):
    pid = os.fork()
    if pid == 0:
        try:
            job(number)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return pid

reading = [child(read, n) for n in range(readers)]
writing = [child(write, n) for n in range(writers)]
for writer, pid in enumerate(writing[:killed]):
    while f"[{writer}, 0, " not in (root / "told").read_text():
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in writing]
stop.touch()
print(json.dumps([codes, [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in reading]]))
"""


def test_no_version_is_lost_or_given_twice_and_no_reader_sees_a_part(tmp_path):
    numbers = map(str, (WRITERS, TURNS, READERS, KILLED))
    program = [sys.executable, "-c", PROGRAM, str(tmp_path), *numbers]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        program, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=500
    )
    assert done.stderr == "" and done.returncode == 0
    writers, readers = json.loads(done.stdout)
    assert writers == [-signal.SIGKILL] * KILLED + [0] * (WRITERS - KILLED) and set(readers) == {0}

    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    content = {version: f"{writer}.{turn}" for writer, turn, version in told}
    assert len(content) == len(told), "a number was given twice"
    registry = Registry(tmp_path / "registry")
    experts = registry.experts()
    found = {e.version: (e.folder / "adapter_model.safetensors").read_text() for e in experts}
    for expert in experts:
        registry.verify(expert)
    assert all(found[version] == text * 500 for version, text in content.items()), "a version was lost"
    assert len(found) - len(content) <= KILLED, "only a killed writer's last one may be untold"
    assert len(set(found.values())) == len(found)
    assert {turn for writer, turn, _ in told if writer == WRITERS - 1} == set(range(TURNS))
