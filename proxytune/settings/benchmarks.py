"""What is asked of a benchmark and of the model that judges it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from proxytune.settings.sections import Count, Section, Share, Temperature, Url


class Judge(Section):
    """Who judges what no rule can. models: by what they judge; url: of an API; key: the variable that holds its key."""

    models: dict[str, str] = {}
    url: Url | None = None
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
    temperature: Temperature | None = None
    top_p: Share | None = None
    samples: Count | None = None
    allow_code: bool = False
    sandbox: Literal["isolated", "limits"] = "isolated"
    python: str | None = None
    workers: Annotated[int, Field(ge=0)] = 0
    cpu_seconds: Count | None = None
    judge: Judge = Judge()


class Harness(Section):
    """How tasks of the lm-evaluation-harness are run. include_path: a folder with tasks of one's own.

    num_fewshot None takes the task's own. chat: each model reads the chat by its own template. max_length: of prompt
    and reply in tokens; None takes what the models read.
    """

    include_path: Path | None = None
    limit: Count | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    chat: bool = False
    max_length: Count | None = None


class Fields(Section):
    """The columns of a file of predictions; None takes those that the benchmark's released files have."""

    output: str | None = None
    reference: str | None = None
    id: str | list[str] | None = None
    verdict: str | list[str] | None = None
