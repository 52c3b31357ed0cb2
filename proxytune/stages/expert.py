"""Tune a model on a task and register the result as an expert with its lineage."""

from __future__ import annotations

from typing import Any

from proxytune.errors import DataError
from proxytune.experts import sft
from proxytune.experts.manifest import CodeVersion, DataLineage, Manifest
from proxytune.experts.registry import Expert, Registry, check_name
from proxytune.files import hash_json, locked, remove_folder, write_json
from proxytune.models.identity import identify
from proxytune.settings import Expert as Settings
from proxytune.stages.start import start, warn
from proxytune.tasks import catalog, sources
from proxytune.tracking import record


def run(settings: Settings) -> Expert:
    """Tune the family's small model (or its base, `model=base`) and return the registered expert.

    The same settings again, after a kill, go on from the last complete checkpoint.
    """
    name = check_name(
        settings.name or (settings.task.name if settings.model == "small" else f"{settings.task.name}-tuned")
    )
    task = catalog.get(settings.task.name)
    data = sources.load(settings.data, task, settings.family, settings.outputs / "cache")
    warn(data)
    chat = _is_chat(data)
    ref = settings.family.small if settings.model == "small" else settings.family.base_ref
    tokenizer = sft.tokenizer_for(ref, settings.family.chat_template, chat)
    anti = identify(ref, tokenizer)
    fields = {**settings.family.training, **{key: value for key, value in settings.method.items() if value is not None}}
    same = [
        fields,
        settings.peft.model_dump(),
        anti.model_dump(),
        tokenizer.chat_template,
        data.fingerprint,
        settings.seed,
    ]
    work = settings.outputs / "training" / f"{task.name}-{settings.model}-{hash_json(same)[:16]}"
    with start(settings, "expert") as tracked, locked(work.with_suffix(".lock")):
        finished, training = sft.train(
            data.rows,
            ref,
            tokenizer,
            fields,
            settings.peft,
            work,
            seed=settings.seed,
            resume=settings.resume,
            log=tracked.log,
        )
        draft = Manifest(
            name=name,
            task=task.name,
            family=settings.family.name,
            role="expert" if settings.model == "small" else "tuned",
            kind="full" if settings.peft.name == "none" else "lora",
            anti=anti,
            data=DataLineage(
                source=data.source,
                fingerprint=data.fingerprints["train"],
                **{split: len(rows) for split, rows in data.rows.items()},
            ),
            prompt_format="chat" if chat else "plain",
            config=settings.model_dump(mode="json", exclude={"command"}),
            code=CodeVersion.model_validate(record.code_version()),
            command=settings.command,
            training=training,
        )
        expert = Registry(settings.outputs / "registry").publish(finished, draft)
        remove_folder(work)
        tracked.summary({f"training/{key}": value for key, value in training.items() if value is not None})
        rows = f"{task.name}-rows@{data.fingerprint[:12]}"
        write_json(tracked.folder / "data.json", {"source": data.source, "fingerprints": data.fingerprints})
        tracked.artifact(rows, "dataset", tracked.folder / "data.json", expert.manifest.data.model_dump())
        tracked.artifact(expert.reference, "model", expert.folder, _lineage(expert), uses=[rows])
    print(f"registered {expert.reference}: {training['steps']} steps, {training['seconds']:g} s, in {expert.folder}")
    return expert


def _is_chat(data: sources.Dataset) -> bool:
    """Whether the rows are messages; all that the trainer reads must be of one kind."""
    kinds = {isinstance(row["prompt"], str) for row in [*data.held("train"), *data.rows["validation"]]}
    if len(kinds) > 1:
        raise DataError("some rows are texts and some are messages", "give all to train on in one form")
    return False in kinds


def _lineage(expert: Expert) -> dict[str, Any]:
    return expert.manifest.model_dump(mode="json", include={"anti", "data", "training", "task", "family", "kind"})
