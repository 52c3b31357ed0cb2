"""Tune a model on a task and register the result as an expert with its lineage."""

from __future__ import annotations

import sys
from typing import Any

from proxytune.experts import sft
from proxytune.experts.manifest import CodeVersion, DataLineage, Manifest
from proxytune.experts.registry import Expert, Registry, check_name
from proxytune.files import hash_json, remove_folder
from proxytune.models.identity import identify
from proxytune.settings import Expert as Settings
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
    for split, dropped in data.dropped.items():
        print(f"proxytune: {dropped} {split} rows left out: their prompts are also in a later split", file=sys.stderr)
    chat = not isinstance(data.rows["train"][0]["prompt"], str)
    ref = settings.family.small if settings.model == "small" else settings.family.base_ref
    tokenizer = sft.tokenizer_for(ref, settings.family.chat_template, chat)
    anti = identify(ref, tokenizer)
    fields = {**settings.family.training, **{key: value for key, value in settings.method.items() if value is not None}}
    job = hash_json([fields, settings.peft.model_dump(), anti.model_dump(), data.fingerprint, settings.seed])[:16]
    work = settings.outputs / "training" / f"{task.name}-{settings.model}-{job}"
    config = settings.model_dump(mode="json", exclude={"command"})
    with record.start(
        settings.tracker,
        settings.outputs,
        stage="expert",
        task=task.name,
        family=settings.family.name,
        config=config,
        command=settings.command,
    ) as tracked:
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
            config=config,
            code=CodeVersion.model_validate(record.code_version()),
            command=settings.command,
            training=training,
        )
        expert = Registry(settings.outputs / "registry").publish(finished, draft)
        remove_folder(work)
        tracked.summary({f"training/{key}": value for key, value in training.items() if value is not None})
        dataset = f"{task.name}-{data.source}-rows"
        tracked.artifact(name, "model", expert.folder, _lineage(expert), uses=[dataset])
    print(f"registered {expert.reference}: {training['steps']} steps, {training['seconds']:g} s, in {expert.folder}")
    return expert


def _lineage(expert: Expert) -> dict[str, Any]:
    return expert.manifest.model_dump(mode="json", include={"anti", "data", "training", "task", "family", "kind"})
