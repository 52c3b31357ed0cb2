"""Base, expert and anti, loaded and checked to fit together before a token is said.

What people get wrong is the anti: it must be the very checkpoint that the expert was tuned from. So an expert's lineage
names it by hash, and a trio whose anti is another one is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxytune.errors import DataError, TrioError
from proxytune.models import prompts
from proxytune.models.identity import ModelId, identify
from proxytune.models.local import LocalSource, load_model, load_tokenizer
from proxytune.models.prompts import Format, Turns
from proxytune.models.vocabulary import Vocabulary, shared
from proxytune.settings import ModelRef


@dataclass(frozen=True)
class ExpertFiles:
    """What a trio needs to know of an expert: its name, files, and what it was tuned from.

    folder holds a LoRA adapter (adapter=True) or a whole model, and the tokenizer it was tuned with.
    """

    name: str
    folder: Path
    adapter: bool
    anti: ModelId
    prompt_format: Format


@dataclass(frozen=True)
class Trio:
    """Three sources over one vocabulary, each with its own tokenizer for prompts; replies use the base's tokenizer."""

    base: LocalSource
    expert: LocalSource
    anti: LocalSource
    tokenizers: dict[str, Any]
    vocabulary: Vocabulary
    end_ids: frozenset[int]
    end_id: int
    prompt_format: Format

    def encode(self, prompt: Turns) -> dict[str, list[int]]:
        """The ids each role reads: the expert in the format it was tuned with, base and anti plain."""
        return {
            "base": prompts.encode(prompt, self.tokenizers["base"], "plain"),
            "expert": prompts.encode(prompt, self.tokenizers["expert"], self.prompt_format),
            "anti": prompts.encode(prompt, self.tokenizers["anti"], "plain"),
        }

    def encode_completion(self, prompt: Turns, completion: Turns) -> list[int]:
        """The ids of a given reply, the same for every model, closed by the token that ends the expert's replies."""
        ids = prompts.encode_completion(prompt, completion, self.tokenizers["base"], self.end_id)
        foreign = next((i for i in ids if i not in self.vocabulary), None)
        if foreign is not None:
            token = self.tokenizers["base"].convert_ids_to_tokens(foreign)
            raise DataError(
                f"a reply has the token {token!r}, which not all models of the trio know, so it cannot be scored",
                "leave such rows out",
            )
        return ids


def load(base_ref: ModelRef, expert: ExpertFiles, dtype: str = "auto") -> Trio:
    """Load and check a trio. Raises TrioError, saying what to do, when its members do not belong together."""
    anti_ref = ModelRef(model=expert.anti.model, revision=expert.anti.revision)
    tokenizers = {
        "base": load_tokenizer(base_ref),
        "expert": load_tokenizer(ModelRef(model=str(expert.folder))),
        "anti": load_tokenizer(anti_ref),
    }
    check_anti(expert, anti_ref, tokenizers["anti"])
    expert_model = (
        load_model(anti_ref, dtype, adapter=expert.folder)
        if expert.adapter
        else load_model(ModelRef(model=str(expert.folder)), dtype)
    )
    models = {"base": load_model(base_ref, dtype), "expert": expert_model, "anti": load_model(anti_ref, dtype)}
    rows = {name: model.get_output_embeddings().weight.shape[0] for name, model in models.items()}
    vocabulary = shared({name: (tokenizers[name].get_vocab(), rows[name]) for name in models})
    sources = {name: LocalSource(model, vocabulary.size) for name, model in models.items()}
    _level_caps(list(sources.values()))
    turn = prompts.end_of_turn(tokenizers["expert"]) if expert.prompt_format == "chat" else None
    return Trio(
        **sources,
        tokenizers=tokenizers,
        vocabulary=vocabulary,
        end_ids=prompts.end_ids(
            [tokenizers["base"], tokenizers["expert"]],
            [models["base"].generation_config, models["expert"].generation_config],
        ),
        # An end of turn that the base does not know cannot be said: then replies end as the base's do.
        end_id=turn if turn is not None and turn in vocabulary else tokenizers["base"].eos_token_id,
        prompt_format=expert.prompt_format,
    )


def check_anti(expert: ExpertFiles, anti_ref: ModelRef, tokenizer) -> None:
    """Refuse an anti that is not, hash by hash, the checkpoint in the expert's lineage."""
    found = identify(anti_ref, tokenizer)
    if not found.same_model(expert.anti):
        part = "weights" if found.weights != expert.anti.weights else "tokenizer"
        raise TrioError(
            f"{anti_ref.model} is not the checkpoint that {expert.name} was tuned from: its {part} changed "
            f"({getattr(found, part)[:12]}, the lineage says {getattr(expert.anti, part)[:12]})",
            "restore that revision, or tune the expert again: proxytune expert",
        )


def _level_caps(sources: list[LocalSource]) -> None:
    """Soft-capped scores cannot be mixed with uncapped ones: where caps differ, each is undone."""
    if len({source.soft_cap for source in sources}) > 1:
        for source in sources:
            source.uncap_at = source.soft_cap
