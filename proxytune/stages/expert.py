"""Tune a model on a task and register the result as an expert with its lineage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxytune.errors import DataError
from proxytune.experts import dpo, fields, launch, sft
from proxytune.experts.manifest import CodeVersion, DataLineage, Manifest
from proxytune.experts.registry import Expert, Registry, check_name
from proxytune.experts.tuning import Job, finished_in
from proxytune.files import hash_json, locked, read_json, remove_folder, write_json
from proxytune.models.prompts import Format
from proxytune.models.quiet import quiet
from proxytune.settings import Expert as Settings
from proxytune.stages import chain
from proxytune.stages.chain import Beginning
from proxytune.stages.shared.start import dataset, start, warn
from proxytune.tasks import catalog, sources
from proxytune.tracking import record

METHODS = {"sft": sft.train, "dpo": dpo.train}


@dataclass(frozen=True)
class Prepared:
    """All that a training begins with. work: its folder, named by what decides its outcome."""

    settings: Settings
    parent: Expert | None
    data: sources.Dataset
    chat: bool
    beginning: Beginning
    work: Path


def run(settings: Settings, expect: Callable[[sources.Dataset, Beginning], None] | None = None) -> Expert:
    """Tune the family's small model (or its base, `model=base`; or an expert, `from`) and return the registered expert.

    The same settings again, after a kill, go on from the last complete checkpoint. expect: sees what training begins
    with, and may refuse it. A self-rewarding loop returns its last one.
    """
    if settings.method.name == "self_rewarding":
        from proxytune.stages.self_rewarding import method

        return method.run(settings)
    name = check_name(
        settings.name or (settings.task.name if settings.model == "small" else f"{settings.task.name}-tuned")
    )
    with quiet():
        fields.given(settings.method, settings.family.training)  # before there is a record of the run
    settings = settings.model_copy(update={"launch": launch.resolved(settings.launch)})
    prepared = prepare(settings)
    data, parent, work = prepared.data, prepared.parent, prepared.work
    if expect is not None:
        expect(data, prepared.beginning)
    with locked(work.with_suffix(".lock")):
        with start(settings, "expert") as tracked:
            expert = _made(name, prepared, tracked.log, _samples(prepared, tracked))
            training = expert.manifest.training
            tracked.summary({f"training/{key}": value for key, value in training.items() if value is not None})
            pairs = settings.method.name == "dpo"
            rows = f"{settings.task.name}-{'preferences' if pairs else 'rows'}@{data.fingerprint[:12]}"
            write_json(tracked.folder / "data.json", {"source": data.source, "fingerprints": data.fingerprints})
            tracked.artifact(rows, "dataset", tracked.folder / "data.json", expert.manifest.data.model_dump())
            uses = [rows, *([parent.reference] if parent else [])]
            tracked.artifact(expert.reference, "model", expert.folder, _lineage(expert), uses=uses)
        remove_folder(work)
        _note(work).unlink(missing_ok=True)
    print(f"registered {expert.reference}: {training['steps']} steps, {training['seconds']:g} s, in {expert.folder}")
    return expert


def _samples(prepared: Prepared, tracked: record.Run) -> list[Any]:
    settings, data, beginning = prepared.settings, prepared.data, prepared.beginning
    if settings.sample_steps is None:
        return []
    from proxytune.experts.samples import Samples

    asked = [row["prompt"] for row in data.rows["validation"] or data.rows["train"]]
    models = {"base": settings.family.base_ref, "anti": beginning.start.ref}
    format: Format = "chat" if prepared.chat else "plain"
    task = catalog.get(settings.task.name)
    return [Samples(settings.sample_steps, asked, task, models, beginning.tokenizer, format, tracked)]


def _made(
    name: str, prepared: Prepared, log: Callable[[dict[str, float], int], None], callbacks: Sequence[Any]
) -> Expert:
    """Tune and publish; or the version that a killed run had published and not yet told of."""
    registry = Registry(prepared.settings.outputs / "registry")
    note = _note(prepared.work)
    if prepared.settings.resume and note.is_file():
        noted = read_json(note)["published"]
        for version in reversed(registry.versions(name)):
            expert = registry.resolve(f"{name}@v{version}")
            if expert.manifest.model_dump(mode="json", include=set(noted)) == noted:
                return registry.settle(expert)
    single = prepared.settings.launch.name == "single"
    finished, training = tune(prepared, log, callbacks) if single else _spread(prepared, log)
    draft = _manifest(name, prepared, training)
    published = draft.model_dump(mode="json", include={"name", "created", "training"})
    parent = prepared.parent.reference if prepared.parent else None
    write_json(note, {"asked": _asked(prepared.settings), "from": parent, "published": published}, checked=True)
    return registry.publish(finished, draft)


def _note(work: Path) -> Path:
    """What is about to be published; there until the run is over."""
    return work.with_suffix(".published")


def _asked(settings: Settings) -> str:
    """A hash of what was asked for, but for how it is recorded, and for `peft`, which a parent may decide."""
    return hash_json(settings.model_dump(mode="json", exclude={"command", "tracker", "threads", "outputs", "peft"}))


def _parent(settings: Settings) -> Expert | None:
    """Where a killed run of these settings had just published, `from=qa` means what it meant to that run."""
    notes = (settings.outputs / "training").glob("*.published") if settings.from_ and settings.resume else ()
    for noted in map(read_json, notes):
        if noted["asked"] == _asked(settings):
            settings = settings.model_copy(update={"from_": noted["from"]})
    return chain.parent_of(settings)


def _spread(prepared: Prepared, log: Callable[[dict[str, float], int], None]) -> tuple[Path, dict[str, Any]]:
    """`tune`, in the ranks of several processes."""
    settings, parent = prepared.settings, prepared.parent
    settings = settings.model_copy(update={"from_": parent.reference if parent else None})
    folder = prepared.work.with_suffix(".launch")
    launch.spread(settings.launch, folder, "proxytune.stages.rank", settings.model_dump(mode="json"), log)
    done = finished_in(prepared.work)
    assert done is not None, "ranks that ended well have finished the training"
    return done


def prepare(settings: Settings) -> Prepared:
    parent = _parent(settings)
    pairs = settings.method.name == "dpo"
    data = dataset(settings, pairs=pairs)
    warn(data)
    chat = _is_chat(data)
    beginning = chain.begin(settings, parent, chat)
    settings = settings.model_copy(update={"peft": beginning.peft})
    same = [settings.method.model_dump(), settings.family.training, beginning.content, data.fingerprint, settings.seed]
    if settings.launch.name != "single":  # another order of rows, other checkpoints
        same.append(settings.launch.model_dump())
    work = settings.outputs / "training" / f"{settings.task.name}-{settings.model}-{hash_json(same)[:16]}"
    return Prepared(settings, parent, data, chat, beginning, work)


def tune(
    prepared: Prepared, log: Callable[[dict[str, float], int], None], callbacks: Sequence[Any] = ()
) -> tuple[Path, dict[str, Any]]:
    """Train in this process: (folder of the finished model, training figures)."""
    settings, beginning = prepared.settings, prepared.beginning
    job = Job(
        start=beginning.start,
        tokenizer=beginning.tokenizer,
        method=settings.method,
        peft=settings.peft,
        work=prepared.work,
        seed=settings.seed,
        resume=settings.resume,
        log=log,
        defaults=settings.family.training,
        callbacks=callbacks,
    )
    return METHODS[settings.method.name](prepared.data.rows, job)


def _manifest(name: str, prepared: Prepared, training: dict[str, Any]) -> Manifest:
    settings, data, beginning = prepared.settings, prepared.data, prepared.beginning
    return Manifest(
        name=name,
        task=settings.task.name,
        family=settings.family.name,
        role="expert" if settings.model == "small" else "tuned",
        kind=beginning.start.kind(settings.peft),
        anti=beginning.anti,
        data=DataLineage(
            source=data.source,
            fingerprint=data.fingerprints["train"],
            **{split: len(rows) for split, rows in data.rows.items()},
        ),
        prompt_format="chat" if prepared.chat else "plain",
        config=settings.model_dump(mode="json", exclude={"command"}),
        code=CodeVersion.model_validate(record.code_version()),
        command=settings.command,
        training=training,
        lineage=beginning.lineage,
    )


def _is_chat(data: sources.Dataset) -> bool:
    """Whether the rows are messages; all that the trainer reads must be of one kind."""
    rows = {split: rows for split, rows in (("train", data.held("train")), ("validation", data.rows["validation"]))}
    first = rows["train"][0]
    for split, some in rows.items():
        for number, row in enumerate(some, 1):
            if isinstance(row["prompt"], str) != isinstance(first["prompt"], str):
                raise DataError(
                    f"some rows are texts and some are messages: {split} row {number} (id {row['id']!r}) is not as the "
                    "first train row",
                    "give all to train on in one form",
                )
    return not isinstance(first["prompt"], str)


def _lineage(expert: Expert) -> dict[str, Any]:
    kept = {"anti", "data", "training", "task", "family", "kind", "lineage"}
    return expert.manifest.model_dump(mode="json", include=kept)
