"""The settings of each stage: its section in `conf/` as one typed value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, model_validator

from proxytune.errors import SettingsError
from proxytune.settings.benchmarks import Benchmark, Fields
from proxytune.settings.sections import (
    Count,
    Data,
    Decode,
    Family,
    ModelRef,
    Peft,
    Remote,
    Section,
    TaskChoice,
    Tracker,
)


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

    alpha None takes the one that the expert's manifest carries (chosen by a sweep), else 1. base_model: any other
    than family.base. steering: several experts at once; the first stands for `expert` and `alpha`, which is
    what a sweep moves, and the others are held. base: a server that has the base; then only the tokenizer of the base
    named above is loaded.
    """

    expert: str
    alpha: FiniteFloat | None = None
    steering: list[Steer] = []
    base_model: ModelRef | None = None
    base: Remote | None = None
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


class Serve(Steering):
    """A trio behind an API. port 0 takes a free one; queue: replies that may wait, for each of the systems.

    alpha and decode are what a request leaves open. max_tokens: of a reply; drain_seconds: for replies under way when
    the server is told to end.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    queue: Annotated[int, Field(ge=0)] = 256
    max_tokens: Count = 2048
    max_body_bytes: Count = 1 << 20
    drain_seconds: Annotated[FiniteFloat, Field(ge=0)] = 30.0

    @model_validator(mode="after")
    def _local(self) -> Serve:
        if self.base is not None:
            raise SettingsError(
                "serve takes no base behind an API: the engine needs its scores for the whole vocabulary",
                "leave base= out and name a local one with base_model=; decode takes base=",
            )
        return self


class Doctor(Steering):
    """What would go wrong, looked for before anything large is loaded.

    prompt: shown as each model reads it; None takes the first validation row. effect: does steering help, measured on
    the first `rows` validation rows at `alphas`; the models are loaded for that.
    """

    prompt: str | None = None
    effect: bool = False
    rows: Annotated[int, Field(ge=2)] = 50
    alphas: Annotated[list[FiniteFloat], Field(min_length=1)] = [0.25, 0.5, 0.75, 1.0, 1.5, 2.0]
    bootstrap_samples: Count = 2000


class Evaluate(Steering):
    """Loss and metric of every system on held-out rows, with paired bootstrap intervals.

    tuned: `auto` uses a directly tuned base if one that fits is registered, null leaves it out, else its name.
    alphas: measured beside `alpha`, in the same pass. benchmark: measured by its rows, instead of the task's.
    """

    benchmark: Benchmark | None = None
    alphas: list[FiniteFloat] = []
    split: Literal["validation", "test"] = "test"
    generate: bool = True
    tuned: str | None = "auto"
    bootstrap_samples: Count = 2000
    score_batch_size: Count = 32

    @model_validator(mode="after")
    def _local(self) -> Evaluate:
        if self.base is not None:
            raise SettingsError(
                "evaluate and sweep take no base behind an API yet: a loss needs its scores for the whole vocabulary",
                "leave base= out and name a local one with base_model=; decode and doctor take base=",
            )
        return self


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


class Bench(Section):
    """What is timed. base, small: random Llamas, each (layers, width, feed-forward width, heads), for trio=random."""

    trio: Literal["random", "tiny"] = "random"
    base: tuple[Count, Count, Count, Count] = (16, 1536, 4096, 12)
    small: tuple[Count, Count, Count, Count] = (8, 768, 2048, 12)
    vocabulary: Count = 32000
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_sizes: Annotated[list[Count], Field(min_length=1)] = [1, 8]
    acceptances: list[Annotated[float, Field(ge=0, le=1)]] = [0.6, 0.7, 0.8, 0.9]
    prompt_tokens: Count = 64
    tokens: Count = 32
    turns: Count = 3
    outputs: Path = Path("outputs")
    threads: Annotated[int, Field(ge=0)] = 1
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
