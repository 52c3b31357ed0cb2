"""A folder to break things in, put back as it was before each time, and what it should hold in the end."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.warm import Ended, Warm
from tests.models.tiny_family import save_family, write_rows

ROWS = {"train": (0, 24), "validation": (100, 4), "test": (200, 5)}
PROMPTS = 5
TRAINING = ["method.max_steps=4", "method.save_steps=2", "method.logging_steps=2"]
REPLIES = ["decode.max_new_tokens=4", "decode.batch_size=2", "score_batch_size=2"]

# What differs from run to run, by name of the key, and the checksums over it. Everything else must not.
CLOCKS = {
    "created",
    "started",
    "ended",
    "seconds",
    "training/seconds",
    "resumed_from",
    "training/resumed_from",
    "check",
}
FOLDER = re.compile(r"runs/([a-z]+)-[0-9]{8}-[0-9]{6}-[0-9a-f]{4}")


# Units done twice: the one in hand. A step of training counts with the others since its checkpoint.
ALLOWED = {"s": 2, "r": 2, "l": 1}
OVERHEAD = 5.0  # seconds


@dataclass(frozen=True)
class Whole:
    """A run that was left alone: what it leaves, the units and seconds it took, every moment that it wrote."""

    tree: dict[str, Any]
    units: Counter[str]
    seconds: float
    seen: list[str]


@dataclass
class Place:
    """`folder` is where commands run; `kept` the states to go back to; `given` what stays: models, rows, settings."""

    warm: Warm
    given: Path
    folder: Path
    kept: Path
    known: dict[tuple[str, ...], Whole] = field(default_factory=dict)

    def stage(self, stage: str, *more: str) -> list[str]:
        rows = [f"data.{split}={self.given}/{split}.jsonl" for split in ROWS]
        own = {
            "expert": TRAINING,
            "decode": [*REPLIES[:2], f"prompts={self.given}/prompts.txt", "out=outputs/replies.jsonl"],
            "evaluate": REPLIES,
            "sweep": [*REPLIES, "alphas=[0,1]"],
        }
        where = ["--config-dir", str(self.given / "conf"), "task=qa", "family=random", "tracker=local"]
        return [stage, *where, "data=files", *rows, *own[stage], *more]

    def reset(self, state: str) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.kept / state, self.folder)

    def keep(self, state: str) -> None:
        shutil.copytree(self.folder, self.kept / state)

    def run(self, arguments: list[str], **how: Any) -> tuple[Ended, Counter[str]]:
        """How it ended, and the units of work that it finished."""
        units = self.given / "units"
        units.unlink(missing_ok=True)
        program = f"from tests.faults.units import count; count({str(units)!r});" + how.pop("program", "")
        ended = self.warm.run(arguments, root=self.folder, program=program, **how)
        return ended, Counter(units.read_text() if units.exists() else "")

    def killed_and_run_again(self, state: str, arguments: list[str], whole: Whole, **how: Any) -> list[str]:
        """What a kill costs, in words: nothing where all promises hold."""
        self.reset(state)
        killed, before = self.run(arguments, **how)
        if killed.code == 0:
            return []  # it was done before the kill came
        again, after = self.run(arguments)
        if again.code:
            return [f"the second run ended with {again.code}: {again.err[-800:]}"]
        tree = self.tree()
        faults = [f"{name} differs" for name in whole.tree.keys() & tree.keys() if whole.tree[name] != tree[name]]
        faults += [f"{name} is {'lost' if name in whole.tree else 'new'}" for name in whole.tree.keys() ^ tree.keys()]
        for unit, count in (before + after).items():
            if count > whole.units[unit] + ALLOWED[unit]:
                faults.append(f"{count} of {unit}, not {whole.units[unit]}: {before[unit]} before the kill")
        if again.seconds > whole.seconds + OVERHEAD:
            faults.append(f"{again.seconds:.1f} s, and {whole.seconds:.1f} s without a kill")
        return faults

    def whole(self, state: str, arguments: list[str]) -> Whole:
        """Run once for each state and command."""
        if (state, *arguments) not in self.known:
            self.reset(state)
            ended, units = self.run(arguments)
            assert ended.code == 0, ended.err
            self.known[(state, *arguments)] = Whole(self.tree(), units, ended.seconds, ended.seen)
        return self.known[(state, *arguments)]

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
        write_rows(given / f"{split}.jsonl", *numbers)
    (given / "prompts.txt").write_text("".join(f"Question: what follows {i}?\n" for i in range(PROMPTS)))
    place = Place(warm, given, folder / "work", folder / "kept")
    place.folder.mkdir()
    place.keep("empty")
    return place
