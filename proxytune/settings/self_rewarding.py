"""The settings of `method=self_rewarding`: a seed by supervised tuning, then rounds of preferences of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, model_validator

from proxytune.errors import SettingsError
from proxytune.settings.sections import Count, Method, Section, Share, Temperature, Url


class Rubric(Section):
    """Who scores a reply. by: `self` (the iterate that wrote it), `task` (the task's metric against the row's own
    reply), else a model: behind `url` where one is given, loaded here where not.

    samples: judgements of each reply, averaged. template: another question, with {instruction} and {response}.
    key: the environment variable that holds the API's key. concurrency, timeout (seconds), retries: of requests.
    """

    by: str = "self"
    samples: Count = 3
    temperature: Temperature = 0.7
    top_p: Share = 0.9
    max_new_tokens: Count = 256
    template: Path | None = None
    url: Url | None = None
    key: str = "OPENAI_API_KEY"
    concurrency: Count = 4
    timeout: Annotated[FiniteFloat, Field(gt=0)] = 120.0
    retries: Annotated[int, Field(ge=0)] = 4

    @model_validator(mode="after")
    def _a_server_has_a_model(self) -> Rubric:
        if self.url is not None and self.by in ("self", "task"):
            raise SettingsError(
                f"method.judge.url is given, and method.judge.by={self.by} asks no server",
                "name the server's model with method.judge.by=, or leave the url out",
            )
        return self


class SelfRewarding(Section):
    """Yuan et al. 2024 (arXiv 2401.10020). sft, dpo: fields of TRL's configurations of the seed and of each round.

    seed_rows: train rows that the seed learns from, the others stay for prompts=rows; None is all of them where prompts
    are proposed, else half. judge_rows: a file of scored replies to learn judging from; None makes them of seed rows,
    and only judge.by=self learns from any. shots: prompts shown to the proposer. similarity: ROUGE-L with a known
    prompt from which on a proposal is dropped. held_out: test rows that each iterate is measured on, greedily.
    """

    rounds: Count = 2
    seed_rows: Count | None = None
    judge_rows: Path | None = None
    prompts: Literal["propose", "rows"] = "propose"
    prompts_per_round: Count = 1000
    proposer: str = "self"
    shots: Count = 8
    similarity: Share = 0.7
    answers: Annotated[int, Field(ge=2)] = 4
    temperature: Annotated[Temperature, Field(gt=0)] = 0.7
    top_p: Share = 0.9
    batch_size: Count = 64
    judge: Rubric = Rubric()
    held_out: Annotated[int, Field(ge=0)] = 200
    sft: dict[str, Any] = {}
    dpo: dict[str, Any] = {}

    @model_validator(mode="after")
    def _a_task_knows_answers_of_rows_only(self) -> SelfRewarding:
        if self.judge.by == "task" and self.prompts == "propose":
            raise SettingsError(
                "method.judge.by=task scores against a row's own reply, and a proposed prompt has none",
                "add method.prompts=rows",
            )
        return self


class SeedTraining(Method):
    name: Literal["sft"] = "sft"


class RoundTraining(Method):
    name: Literal["dpo"] = "dpo"


class Trainings(Section):
    """How the seed and each round are tuned, checked as a `method` of its own is."""

    sft: SeedTraining
    dpo: RoundTraining


class Chosen(Section):
    """The method under the name that its keys have on the command line."""

    method: SelfRewarding


class Trained(Section):
    """Its trainings, likewise."""

    method: Trainings
