"""Typed, validated settings of every stage: what Hydra composed, checked before anything else happens.

Unknown keys are refused with a suggestion, numbers must be finite and in range. A stage's `run(settings)` takes one of
these; `conf/` holds the values. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

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
    """How tokens are chosen: temperature 0 is greedy. Applied to the steered scores, after the equation.

    The last four say how the work is done, and change nothing of what comes out.
    """

    temperature: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Share = 1.0
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    repetition_penalty: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    seed: int = 0
    max_new_tokens: Count | None = None
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    batch_size: Count = 64
    prefill_tokens: Count = 8192
    drafter: Literal["none", "expert", "pair", "ngram"] = "expert"
    draft_tokens: Annotated[int, Field(ge=0, le=32)] | None = None

    def content(self) -> dict[str, Any]:
        """What decides the text."""
        return self.model_dump(exclude={"batch_size", "prefill_tokens", "drafter", "draft_tokens"})


class Remote(Section):
    """A base behind an API, reached under `url` in the dialect `name`.

    key_variable: the environment variable that holds the key. top: best scores asked for at each position.
    draft_tokens: drafted by the small pair where the server gives prompt scores. retries: of faults that can pass.
    max_requests, max_tokens: a budget; retries and prompt tokens count. tolerance: the most a score may be off, nats.
    """

    name: Literal["vllm", "sglang", "llamacpp", "openai"]
    url: str
    model: str | None = None
    key_variable: str | None = None
    top: Count = 20
    draft_tokens: Annotated[int, Field(ge=0, le=32)] = 0
    in_flight: Count = 16
    timeout_seconds: Annotated[FiniteFloat, Field(gt=0)] = 120.0
    retries: Annotated[int, Field(ge=0, le=20)] = 6
    max_requests: Count | None = None
    max_tokens: Count | None = None
    require_certified: bool = False
    tolerance: Annotated[FiniteFloat, Field(ge=0)] = 1e-4

    @field_validator("url")
    @classmethod
    def _bare(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("give a URL such as http://127.0.0.1:8000")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise SettingsError(  # and not shown: what is too much in it may be a key
                f"the url for {parts.hostname} has more than a host, a port and a path",
                "leave keys out of it: key_variable names the environment variable that holds one",
            )
        return url.rstrip("/")


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


class Steer(Section):
    """One registered expert and how hard it steers; alpha None as in `Steering`."""

    expert: str
    alpha: FiniteFloat | None = None


class Steering(Stage):
    """A trio: the family's base, a registered expert (its anti is in its lineage) and alpha.

    alpha None takes the one that the expert's manifest carries (chosen by a sweep), else 1. base overrides family.base
    by any other model reference. steering: several experts at once; the first stands for `expert` and `alpha`, which is
    what a sweep moves, and the others are held.
    """

    expert: str
    alpha: FiniteFloat | None = None
    steering: list[Steer] = []
    base_model: ModelRef | None = None
    decode: Decode = Decode()

    @model_validator(mode="before")
    @classmethod
    def _first_expert(cls, values: Any) -> Any:
        first = (values.get("steering") or [None])[0]
        first = first.model_dump() if isinstance(first, Steer) else first
        if isinstance(first, Mapping) and "expert" in first:
            alpha = values.get("alpha")
            return {**values, "expert": first["expert"], "alpha": first.get("alpha") if alpha is None else alpha}
        return values

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


class Healing(Section):
    """Distillation of a cut model from its base: AdamW, warm-up and cosine; `batch_size` windows a step.

    freeze_embeddings: embedding and head stay the base's own, bit for bit. bf16: matrix products in bfloat16; None
    does so on a GPU that can. steps 0 leaves the model as it was cut.
    """

    steps: Annotated[int, Field(ge=0)] = 1000
    batch_size: Count = 8
    learning_rate: Annotated[FiniteFloat, Field(gt=0)] = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    weight_decay: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    freeze_embeddings: bool = True
    bf16: bool | None = None
    save_steps: Count = 100


class Twin(Section):
    """Make a small sibling of `base` from some of its layers, healed on text.

    text: .txt files in paragraphs, .jsonl rows with `text`, `question` or `prompt`. window: tokens of each piece that
    is read. held_out: the share of paragraphs that only perplexity is measured on, by their hash. calibration_windows
    measure the layers, at most evaluation_windows the perplexity.
    """

    base: ModelRef = ModelRef(model="embedded:base")
    layers: Count = 3
    text: list[Path] = []
    name: str | None = None
    window: Annotated[int, Field(ge=8)] = 256
    held_out: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.05
    calibration_windows: Count = 32
    evaluation_windows: Count = 100
    heal: Healing = Healing()
    tracker: Tracker = Tracker()
    resume: bool = True
    outputs: Path = Path("outputs")
    seed: int = 0
    command: str = ""


class Judge(Section):
    """Who judges what no rule can. models: by what they judge; url: of an API; key: the variable that holds its key."""

    models: dict[str, str] = {}
    url: str | None = None
    key: str = "OPENAI_API_KEY"
    template: Path | None = None
    concurrency: Count = 4
    timeout: Annotated[FiniteFloat, Field(gt=0)] = 120.0
    retries: Annotated[int, Field(ge=0)] = 4
    batch_size: Count = 32
    kept: Path = Path("outputs/judgements")


class Benchmark(Section):
    """Which benchmark, and what of it the user overrides (None keeps its own). rows: None takes the hub's."""

    name: str
    rows: Path | None = None
    revision: str | None = None
    limit: Count | None = None
    seed: int = 42
    max_new_tokens: Count | None = None
    stop: list[str] | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0)] | None = None
    top_p: Share | None = None
    samples: Count | None = None
    allow_code: bool = False
    sandbox: Literal["isolated", "limits"] = "isolated"
    python: str | None = None
    workers: Annotated[int, Field(ge=0)] = 0
    cpu_seconds: Count | None = None
    judge: Judge = Judge()


class Fields(Section):
    """The columns of a file of predictions; None takes those that the benchmark's released files have."""

    output: str | None = None
    reference: str | None = None
    id: str | list[str] | None = None
    verdict: str | list[str] | None = None


class Score(Section):
    """Score a file of outputs made by anyone. outputs: `raw` are cut first as the benchmark does it."""

    benchmark: Benchmark
    predictions: Path | None = None
    fields: Fields = Fields()
    outputs: Literal["raw", "trimmed"] = "raw"
    out: Path | None = None
    bootstrap_samples: Count = 2000
    seed: int = 0
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
