"""What stages share: a model, a family, rows, a tracker, decoding, a base behind an API."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from proxytune.errors import SettingsError, did_you_mean


def _bare(url: str) -> str:
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise SettingsError(  # and not shown: what is too much in it may be a key
            f"the url for {parts.hostname} has more than a host, a port and a path",
            "leave keys out of it: base.key_variable, or a judge's key, names the environment variable that holds one",
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or re.search(r"\s", url):
        raise ValueError("give a URL such as http://127.0.0.1:8000")
    return url


Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Url = Annotated[str, AfterValidator(_bare)]  # of a server, with nothing in it that may be a key
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy, torch and TRL all take

MOST_COUNT = 2**31 - 1
COLDEST = 0.001  # above 0: scores that are divided by less overflow, and it says what 0 says


def _not_too_cold(temperature: float) -> float:
    if 0 < temperature < COLDEST:
        raise ValueError(f"give 0, or at least {COLDEST}")
    return temperature


Whole = Annotated[int, Field(ge=0, le=MOST_COUNT)]
Temperature = Annotated[FiniteFloat, Field(ge=0, le=100), AfterValidator(_not_too_cold)]
Penalty = Annotated[FiniteFloat, Field(ge=0.01, le=100)]
Noise = Annotated[int, Field(ge=-(2**62), le=2**62)]  # its seed; each further row or choice has a larger one


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelRef(Section):
    """A model on the hub or in a folder; `embedded:small` and `embedded:base` are the shipped ones.

    gguf_file: the weights of that GGUF file among the model's, dequantised. quantization, while loading: 8bit or 4bit
    by bitsandbytes, int8 by torchao; in 8bit a row's scores depend on the rows beside it. device: as torch names it, or
    `auto` to spread a model over several GPUs; None is the best there is.
    """

    model: str
    revision: str | None = None
    gguf_file: str | None = None
    quantization: Literal["8bit", "4bit", "int8"] | None = None
    device: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        """A name alone is a model."""
        return {"model": given} if isinstance(given, str) else given


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

    limit_train / limit_validation / limit_test: at most so many rows, the first ones; None takes all. bad_rows: of
    files; `fail` names them, `skip` leaves them out and counts them.
    """

    source: Literal["auto", "builtin", "hub", "files"] = "auto"
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    revision: str | None = None
    bad_rows: Literal["fail", "skip"] = "fail"
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
    """LoRA under PEFT's names, `qlora` over weights held in 4 bits, or `none` for full tuning."""

    name: Literal["lora", "qlora", "none"] = "lora"
    r: Count = 16
    lora_alpha: Annotated[FiniteFloat, Field(gt=0)] = 32.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"
    use_dora: bool = False

    @model_validator(mode="after")
    def _shared(self) -> Peft:
        if self.use_dora:
            raise SettingsError(
                "peft.use_dora: DoRA rescales whole weights by their norm, so the expert is no low-rank term beside "
                "its anti, and the two could not be rows of one forward over one copy of the weights",
                "leave it false, or tune every weight with peft=none",
            )
        return self


class Launch(Section):
    """Over how many processes of this machine a training is spread, and how. processes: None is one for each GPU.

    offload: weights that are split over GPUs wait in the machine's memory.
    """

    name: Literal["single", "ddp", "fsdp2", "zero3"] = "single"
    processes: Count | None = None
    offload: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Launch:
        if self.name == "single" and (self.processes or 1) > 1:
            raise SettingsError(f"launch=single is one process, not {self.processes}", "take launch=ddp")
        if self.offload and self.name in ("single", "ddp"):
            raise SettingsError(f"launch={self.name} splits no weights to offload", "take launch=fsdp2 or launch=zero3")
        return self


class Method(Section):
    """How a model is tuned: any field of TRL's configuration of the method (SFTConfig, DPOConfig), under its name.

    The fields declared here are not TRL's own. too_long: what becomes of rows of more tokens than max_length.
    early_stopping_*: as in transformers' EarlyStoppingCallback, on the validation loss; the best checkpoint is kept.
    """

    model_config = ConfigDict(extra="allow")

    name: Literal["sft", "dpo", "self_rewarding"] = "sft"
    too_long: Literal["truncate", "drop", "fail"] = "truncate"
    early_stopping_patience: Count | None = None
    early_stopping_threshold: Annotated[FiniteFloat, Field(ge=0)] = 0.0

    def given(self) -> dict[str, Any]:
        """The trainer's own fields; null ones are left to the family and TRL."""
        return {key: value for key, value in (self.model_extra or {}).items() if value is not None}


class Decode(Section):
    """How tokens are chosen: temperature 0 is greedy. Applied to the steered scores, after the equation.

    The last four say how the work is done, and change nothing of what comes out.
    """

    temperature: Temperature = 0.0
    top_k: Whole = 0
    top_p: Share = 1.0
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    repetition_penalty: Penalty = 1.0
    seed: Noise = 0
    max_new_tokens: Count | None = None
    min_new_tokens: Whole = 0
    base_top_p: Share = 1.0
    alpha_by: Literal["constant", "position", "confidence"] = "constant"
    alpha_steps: Annotated[Count, Field(le=MOST_COUNT)] = 64
    batch_size: Count = 64
    prefill_tokens: Count = 8192
    drafter: Literal["none", "expert", "pair", "ngram"] = "expert"
    draft_tokens: Annotated[int, Field(ge=0, le=32)] | None = None

    def content(self) -> dict[str, Any]:
        """What decides the text."""
        return self.model_dump(exclude={"batch_size", "prefill_tokens", "drafter", "draft_tokens"})

    def at_most(self, rows: int) -> Decode:
        """The same with no more rows at once."""
        return self.model_copy(update={"batch_size": min(rows, self.batch_size)})


class Remote(Section):
    """A base behind an API, reached under `url` in the dialect `name`.

    key_variable: the environment variable that holds the key. top: best scores asked for at each position.
    draft_tokens: drafted by the small pair where the server gives prompt scores. retries: of faults that can pass.
    max_requests, max_tokens: a budget; retries and prompt tokens count. tolerance: the most a score may be off, nats.
    mode: `bias` pushes a base that tells no scores by `logit_bias`, which is not exact.
    """

    name: Literal["vllm", "sglang", "llamacpp", "openai"]
    mode: Literal["scores", "bias"] = "scores"
    url: Annotated[Url, AfterValidator(lambda url: url.rstrip("/"))]
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

    @model_validator(mode="after")
    def _pushed(self) -> Remote:
        if self.mode == "bias" and (self.name != "openai" or self.require_certified):
            raise SettingsError(
                "base.mode=bias pushes a server of OpenAI's completions, and none of its tokens is certified",
                "give base=openai base.require_certified=false, or leave base.mode out",
            )
        return self
