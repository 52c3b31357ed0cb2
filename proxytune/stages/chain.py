"""What a training begins with: the family's own model, or a registered expert and all that lies before it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from proxytune.errors import SettingsError
from proxytune.experts.manifest import Ancestor
from proxytune.experts.registry import Expert, Registry
from proxytune.experts.starting import Start, continued, tokenizer_for
from proxytune.models.identity import ModelId, identify
from proxytune.models.loading import load_tokenizer
from proxytune.models.trio import check_anti
from proxytune.settings import Expert as Settings
from proxytune.settings import ModelRef, Peft
from proxytune.stages.shared.trio import files_of, weights_of


@dataclass(frozen=True)
class Beginning:
    """anti: what steering with the finished expert subtracts. lineage: the experts before it, oldest first."""

    start: Start
    tokenizer: Any
    anti: ModelId
    peft: Peft
    lineage: list[Ancestor]

    @property
    def content(self) -> list[Any]:
        """All of it that decides what comes out."""
        before = [ancestor.files for ancestor in self.lineage]
        return [self.anti.model_dump(), self.peft.model_dump(), self.tokenizer.chat_template, before]


def parent_of(settings: Settings) -> Expert | None:
    """The expert to go on from, its files checked; SettingsError where it cannot become what is to be made."""
    if settings.from_ is None:
        return None
    parent = Registry(settings.outputs / "registry").checked(settings.from_)
    manifest = parent.manifest
    model = "small" if manifest.role == "expert" else "base"
    if model != settings.model:
        made = "the small model" if model == "small" else "the base itself"
        raise SettingsError(f"{parent.reference} is {made} tuned, and model={settings.model}", f"add model={model}")
    if manifest.family != settings.family.name:
        what = f"{parent.reference} is of the family {manifest.family}, and family={settings.family.name}"
        raise SettingsError(what, f"add family={manifest.family}")
    if settings.anti == "start" and manifest.kind == "lora":
        raise SettingsError(
            f"anti=start: {parent.reference} is an adapter, and an anti is a whole model",
            f"tune {parent.name} with peft=none first, or leave anti=original",
        )
    return parent


def begin(settings: Settings, parent: Expert | None, chat: bool) -> Beginning:
    """chat: the rows are messages. Raises SettingsError where the parent reads its prompts in the other form."""
    template = settings.family.chat_template
    if parent is None:
        ref = settings.family.small if settings.model == "small" else settings.family.base_ref
        tokenizer = tokenizer_for(ref, template, chat)
        return Beginning(Start(ref), tokenizer, identify(ref, tokenizer), settings.peft, [])
    manifest = parent.manifest
    if (manifest.prompt_format == "chat") != chat:
        kinds = ("messages", "texts") if chat else ("texts", "messages")
        raise SettingsError(
            f"the rows are {kinds[0]}, and {parent.reference} was tuned on {kinds[1]}", "give rows alike"
        )
    own = ModelRef(model=str(parent.folder))
    tokenizer = tokenizer_for(own, template, chat)
    lineage = [*manifest.lineage, _ancestor(parent)]
    if settings.anti == "start":
        return Beginning(Start(own), tokenizer, identify(own, tokenizer), settings.peft, lineage)
    ref = ModelRef(model=manifest.anti.model, revision=manifest.anti.revision)
    check_anti(files_of(parent), ref, load_tokenizer(ref))
    start = Start(ref, parent.folder, adapter=manifest.kind == "lora")
    return Beginning(start, tokenizer, manifest.anti, _peft(settings.peft, start, parent), lineage)


def _peft(asked: Peft, start: Start, parent: Expert) -> Peft:
    """An adapter that is tuned on keeps its shape; where another was asked for, that is told."""
    if not start.adapter or asked.name == "none":
        return asked
    kept = continued(asked, parent.folder)
    if kept.r != asked.r:
        print(f"proxytune: goes on with the adapter of {parent.reference}, rank {kept.r}", file=sys.stderr)
    return kept


def _ancestor(parent: Expert) -> Ancestor:
    manifest = parent.manifest
    return Ancestor(
        reference=parent.reference,
        method=manifest.config.get("method", {}).get("name", "sft"),
        kind=manifest.kind,
        data=manifest.data,
        files=weights_of(parent),
    )
