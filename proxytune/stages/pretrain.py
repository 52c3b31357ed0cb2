"""Make the embedded family anew: its text, its tokenizer, and both siblings."""

from __future__ import annotations

import itertools
import json
import platform
import time
from pathlib import Path

from proxytune.errors import DataError
from proxytune.experts import corpus, pretrain
from proxytune.files import hash_file, remove_folder, write_json
from proxytune.settings import Pretrain

VOCABULARY = 2048


def run(settings: Pretrain, schedule: pretrain.Schedule | None = None) -> dict[str, dict]:
    """Train small and base and write each into settings.out; returns their figures, also kept there as training.json.

    The text is gathered once under outputs/pretrain, so that a killed run goes on with the very same documents.
    """
    for path in settings.extra:
        if not path.is_file():
            raise DataError(f"extra text {path} does not exist", "extra=[FILE,...] takes text or JSONL files")
    work = settings.outputs / "pretrain"
    if not settings.resume:
        remove_folder(work)
    work.mkdir(parents=True, exist_ok=True)
    documents = _documents(work / "documents.jsonl.gz", settings.extra)
    schedule = schedule or pretrain.Schedule()
    first = schedule.phases[0]
    made = corpus.prose(0, first.towns, 6, first.sums, 4000)
    tokenizer = corpus.train_tokenizer(itertools.chain(documents, made), VOCABULARY)
    figures = {}
    for name in ("small", "base"):
        done = settings.out / name / "training.json"
        if settings.resume and (work / name).is_dir() and done.is_file():
            figures[name] = json.loads(done.read_text("utf-8"))
            continue
        started = time.monotonic()
        figures[name] = pretrain.train(name, documents, tokenizer, schedule, work, report=_say)
        figures[name] |= {
            "seconds": round(time.monotonic() - started),
            "python": platform.python_version(),
            "documents": len(documents),
            "documents_sha256": hash_file(work / "documents.jsonl.gz"),
        }
        write_json(work / name / "training.json", figures[name])
        _install(work / name, settings.out / name)
    return figures


def _documents(path: Path, extra: list[Path]) -> list[str]:
    if not path.is_file():
        texts = itertools.chain(corpus.standard_library(), *(corpus.extra(file) for file in extra))
        corpus.write_documents(path, texts)
    return corpus.read_documents(path)


def _install(source: Path, target: Path) -> None:
    """Replace what stood there only once everything is written."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        (target / file.name).write_bytes(file.read_bytes())


def _say(figures: dict) -> None:
    print(f"{figures['name']}: {figures['parameters']:,} parameters, held-out loss {figures['held_out_loss']:.3f}")
