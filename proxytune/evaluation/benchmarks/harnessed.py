"""Tasks of the lm-evaluation-harness, asked of every system through the same engine.

The harness builds the prompts and scores the outputs; what it says of each row is kept, so that systems are compared on
the same rows, with intervals, like everywhere else. Its own numbers are told beside ours, under `harness`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from proxytune import settings
from proxytune.errors import DataError, ProxytuneError, SettingsError, did_you_mean
from proxytune.evaluation.benchmarks.scored import Scored
from proxytune.evaluation.points import Filed
from proxytune.evaluation.system import System
from proxytune.files import hash_json, read_checked, write_checked
from proxytune.tracking.plain import plain

VERSION = 1  # raise when the same settings give other numbers
# What one row's number of an aggregated measure is as a share (value, weight), by the name of the aggregation.
SHARES = {
    "mean": lambda name, value: (name, float(value), 1.0),
    "perplexity": lambda name, value: (f"log_{name}", -float(value), 1.0),
    "weighted_perplexity": lambda name, value: (f"log_{name}", -float(value[0]), float(value[1])),
    "bits_per_byte": lambda name, value: (name, -float(value[0]) / math.log(2), float(value[1])),
}


@dataclass(frozen=True)
class Harnessed(Filed):
    """One task, tag or group of the harness. loaded: what `TaskManager.load` gave.

    A record of a point holds id, task, row (a hash of the question) and `measures`: by name a row's value and weight;
    the first record is the harness's own `results`.
    """

    name: str
    loaded: Mapping[str, Any]
    chosen: settings.Harness
    decode: settings.Decode
    batch_size: int
    dtype: str

    @property
    def at_once(self) -> int:
        return self.batch_size

    def at_most(self, rows: int) -> Harnessed:
        return replace(self, batch_size=min(rows, self.batch_size))

    @cached_property
    def content(self) -> dict[str, Any]:
        from importlib.metadata import version

        asked = {
            name: [json.dumps(task.config.to_dict(), default=_named, sort_keys=True), self._docs(task)]
            for name, task in self.loaded["tasks"].items()
        }
        how = self.chosen.model_dump(mode="json", exclude={"include_path"})
        return {"version": VERSION, "lm_eval": version("lm_eval"), "asked": hash_json(asked), "dtype": self.dtype} | how

    def _docs(self, task: Any) -> str:
        docs = list(task.eval_docs)[: self.chosen.limit]
        if not docs:
            raise DataError(f"the harness's task {self.name} has no rows")
        return hash_json([json.dumps(doc, default=_named, sort_keys=True) for doc in docs])

    def compute(self, system: System, alphas: Sequence[Sequence[float]], parts: Sequence[Path]) -> list[list[dict]]:
        """The records of each alpha, kept in its part: one pass an alpha, as the harness asks a model that has one."""
        for its, part in zip(alphas, parts, strict=True):
            if not part.is_file():
                write_checked(part, self._run(system, tuple(its)))
        return [read_checked(part) for part in parts]

    def _run(self, system: System, alphas: tuple[float, ...]) -> list[dict[str, Any]]:
        from lm_eval import simple_evaluate

        from proxytune.evaluation.harness import Proxytune

        if system.served:
            raise SettingsError("the harness's tasks need the base here", "leave base= out; base_model= is a local one")
        size, length = self.batch_size, self.chosen.max_length
        model = Proxytune.of(system, alphas, size, length, self.decode.drafter)
        groups, tasks = self.loaded["groups"], self.loaded["tasks"]
        with told(self.name):
            found = simple_evaluate(
                model,
                tasks=[groups[self.name]] if self.name in groups else list(tasks.values()),
                task_manager=manager(self.chosen.include_path, False),
                num_fewshot=self.chosen.num_fewshot,
                limit=self.chosen.limit,
                apply_chat_template=self.chosen.chat,
                bootstrap_iters=0,
            )
        assert found is not None
        if model.shortened:
            what = f"{model.shortened} contexts of {self.name} were too long and cut on the left"
            print(f"proxytune: {system.name}: {what}, as the harness does it", file=sys.stderr)
        results = {**found["results"], **found.get("groups", {})}
        own = {"results": plain(results), "shortened": model.shortened}
        return [own, *(row for name, samples in found["samples"].items() for row in self._rows(name, samples))]

    def _rows(self, name: str, samples: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """A record for each question: what all of the task's filters made of it."""
        aggregation = self.loaded["tasks"][name].aggregation()
        rows: dict[int, dict[str, Any]] = {}
        for sample in samples:
            id = f"{name}/{sample['doc_id']}"
            row = rows.setdefault(sample["doc_id"], {"id": id, "task": name, "row": _row(sample), "measures": {}})
            row["outputs"] = plain([*row.get("outputs", []), *sample["filtered_resps"]])
            for metric in sample["metrics"]:
                share = SHARES.get(_named(aggregation.get(metric)))
                if share:
                    told_as, value, weight = share(metric, sample[metric])
                    filtered = "" if sample["filter"] == "none" else f",{sample['filter']}"
                    row["measures"][told_as + filtered] = [value, weight]
        yield from rows.values()

    def score(self, records: Sequence[Mapping[str, Any]], path: Path) -> Scored:
        own, *rows = records
        measures = [{name: (pair[0], pair[1]) for name, pair in row["measures"].items()} for row in rows]
        if not any(measures):
            raise DataError(
                f"no measure of the harness's task {self.name} is a mean over its rows",
                "run it with python -m proxytune.evaluation.harness",
            )
        several = len(self.loaded["tasks"]) > 1
        groups = [{"task": row["task"]} if several else {} for row in rows]
        counts = {"harness": own["results"]} | ({"shortened": own["shortened"]} if own["shortened"] else {})
        ids, digests = [row["id"] for row in rows], [row["row"] for row in rows]
        return Scored(ids, measures, groups, counts, rows, digests)


def load(name: str, chosen: settings.Harness, decode: settings.Decode, batch_size: int, dtype: str) -> Harnessed:
    """A task by its name. SettingsError where the harness is not installed or knows no such task."""
    try:
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        import lm_eval  # noqa: F401
    except ImportError:
        raise SettingsError("the lm-evaluation-harness is not installed", "pip install 'proxytune[harness]'") from None
    if chosen.include_path and not chosen.include_path.expanduser().is_dir():
        raise SettingsError(f"lm_eval.include_path={chosen.include_path}: no such folder")
    own = manager(chosen.include_path, False)
    tasks = own if name in own.task_index else manager(chosen.include_path, True)
    if name not in tasks.task_index:
        raise SettingsError(f"the harness has no task {name!r}", did_you_mean(name, tasks.task_index))
    with told(name):
        return Harnessed(name, tasks.load([name]), chosen, decode, batch_size, dtype)


@lru_cache(maxsize=4)
def manager(include_path: Path | None, defaults: bool) -> Any:
    """The harness's index of tasks. Its own, some thousands, take it many seconds: only where they are needed."""
    from lm_eval.tasks import TaskManager

    path = str(include_path.expanduser()) if include_path else None
    return TaskManager(include_path=path, include_defaults=defaults)


@contextlib.contextmanager
def told(name: str) -> Generator[None]:
    """Whatever the harness or the libraries below it say of a task, in one line."""
    try:
        yield
    except ProxytuneError:
        raise
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise DataError(
            f"the harness cannot run {name}: {first[:300]}", "its rows may be on the hub only, or its YAML be wrong"
        ) from error


def _row(sample: Mapping[str, Any]) -> str:
    return hash_json([sample["doc_hash"], sample["prompt_hash"], sample["target_hash"]])[:16]


def _named(value: Any) -> str:
    """For what JSON cannot hold, such as the functions of a task: a name that is the same tomorrow."""
    return getattr(value, "__name__", type(value).__name__)
