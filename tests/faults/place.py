"""A folder to break things in, put back as it was before each time, and what it should hold in the end."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxytune.files import read_jsonl, write_jsonl
from tests.faults.warm import Ended, Warm
from tests.models.tiny_family import save_family, write_rows

ROWS = {"train": (0, 24), "validation": (100, 3), "test": (200, 3)}
PROMPTS = 3


@dataclass(frozen=True)
class Command:
    """words: its command line; {given} is the folder of what stays, {run} the state's run of decode.
    state: what it begins with. again: exit codes of another run once all is done.
    """

    words: str
    state: str = "trained"
    again: tuple[int, ...] = (0,)


ON = "--config-dir {given}/conf task=qa family=random tracker=local"
DATA, PAIRS = ("data=files " + " ".join(f"data.{s}={{given}}/{kind}{s}.jsonl" for s in ROWS) for kind in ("", "pairs-"))
STEPS = "method.max_steps=4 method.save_steps=2 method.logging_steps=2"
REPLIES = "decode.max_new_tokens=4 decode.batch_size=2"

# One line makes a command's every write a moment to kill it and to fill the disk at.
COMMANDS = {
    "expert": Command(f"expert {ON} {DATA} {STEPS}", "empty"),
    "dpo": Command(f"expert {ON} {PAIRS} {STEPS} method=dpo from=qa"),
    "decode": Command(f"decode {ON} {REPLIES} prompts={{given}}/prompts.txt out=outputs/replies.jsonl"),
    "evaluate": Command(f"evaluate {ON} {DATA} {REPLIES} score_batch_size=2"),
    "sweep": Command(f"sweep {ON} {DATA} {REPLIES} score_batch_size=2 alphas=[0,1]"),
    "analyze": Command(f"analyze {ON} run={{run}} score_batch_size=2 bootstrap_samples=50", "decoded"),
    "report": Command("report {run}", "analyzed"),
    "tag": Command("registry tag qa good"),
    "remove": Command("registry remove qa@v1", again=(0, 6)),
    "export": Command("registry export qa outputs/qa.tar", again=(0, 6)),
    "import": Command("registry import {given}/qa.tar", "empty"),
}

# A state by the command that makes it, in the state that this begins with.
STATES = {"trained": "expert", "decoded": "decode", "analyzed": "analyze"}

# What differs from run to run, by name of the key, and the checksums over it. Everything else must not.
CLOCKS = {
    "created",
    "started",
    "ended",
    "taken",
    "seconds",
    "training/seconds",
    "resumed_from",
    "training/resumed_from",
    "commit",  # "dirty" once somebody edits a file
    "check",
}
FOLDER = re.compile(r"runs/([a-z]+)-[0-9]{8}-[0-9]{6}-[0-9a-f]{4}")


# Units done twice: those in hand. Of training the steps since its checkpoint; replies and tokens come in twos.
ALLOWED = {"s": 2, "r": 2, "l": 1, "t": 1, "d": 1}
OVERHEAD = 5.0  # seconds


@dataclass(frozen=True)
class Whole:
    """A run that was left alone: what it leaves, how it ended, the units that it took."""

    tree: dict[str, Any]
    ended: Ended
    units: Counter[str]


@dataclass(frozen=True)
class Resumed:
    """What a kill cost: in words what broke, units done twice, and seconds of both runs beyond those of one."""

    faults: list[str] = field(default_factory=list)
    redone: int = 0
    overhead: float = 0.0


@dataclass
class Place:
    """`folder` is where commands run; `kept` the states to go back to; `given` what stays: models, rows, settings."""

    warm: Warm
    given: Path
    folder: Path
    kept: Path
    known: dict[str, Whole] = field(default_factory=dict)

    def words(self, name: str) -> list[str]:
        """A command line for the folder as it is."""
        run = next((path.relative_to(self.folder) for path in self.folder.glob("outputs/runs/decode-*")), "")
        return shlex.split(COMMANDS[name].words.format(given=self.given, run=run))

    def begin(self, name: str) -> list[str]:
        """A command line, with its state put in place for it."""
        self.reset(COMMANDS[name].state)
        return self.words(name)

    def reset(self, state: str) -> None:
        if not (kept := self.kept / state).exists():
            ended, _ = self.run(self.begin(STATES[state]))
            assert ended.code == 0, ended.err
            self.keep(state)
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(kept, self.folder)

    def keep(self, state: str) -> None:
        shutil.copytree(self.folder, self.kept / state)

    def run(self, arguments: list[str], **how: Any) -> tuple[Ended, Counter[str]]:
        """How it ended, and the units of work that it finished."""
        units = self.folder.with_name("units")
        units.unlink(missing_ok=True)
        program = f"from tests.faults.units import count; count({str(units)!r});" + how.pop("program", "")
        ended = self.warm.run(arguments, root=self.folder, program=program, **how)
        return ended, Counter(units.read_text() if units.exists() else "")

    def killed_and_run_again(self, name: str, whole: Whole, **how: Any) -> Resumed | None:
        """None where it was done before the kill came."""
        arguments = self.begin(name)
        killed, before = self.run(arguments, **how)
        if killed.code == 0:
            return None
        assert killed.code == -9, killed.err
        if "after" in how and not self.differences(whole):  # all was written, and what follows is a command of its own
            return None
        again, after = self.run(arguments)
        if again.code not in COMMANDS[name].again:
            return Resumed([f"the second run ended with {again.code}: {again.err[-800:]}"])
        faults, redone = self.differences(whole), 0
        for unit, count in (before + after).items():
            redone = max(redone, count - whole.units[unit])
            if redone > ALLOWED[unit]:
                faults.append(f"{count} of {unit}, not {whole.units[unit]}: {before[unit]} before the kill")
        overhead = killed.seconds + again.seconds - whole.ended.seconds
        if overhead > OVERHEAD:
            faults.append(
                f"{killed.seconds:.1f} + {again.seconds:.1f} s, and {whole.ended.seconds:.1f} s without a kill"
            )
        return Resumed(faults, redone, overhead)

    def differences(self, whole: Whole) -> list[str]:
        tree = self.tree()
        differing = [f"{name} differs" for name in whole.tree.keys() & tree.keys() if whole.tree[name] != tree[name]]
        gone = [f"{name} is {'lost' if name in whole.tree else 'new'}" for name in whole.tree.keys() ^ tree.keys()]
        return differing + gone

    def whole(self, name: str) -> Whole:
        """A command left alone, once for each; the second time, since the first has more to import."""
        if name not in self.known:
            for _ in range(2):
                ended, units = self.run(self.begin(name))
                assert ended.code == 0, ended.err
            self.known[name] = Whole(self.tree(), ended, units)
        return self.known[name]

    def tree(self) -> dict[str, Any]:
        """Every file that is there to stay, with its content; of runs those that finished. Clocks are left out."""
        found = {}
        outputs = self.folder / "outputs"
        finished = {}
        for path in sorted(outputs.glob("runs/*/run.json")):
            told = json.loads(path.read_text())
            if told["status"] == "finished":
                finished[path.parent] = told["stage"]
        for path in sorted(outputs.rglob("*")):
            name = path.relative_to(outputs).as_posix()
            parts = name.split("/")
            if path.is_dir() or parts[0] in ("cache", "training") or any(part.startswith(".") for part in parts):
                continue
            if path.name == "metrics.jsonl":  # of a run that goes on: the steps since
                continue
            if parts[0] == "runs":
                if (run := outputs.joinpath(*parts[:2])) not in finished:
                    continue
                name = "/".join(["runs", finished[run], *parts[2:]])
            found[name] = _content(path)
        return found


def _content(path: Path) -> Any:
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        lines = data.decode().split("\n") if path.suffix == ".jsonl" else [data.decode()]
        return [_timeless(json.loads(line)) for line in lines if line]
    return data


def _timeless(value: Any) -> Any:
    """A record's value without clocks, and with the run's folder by its stage alone."""
    if isinstance(value, dict):
        return {key: _timeless(each) for key, each in value.items() if key not in CLOCKS}
    if isinstance(value, list):
        return [_timeless(each) for each in value]
    return FOLDER.sub(r"runs/\1", value) if isinstance(value, str) else value


def make(warm: Warm, folder: Path) -> Place:
    given = folder / "given"
    family = save_family(given / "family")
    (given / "conf" / "family").mkdir(parents=True)
    (given / "conf" / "family" / "random.yaml").write_text(json.dumps(family.model_dump()))
    for split, numbers in ROWS.items():
        rows = read_jsonl(Path(write_rows(given / f"{split}.jsonl", *numbers)))
        pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " None.\n"} for row in rows]
        write_jsonl(given / f"pairs-{split}.jsonl", pairs)
    (given / "prompts.txt").write_text("".join(f"Question: what follows {i}?\n" for i in range(PROMPTS)))
    place = Place(warm, given, folder / "work", folder / "kept")
    (place.kept / "empty").mkdir(parents=True)
    ended, _ = place.run(place.begin("export"))
    assert ended.code == 0, ended.err
    shutil.copy(place.folder / "outputs" / "qa.tar", given)
    return place
