"""From settings to a loaded trio: which expert is meant, what it was tuned from, which alpha."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from proxytune.decoding.mixture import Mixture
from proxytune.decoding.request import Limits
from proxytune.decoding.scoring import Given, fits
from proxytune.decoding.served import Served
from proxytune.errors import SettingsError, TrioError
from proxytune.experts.registry import Expert, Registry
from proxytune.models import trio as trios
from proxytune.models.identity import ModelId, identify
from proxytune.models.loading import load_tokenizer
from proxytune.models.trio import ExpertFiles, Trio
from proxytune.models.vocabulary import Vocabulary, shared
from proxytune.settings import ModelRef, Steer, Steering
from proxytune.stages.shared import memory
from proxytune.tasks.task import Row, Task

Several = TypeVar("Several", bound=Steering)
Held = Sequence[tuple[Expert, float]]  # the experts beside the first, each with the alpha that it keeps


def find(settings: Steering) -> Expert:
    """The registered expert that the settings name, its files checked against their hashes."""
    return Registry(settings.outputs / "registry").checked(settings.expert)


def alpha_of(settings: Steering, expert: Expert) -> float:
    """The alpha asked for, else the one a sweep left with the expert, else 1."""
    if settings.alpha is not None:
        return settings.alpha
    return expert.manifest.alpha if expert.manifest.alpha is not None else 1.0


def base_name(settings: Steering) -> str:
    """What the base is called where it is told: never with a key."""
    if settings.base is None:
        return settings.base_ref.model
    return f"{settings.base.model or settings.base_ref.model} at {settings.base.url}"


def files_of(expert: Expert) -> ExpertFiles:
    manifest = expert.manifest
    return ExpertFiles(
        name=expert.reference,
        folder=expert.folder,
        adapter=manifest.kind == "lora",
        anti=manifest.anti,
        prompt_format=manifest.prompt_format,
    )


def held(settings: Steering) -> list[tuple[Expert, float]]:
    """The experts beside the first, their files checked against their hashes: found once a stage, and passed on."""
    parts = _beside(settings)
    experts = [find(part) for part in parts]
    return [(expert, alpha_of(part, expert)) for part, expert in zip(parts, experts, strict=True)]


def pinned(settings: Several, expert: Expert) -> Several:
    """The settings with the versions and alphas that several experts have now, for the record: `latest` moves on.

    No weights are read for it: `held` checks those.
    """
    if not settings.steering:
        return settings
    registry = Registry(settings.outputs / "registry")
    first, others = Steer(expert=expert.reference, alpha=settings.alpha), []
    for part in _beside(settings):
        other = registry.resolve(part.expert)
        others.append(Steer(expert=other.reference, alpha=alpha_of(part, other)))
    return settings.model_copy(update={"steering": [first, *others]})


def _beside(settings: Steering) -> list[Steering]:
    """Of each expert beside the first, the settings that it would have alone."""
    return [settings.model_copy(update={"expert": s.expert, "alpha": s.alpha}) for s in settings.steering[1:]]


def alphas(mixture: Mixture, alpha: float, beside: Held) -> tuple[float, ...]:
    """One alpha for each pair of a mixture: the first as given, the others as held."""
    return (alpha, *(other for _, other in beside)) if mixture.pairs else ()


def load(settings: Steering, expert: Expert, beside: Held) -> Trio:
    experts = (expert, *(other for other, _ in beside))
    return _load(settings.base_ref, tuple(map(files_of, experts)), settings.family.dtype, settings.base is not None)


# Jobs of a sweep share a process: a trio is loaded once.
@lru_cache(maxsize=1)
def _load(base: ModelRef, experts: tuple[ExpertFiles, ...], dtype: str, served: bool) -> Trio:
    print(f"proxytune: loading {memory.before(base, experts, dtype, served)}", file=sys.stderr)
    return trios.load(base, experts, dtype, served=served)


@lru_cache(maxsize=4)
def base_identity(ref: ModelRef) -> ModelId:
    return identify(ref, load_tokenizer(ref))


def tuned_base(settings: Steering, expert: Expert, name: str | None) -> Expert | None:
    """The directly tuned base to compare with, if one that fits is registered.

    `auto` takes the newest that was tuned from this very base on the rows that the expert was tuned on. One that is
    named may have seen other rows; TrioError if it is not this base tuned. With a base behind an API there is none.
    """
    if name is None or (name == "auto" and settings.base is not None):
        return None
    if settings.base is not None:
        raise SettingsError(
            f"tuned={name} is compared with the checkpoint it was tuned from, and the base is behind an API",
            "leave tuned= out, or load the base here (leave base= out)",
        )
    registry = Registry(settings.outputs / "registry")
    base = base_identity(settings.base_ref)
    if name != "auto":
        tuned = registry.resolve(name)
        if tuned.manifest.role != "tuned" or not tuned.manifest.anti.same_model(base):
            what = f"{tuned.reference} is not {settings.base_ref.model} tuned directly"
            raise TrioError(what, "make one: proxytune expert model=base")
        return tuned
    fitting = [
        other
        for other in registry.experts()
        if other.manifest.role == "tuned"
        and other.manifest.task == expert.manifest.task
        and other.manifest.data.fingerprint == expert.manifest.data.fingerprint
        and other.manifest.anti.same_model(base)
    ]
    return max(fitting, key=lambda other: other.manifest.created, default=None)


def whole_vocabulary(tokenizer, model) -> Vocabulary:
    """The vocabulary of a single model: every id that its tokenizer knows."""
    return shared({"model": (tokenizer.get_vocab(), model.get_output_embeddings().weight.shape[0])})


def mixtures(trio: Trio) -> dict[str, Mixture]:
    """The systems that are made of a trio's models, by name; the expert alone is the first expert.

    With a base behind an API only the expert alone is one (stages/served.py has the others).
    """
    alone = Mixture(trio.pairs[0][0], trio.vocabulary)
    if trio.local is None:
        return {"expert": alone}
    return {
        "base": Mixture(trio.base, trio.vocabulary),
        "expert": alone,
        "steered": Mixture(trio.base, trio.vocabulary, trio.pairs),
    }


def given(trio: Trio, mixture: Mixture, rows: Sequence[Row]) -> list[tuple[Row, Given]]:
    """Rows as they are scored, without those that are longer than a model's context."""
    found = [
        (row, Given(trio.encode(row["prompt"]), trio.encode_completion(row["prompt"], row["completion"])))
        for row in rows
    ]
    return [(row, one) for row, one in found if fits(mixture, one.prompts, one.completion)]


def limits(settings: Steering, task: Task, end_ids: frozenset[int] = frozenset()) -> Limits:
    """When a reply ends: what the settings say, else the task."""
    return Limits(
        max_new_tokens=settings.decode.max_new_tokens or settings.task.max_new_tokens or task.max_new_tokens,
        end_ids=end_ids,
        stop=tuple(settings.task.stop if settings.task.stop is not None else task.stop),
        min_new_tokens=settings.decode.min_new_tokens,
    )


def identity(settings: Steering, expert: Expert, beside: Held, served: Served | None = None) -> dict[str, Any]:
    """Hashes of all that a steered base is made of, by role: what numbers measured with it depend on.

    Of a base behind an API it is what the server was found to be.
    """
    parts = {"weights", "tokenizer"}
    anti = expert.manifest.anti.model_dump(include=parts) | {"format": expert.manifest.prompt_format}
    base = served.content if served else base_identity(settings.base_ref).model_dump(include=parts)
    found = {"base": base, "anti": anti, "expert": weights_of(expert)}
    return found | ({"held": [[weights_of(other), alpha] for other, alpha in beside]} if beside else {})


def weights_of(expert: Expert) -> dict[str, str]:
    """Hashes that identify a registered model's own files."""
    return {name: entry.sha256 for name, entry in expert.manifest.files.items() if Path(name).suffix == ".safetensors"}
