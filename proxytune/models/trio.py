"""Base, expert and anti, loaded and checked to fit together before a token is said.

What people get wrong is the anti: it must be the very checkpoint that the expert was tuned from. So an expert's lineage
names it by hash, and a trio whose anti is another one is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxytune.errors import DataError, SettingsError, TrioError
from proxytune.models import prompts
from proxytune.models.described import describe
from proxytune.models.identity import ModelId, identify
from proxytune.models.linear import quicken
from proxytune.models.loading import load_model, load_tokenizer
from proxytune.models.local import LocalSource
from proxytune.models.members import attach, separable
from proxytune.models.prompts import Format, Turns
from proxytune.models.source import Term
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
    """Base and pairs of expert and anti over one vocabulary; replies use the base's tokenizer.

    local: the base, None where only a server has it; head: the rows of that one's head, None where its configuration
    does not tell. tokenizers and formats: how each role's prompt is put; a further expert has a role of its own
    (`expert2`).
    """

    local: Term | None
    pairs: tuple[tuple[Term, Term], ...]
    tokenizers: dict[str, Any]
    formats: dict[str, Format]
    vocabulary: Vocabulary
    end_ids: frozenset[int]
    end_id: int
    head: int | None = None

    @property
    def base(self) -> Term:
        """Raises SettingsError where only a server has it."""
        if self.local is None:
            raise SettingsError("the base is behind an API, and this needs it here", "leave base= out")
        return self.local

    def encode(self, prompt: Turns, roles: Iterable[str] | None = None) -> dict[str, list[int]]:
        """The ids that each role reads, all roles unless some are named: an expert in the format it was tuned with,
        base and anti plain."""
        return {
            role: prompts.encode(prompt, self.tokenizers[role], self.formats[role])
            for role in (self.tokenizers if roles is None else roles)
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


def load(base_ref: ModelRef, experts: Sequence[ExpertFiles], dtype: str = "auto", *, served: bool = False) -> Trio:
    """Load and check a trio, or a base with several pairs.

    LoRA experts of one anti are rows of one model with it; others are models of their own. served: the base is behind
    an API, and of base_ref only tokenizer and configuration are read. Raises TrioError, saying what to do, when members
    do not belong together.
    """
    tokenizers: dict[str, Any] = {"base": load_tokenizer(base_ref)}
    antis = list(dict.fromkeys(expert.anti for expert in experts))
    for number, expert in enumerate(experts):
        anti_role = _role("anti", antis.index(expert.anti))
        anti_ref = ModelRef(model=expert.anti.model, revision=expert.anti.revision)
        tokenizers[_role("expert", number)] = load_tokenizer(ModelRef(model=str(expert.folder)))
        if anti_role not in tokenizers:
            tokenizers[anti_role] = load_tokenizer(anti_ref)
        check_anti(expert, anti_ref, tokenizers[anti_role])
    places: dict[str, tuple[LocalSource, int]] = {}
    if not served:
        places["base"] = (LocalSource(quicken(load_model(base_ref, dtype))), 0)
    for place, anti in enumerate(antis):
        own = {_role("expert", n): expert for n, expert in enumerate(experts) if expert.anti == anti}
        places |= _small(anti, _role("anti", place), own, dtype)
    known = {role: tokenizer.get_vocab() for role, tokenizer in tokenizers.items()}
    rows = {role: source.rows for role, (source, _) in places.items()}
    vocabulary = shared({role: (ids, rows.get(role) or max(ids.values()) + 1) for role, ids in known.items()})
    sources = list(dict.fromkeys(source for source, _ in places.values()))
    for source in sources:
        source.vocabulary = vocabulary.size
    generation = [source.model.generation_config for source in sources]
    head = None
    if served:
        elsewhere = describe(base_ref, weights=False)
        head = getattr(elsewhere.text, "vocab_size", None)
        generation.append(elsewhere.generation)
        level_caps(sources, [elsewhere.soft_cap] if elsewhere.config else [])
    else:
        level_caps(sources)
    found = {role: Term(source, role, member) for role, (source, member) in places.items()}
    chat = next((n for n, expert in enumerate(experts) if expert.prompt_format == "chat"), None)
    return Trio(
        local=found.get("base"),
        pairs=tuple(
            (found[_role("expert", n)], found[_role("anti", antis.index(expert.anti))])
            for n, expert in enumerate(experts)
        ),
        tokenizers=tokenizers,
        formats={role: "plain" for role in tokenizers}
        | {_role("expert", n): expert.prompt_format for n, expert in enumerate(experts)},
        vocabulary=vocabulary,
        end_ids=prompts.end_ids(
            [tokenizer for role, tokenizer in tokenizers.items() if not role.startswith("anti")], generation
        ),
        end_id=prompts.end_id(
            None if chat is None else tokenizers[_role("expert", chat)], tokenizers["base"], vocabulary
        ),
        head=head,
    )


def _role(kind: str, number: int) -> str:
    return kind if number == 0 else f"{kind}{number + 1}"


def _small(anti: ModelId, anti_role: str, experts: dict[str, ExpertFiles], dtype: str):
    """The source and member of an anti and its experts: those that are plain adapters share the anti's weights."""
    ref = ModelRef(model=anti.model, revision=anti.revision)
    sharing = {role: expert for role, expert in experts.items() if expert.adapter and separable(expert.folder)}
    model = load_model(ref, dtype)
    attach(model, [expert.folder for expert in sharing.values()])
    source = LocalSource(quicken(model, second_copy=False))  # one copy of the pair's weights, as promised
    found = {role: (source, member) for member, role in enumerate([anti_role, *sharing])}
    for role, expert in experts.items():
        if role not in sharing:
            own = ModelRef(model=str(expert.folder))
            merged = load_model(ref, dtype, adapter=expert.folder) if expert.adapter else load_model(own, dtype)
            found[role] = (LocalSource(quicken(merged, second_copy=False)), 0)
    return found


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


def level_caps(sources: Sequence[LocalSource], served: Sequence[float | None] = ()) -> None:
    """Soft-capped scores cannot be mixed with uncapped ones: where caps differ, each is undone.

    served: the cap of a base behind an API, whose log-probabilities cannot be uncapped. Raises TrioError where they
    would have to be.
    """
    caps = {source.soft_cap for source in sources}
    if len(caps | set(served)) == 1:
        return
    if any(served):
        raise TrioError(
            f"the served base caps its scores at {served[0]:g} and the small models do otherwise, which scores from an "
            "API cannot undo",
            "load the base here (leave base= out), or use small models of its family",
        )
    for source in sources:
        source.uncap_at = source.soft_cap
