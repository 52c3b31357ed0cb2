"""A run of the past, by its folder: what it was asked, what it found, and what its systems wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxytune.errors import DataError, did_you_mean
from proxytune.evaluation.benchmarks.benchmark import Prompt
from proxytune.evaluation.compare import SUMMARY
from proxytune.evaluation.summary import rows_file
from proxytune.files import read_json, read_jsonl
from proxytune.models.prompts import Turns, text_of
from proxytune.settings import Evaluate, S, Steering, load
from proxytune.stages.shared.start import dataset

CONFIG, RECORD, REPLIES = "config.json", "run.json", "replies.jsonl"


@dataclass(frozen=True)
class Past:
    """folder: where its results lie. told: its record, {} of a sweep, whose folder outlives its runs. summary: None of
    a decode, which measures nothing."""

    folder: Path
    stage: str
    config: Mapping[str, Any]
    told: Mapping[str, Any]
    summary: Mapping[str, Any] | None

    @property
    def outputs(self) -> Path:
        return self.folder.parent.parent

    @property
    def expert(self) -> str:
        """The very version it was run with: `latest` may mean another one now."""
        if self.summary is not None:
            return self.summary["expert"]
        return next((row["models"]["expert"] for row in self.replies() if "expert" in row["models"]), "")

    def settings(self, kind: type[S], **changes: Any) -> S:
        """What it was run with, as the settings of a stage."""
        given = {key: value for key, value in self.config.items() if key in kind.model_fields}
        own = {"outputs": self.outputs} | ({"expert": self.expert} if issubclass(kind, Steering) else {})
        return load(kind, given | own | changes)

    def replies(self) -> list[dict[str, Any]]:
        """What a decode wrote: records of all systems. Raises DataError where they are not there."""
        path = Path(self.config.get("out") or self.folder / REPLIES)
        if not path.is_file():
            what = f"the replies of {self.folder} are missing: there is no {path}"
            raise DataError(what, "run the decode again, or put the file back where it was")
        return read_jsonl(path)

    def texts(self, system: str, alpha: float | None) -> dict[str, str]:
        """What an evaluation's system wrote, by the rows' ids; {} where nothing was. Of several samples the first."""
        return {row["id"]: row["text"] for row in self.rows(system, alpha)}

    def rows(self, system: str, alpha: float | None) -> list[dict[str, Any]]:
        """The same with all that is known of them, such as `token_ids`."""
        path = rows_file(self.folder, system, alpha)
        rows = read_jsonl(path) if path.is_file() else []
        return [row if "text" in row else row | {"text": row["outputs"][0]} for row in rows if _written(row)]


def read(path: Path) -> Past:
    """The run in a folder of outputs/runs or outputs/sweeps, or of a file in it. Raises DataError."""
    if not path.exists():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f"there is no {path}", did_you_mean(path.name, beside, "name a folder of evaluate, sweep, decode")
        )
    folder = (path if path.is_dir() else path.parent).resolve()
    told = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    if told.get("stage") == "sweep" and not (folder / SUMMARY).is_file():
        folder, told = _sweep_of(folder), {}
    stage = told.get("stage", "sweep")
    if not (folder / SUMMARY).is_file() and not (folder / REPLIES).is_file() and stage != "decode":
        raise DataError(f"{path} is no run that wrote or measured anything", "name a folder of evaluate, sweep, decode")
    if not (folder / CONFIG).is_file():
        hint = "run the stage again with tracker=local: what it measured is not measured anew"
        raise DataError(f"there is no {CONFIG} in {folder}", hint)
    summary = read_json(folder / SUMMARY) if (folder / SUMMARY).is_file() else None
    return Past(folder, stage, read_json(folder / CONFIG), told, summary)


def _sweep_of(run: Path) -> Path:
    """The folder that a run of `sweep` wrote its curve to."""
    notes = read_jsonl(run / "artifacts.jsonl", grown=True) if (run / "artifacts.jsonl").is_file() else []
    names = [Path(note["path"]).parent.name for note in notes if note.get("kind") == "result"]
    if not names:
        raise DataError(f"{run} did not come to its end", "run the sweep again: what it measured is kept")
    return run.parent.parent / "sweeps" / names[-1]


def questions(settings: Evaluate) -> dict[str, tuple[Turns | Prompt, str]]:
    """By the rows' ids what an evaluation asked, and the reference reply. Raises DataError or SettingsError."""
    if settings.benchmark is not None:
        from proxytune.stages import benchmark

        rows = getattr(benchmark.asked(settings), "rows", ())
        return {row.id: (row.prompt, str(row.reference)) for row in rows}
    held = dataset(settings).held(settings.split)
    return {row["id"]: (row["prompt"], text_of(row["completion"])) for row in held}


def shown(prompt: Turns | Prompt) -> str:
    """A prompt as people read it."""
    return prompt.plain if isinstance(prompt, Prompt) else text_of(prompt)


def _written(row: Mapping[str, Any]) -> bool:
    return "text" in row or bool(row.get("outputs"))
