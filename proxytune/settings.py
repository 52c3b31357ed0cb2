"""Typed, validated settings of every stage: what Hydra composed, checked before anything else happens.

Unknown keys are refused with a suggestion, numbers must be finite and in range. A stage's `run(settings)` takes one of
these; `conf/` holds the values. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from proxytune.errors import SettingsError, did_you_mean

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelRef(Section):
    """A model on the hub or in a folder; `embedded:small` and `embedded:base` are the shipped ones."""

    model: str
    revision: str | None = None


class Family(Section):
    """Models that share a tokenizer: a small one to tune, bases to steer, and how prompts are put to them.

    chat_template: None uses the tokenizer's own, else the template of another model or a path to a `.jinja` file, for
    small models that come without one. training: the family's defaults for the trainer, under TRL's names.
    """

    name: str
    small: ModelRef
    bases: dict[str, ModelRef]
    base: str
    chat_template: str | None = None
    data: Literal["builtin", "hub"] = "hub"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    training: dict[str, Any] = {}

    @model_validator(mode="after")
    def _base_exists(self) -> Family:
        if self.base not in self.bases:
            raise ValueError(
                f"family.base={self.base} is not one of this family's bases; {did_you_mean(self.base, self.bases)}"
            )
        return self

    @property
    def base_ref(self) -> ModelRef:
        return self.bases[self.base]


class TaskChoice(Section):
    """Which task, and what of it the user overrides (null keeps the task's own)."""

    name: str
    max_new_tokens: Count | None = None
    stop: list[str] | None = None


class Data(Section):
    """Where rows come from. `auto` is the family's own choice; `files` reads JSONL or CSV in TRL's formats.

    limit_train / limit_validation / limit_test: at most so many rows, the first ones; None takes all.
    """

    source: Literal["auto", "builtin", "hub", "files"] = "auto"
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    revision: str | None = None
    limit_train: Count | None = None
    limit_validation: Count | None = None
    limit_test: Count | None = None


class Tracker(Section):
    name: Literal["none", "local", "wandb"] = "wandb"
    project: str = "proxytune"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = []


class Peft(Section):
    """LoRA under PEFT's names, or `none` for full tuning."""

    name: Literal["lora", "none"] = "lora"
    r: Count = 16
    lora_alpha: Annotated[FiniteFloat, Field(gt=0)] = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"


class Decode(Section):
    """How tokens are chosen: temperature 0 is greedy. Applied to the steered scores, after the equation."""

    temperature: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Share = 1.0
    seed: int = 0
    max_new_tokens: Count | None = None
    batch_size: Count = 64


class Stage(Section):
    """What every stage has. `command` is filled in by the entry point, for the record."""

    family: Family
    task: TaskChoice
    data: Data = Data()
    tracker: Tracker = Tracker()
    outputs: Path = Path("outputs")
    seed: int = 0
    threads: Annotated[int, Field(ge=0)] = 0
    command: str = ""


class Expert(Stage):
    """Tune the family's small model (or, for the ceiling, its base) on a task and register the result.

    method: `name` plus any field of TRL's SFTConfig; null means the family's default, else TRL's.
    """

    method: dict[str, Any] = {"name": "sft"}
    peft: Peft = Peft()
    model: Literal["small", "base"] = "small"
    name: str | None = None
    resume: bool = True


class Steering(Stage):
    """A trio: the family's base, a registered expert (its anti is in its lineage) and alpha.

    alpha None takes the one that the expert's manifest carries (chosen by a sweep), else 1. base overrides family.base
    by any other model reference.
    """

    expert: str
    alpha: FiniteFloat | None = None
    base_model: ModelRef | None = None
    decode: Decode = Decode()

    @property
    def base_ref(self) -> ModelRef:
        return self.base_model or self.family.base_ref


class DecodeStage(Steering):
    """Prompts from `prompt`, a `prompts` file (JSONL or text, `-` for stdin); JSONL to `out`."""

    prompt: str | None = None
    prompts: str | None = None
    out: Path | None = None
    compare: bool = False


class Evaluate(Steering):
    """Loss and metric of every system on held-out rows, with paired bootstrap intervals.

    tuned: `auto` uses a directly tuned base if one that fits is registered, null leaves it out, else its name.
    """

    split: Literal["validation", "test"] = "test"
    generate: bool = True
    tuned: str | None = "auto"
    bootstrap_samples: Count = 2000
    score_batch_size: Count = 32


class Sweep(Evaluate):
    """Evaluate at many alphas on validation rows, draw the curve, keep the best alpha with the expert."""

    split: Literal["validation", "test"] = "validation"
    alphas: Annotated[list[FiniteFloat], Field(min_length=1)] = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    select: Literal["loss", "metric"] = "loss"


class Demo(Sweep):
    """The whole job: expert, tuned base, side-by-side decoding, sweep, evaluation, picture."""

    expert: str = ""
    method: dict[str, Any] = {"name": "sft"}
    peft: Peft = Peft()
    examples: Count = 3


class Pretrain(Section):
    """Train the embedded family from scratch. extra: text or JSONL files (`text` or `question`) read along."""

    out: Path = Path("data/tiny")
    extra: list[Path] = []
    resume: bool = True
    outputs: Path = Path("outputs")
    command: str = ""


S = TypeVar("S", bound=BaseModel)


def load(kind: type[S], values: Mapping[str, Any]) -> S:
    """Validate composed values into the settings of a stage.

    Raises SettingsError in one line: the first thing that is wrong, what was given, and what would do.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            parent, _, key = where.rpartition(".")
            raise SettingsError(f"unknown key {where}", did_you_mean(key, _keys(kind, parent))) from None
        message = first["msg"].removeprefix("Value error, ")
        raise SettingsError(f"{where}={first['input']!r}: {message}" if where else message) from None


def _keys(kind: type[BaseModel], parent: str) -> list[str]:
    for name in filter(None, parent.split(".")):
        field = kind.model_fields.get(name)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        kind = field.annotation
    return list(kind.model_fields)
