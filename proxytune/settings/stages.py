"""The settings of each stage: its section in `conf/` as one typed value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, FiniteFloat, field_validator, model_validator

from proxytune.errors import SettingsError
from proxytune.settings.benchmarks import Benchmark, Fields, Harness
from proxytune.settings.sections import (
    Count,
    Data,
    Decode,
    Family,
    Launch,
    Method,
    ModelRef,
    Peft,
    Remote,
    Section,
    Seed,
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
    seed: Seed = 0
    threads: Annotated[int, Field(ge=0)] = 0
    command: str = ""


class Expert(Stage):
    """Tune the family's small model (or, for the ceiling, its base) on a task and register the result.

    from_ (`from` everywhere else): a registered expert to go on from; anti: what steering subtracts then, the untuned
    model that the chain began with, or that expert. sample_steps: how often base, expert and steered are shown at work.
    """

    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    method: Method = Method()
    peft: Peft = Peft()
    launch: Launch = Launch()
    model: Literal["small", "base"] = "small"
    from_: str | None = Field(default=None, alias="from")
    anti: Literal["original", "start"] = "original"
    name: str | None = None
    sample_steps: Count | None = None
    resume: bool = True

    @model_validator(mode="after")
    def _an_anti_of_its_own(self) -> Expert:
        if self.anti == "start" and self.from_ is None:
            raise ValueError("anti=start needs a registered expert to start from: from=NAME")
        if self.sample_steps is not None and self.model == "base":
            raise ValueError("sample_steps shows a small model steering the base, and model=base tunes the base itself")
        if self.sample_steps is not None and self.launch.name != "single":
            raise ValueError("sample_steps needs launch=single: the processes of a launch only train")
        return self


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
        several = values.get("steering")
        first = (
            several[0] if isinstance(several, list | tuple) and several else None
        )  # what is no list is refused as such
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


class Doctor(Steering):
    """What would go wrong, looked for before anything large is loaded.

    prompt: shown as each model reads it; None takes the first validation row. forward: load the models for one reading
    of it by each, where nothing else is wrong. effect: does steering help, measured on the first `rows` validation
    rows at `alphas`; the models are loaded for that.
    """

    prompt: str | None = None
    forward: bool = True
    effect: bool = False
    rows: Annotated[int, Field(ge=2)] = 50
    alphas: Annotated[list[FiniteFloat], Field(min_length=1)] = [0.25, 0.5, 0.75, 1.0, 1.5, 2.0]
    bootstrap_samples: Count = 2000


class Evaluate(Steering):
    """Loss and metric of every system on held-out rows, with paired bootstrap intervals.

    tuned: `auto` uses a directly tuned base if one that fits is registered, null leaves it out, else its name.
    alphas: measured beside `alpha`, in the same pass. benchmark: measured by its rows, instead of the task's; harness:
    by tasks of the lm-evaluation-harness, run as `lm_eval` says.
    """

    benchmark: Benchmark | None = None
    harness: list[str] = []
    lm_eval: Harness = Harness()
    alphas: list[FiniteFloat] = []
    split: Literal["validation", "test"] = "test"
    generate: bool = True
    tuned: str | None = "auto"
    bootstrap_samples: Count = 2000
    score_batch_size: Count = 32

    @field_validator("harness", mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        return [name for part in given.split(",") if (name := part.strip())] if isinstance(given, str) else given or []

    @model_validator(mode="after")
    def _one_kind(self) -> Evaluate:
        if self.benchmark is not None and self.harness:
            raise SettingsError("both benchmark= and harness= are given", "give one of them")
        return self


class Sweep(Evaluate):
    """Evaluate at many alphas on validation rows, draw the curve, keep the best alpha with the expert.

    divergence_rows: the first rows, on which the divergence from base and expert is measured; 0 leaves it out.
    """

    split: Literal["validation", "test"] = "validation"
    alphas: Annotated[list[FiniteFloat], Field(min_length=1)] = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    select: Literal["loss", "metric"] = "loss"
    divergence_rows: Annotated[int, Field(ge=0)] = 100


class Analyze(Steering):
    """What steering changed, token by token, in replies that were written: of `run`, else of `replies`, else those that
    `evaluate` measures with these settings.

    run: its own settings are taken, an alpha given here aside. top: likeliest tokens kept at each position. min_uses:
    of a token that is told among the promoted and demoted. classes: `auto` goes by the task.
    """

    run: Path | None = None
    replies: Path | None = None
    system: Literal["base", "expert", "steered", "tuned"] = "steered"
    classes: Literal["auto", "math", "text", "code"] = "auto"
    top: Annotated[int, Field(ge=1, le=100)] = 5
    min_uses: Count = 20
    split: Literal["validation", "test"] = "test"
    bootstrap_samples: Count = 2000
    score_batch_size: Count = 8

    @model_validator(mode="after")
    def _one_source(self) -> Analyze:
        if self.run is not None and self.replies is not None:
            raise SettingsError("both run= and replies= are given", "give one of them")
        if self.base is not None:
            what = "analyze takes no base behind an API: it needs its scores for the whole vocabulary"
            raise SettingsError(what, "leave base= out and name a local one with base_model=")
        return self


class Demo(Sweep):
    """The whole job: expert, tuned base, side-by-side decoding, sweep, evaluation, picture."""

    expert: str = ""
    method: Method = Method()
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
    """What is timed: random Llamas, base and small each (layers, width, feed-forward width, heads), or trio=family.

    expert: the registered one that the family's base is steered by; None puts a random adapter on its small model.
    """

    trio: Literal["random", "family"] = "random"
    family: Family
    expert: str | None = None
    base: tuple[Count, Count, Count, Count] = (16, 1536, 4096, 12)
    small: tuple[Count, Count, Count, Count] = (8, 768, 2048, 12)
    vocabulary: Count = 32000
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_sizes: Annotated[list[Count], Field(min_length=1)] = [1, 8]
    drafters: list[Literal["expert", "pair", "ngram"]] = ["expert"]
    acceptances: list[Annotated[float, Field(ge=0, le=1)]] = [0.6, 0.7, 0.8, 0.9]
    prompt_tokens: Count = 64
    tokens: Count = 32
    turns: Count = 3
    outputs: Path = Path("outputs")
    threads: Annotated[int, Field(ge=0)] = 1
    command: str = ""

    @model_validator(mode="after")
    def _expert_has_a_family(self) -> Bench:
        if self.expert is not None and self.trio == "random":
            raise SettingsError(f"expert={self.expert} steers no random models", "add trio=family")
        return self


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
    seed: Seed = 0
    command: str = ""


class Score(Section):
    """Score a file of outputs made by anyone. outputs: `raw` are cut first as the benchmark does it."""

    benchmark: Benchmark
    predictions: Path | None = None
    fields: Fields = Fields()
    outputs: Literal["raw", "trimmed"] = "raw"
    out: Path | None = None
    bootstrap_samples: Count = 2000
    seed: Seed = 0
    command: str = ""
