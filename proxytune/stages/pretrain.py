"""Make the embedded family anew: its text, its tokenizer, and both siblings."""

from __future__ import annotations

import dataclasses
import itertools
import platform
import time
from pathlib import Path

from proxytune.errors import DataError
from proxytune.experts import corpus, pretrain
from proxytune.experts.checkpoints import is_complete, mark
from proxytune.files import hash_file, hash_json, read_json, remove_folder, write_atomic, write_json
from proxytune.settings import Pretrain

VOCABULARY = 2048


def run(settings: Pretrain, schedule: pretrain.Schedule | None = None) -> dict[str, dict]:
    """Train small and base and write each into settings.out; returns their figures, also kept there as training.json.

    The text is gathered once under outputs/pretrain, in a folder named by what is read and how, so that a killed run
    goes on with the very same documents, and another begins with its own.
    """
    for path in settings.extra:
        if not path.is_file():
            raise DataError(f"extra text {path} does not exist", "extra=[FILE,...] takes text or JSONL files")
    schedule = schedule or pretrain.Schedule()
    read = [(path.suffix, hash_file(path)) for path in settings.extra]
    content = [platform.python_version(), read, VOCABULARY, dataclasses.asdict(schedule)]
    work = settings.outputs / "pretrain" / hash_json(content)[:16]
    if not settings.resume:
        remove_folder(work)
    documents = _documents(work / "documents.jsonl.gz", settings.extra)
    first = schedule.phases[0]
    prose = corpus.prose(0, first.towns, 6, first.sums, 4000)
    tokenizer = corpus.train_tokenizer(itertools.chain(documents, prose), VOCABULARY)
    figures = {}
    for name in ("small", "base"):
        finished, marker = work / name, work / f"{name}.json"
        if not is_complete(finished, marker):
            started = time.monotonic()
            made = pretrain.train(name, documents, tokenizer, schedule, work, report=_say) | {
                "seconds": round(time.monotonic() - started),
                "python": platform.python_version(),
                "documents": len(documents),
                "documents_sha256": hash_file(work / "documents.jsonl.gz"),
            }
            write_json(finished / "training.json", made)
            mark(finished, marker)
        _install(finished, settings.out / name)  # each time: a kill may have come amidst it
        figures[name] = read_json(finished / "training.json")
    return figures


def _documents(path: Path, extra: list[Path]) -> list[str]:
    if not path.is_file():
        further = [text for file in extra for text in corpus.extra(file)]
        corpus.write_documents(path, itertools.chain(corpus.standard_library(), further))
    return corpus.read_documents(path)


def _install(source: Path, target: Path) -> None:
    """Replace what stood there only once everything is written."""
    for file in sorted(source.iterdir()):
        write_atomic(target / file.name, file.read_bytes())


def _say(figures: dict) -> None:
    print(f"{figures['name']}: {figures['parameters']:,} parameters, held-out loss {figures['held_out_loss']:.3f}")
