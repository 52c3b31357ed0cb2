"""What base, expert and steered base say while the expert is being tuned: a few fixed prompts every so many steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import TrainerCallback

from proxytune.decoding.engine import build
from proxytune.decoding.mixture import Mixture
from proxytune.decoding.request import Limits, Request
from proxytune.models import prompts
from proxytune.models.loading import load_model, load_tokenizer
from proxytune.models.local import LocalSource
from proxytune.models.prompts import Format, Turns
from proxytune.models.source import Term
from proxytune.models.trio import level_caps
from proxytune.models.vocabulary import shared
from proxytune.settings import Decode, ModelRef
from proxytune.tasks.task import Task
from proxytune.tracking.record import Run

PROMPTS = 3
COLUMNS = ("step", "system", "prompt", "text")
LONGEST = 64  # tokens of a sample, at most


class Samples(TrainerCallback):
    """Greedy replies at alpha 1 to `asked` every `steps` steps, in the record's table `samples`.

    They change nothing of the training, and cost time and memory: base and anti (`models`) are loaded beside it when
    the first samples are due. tokenizer, format: the expert's.
    """

    def __init__(
        self,
        steps: int,
        asked: Sequence[Turns],
        task: Task,
        models: Mapping[str, ModelRef],
        tokenizer: Any,
        format: Format,
        tracked: Run,
    ):
        self.steps, self.asked, self.task, self.models = steps, asked[:PROMPTS], task, models
        self.tokenizers = {"expert": tokenizer}
        self.formats: dict[str, Format] = {"base": "plain", "anti": "plain", "expert": format}
        self.tracked, self.rows = tracked, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps:
            return
        model = kwargs["model"]
        began, training = time.monotonic(), model.training
        try:
            for system, mixture in self._mixtures(model).items():
                for asked, text in zip(self.asked, self._replies(mixture), strict=True):
                    self.rows.append([state.global_step, system, prompts.plain_text(asked), text])
        finally:
            model.train(training)
        self.tracked.table("samples", COLUMNS, self.rows)
        self.tracked.log({"samples/seconds": time.monotonic() - began}, state.global_step)

    @cached_property
    def _untouched(self) -> dict[str, LocalSource]:
        self.tokenizers |= {role: load_tokenizer(ref) for role, ref in self.models.items()}
        return {role: LocalSource(load_model(ref)) for role, ref in self.models.items()}

    def _mixtures(self, model) -> dict[str, Mixture]:
        sources = self._untouched | {"expert": LocalSource(model)}
        vocabulary = shared({role: (self.tokenizers[role].get_vocab(), sources[role].rows) for role in sources})
        for source in sources.values():
            source.vocabulary = vocabulary.size
        level_caps(list(sources.values()))
        terms = {role: Term(source, role) for role, source in sources.items()}
        pair = (terms["expert"], terms["anti"])
        return {
            "base": Mixture(terms["base"], vocabulary),
            "expert": Mixture(terms["expert"], vocabulary),
            "steered": Mixture(terms["base"], vocabulary, (pair,)),
        }

    def _replies(self, mixture: Mixture) -> list[str]:
        ends = prompts.end_ids([self.tokenizers["base"], self.tokenizers["expert"]], [])
        limits = Limits(min(self.task.max_new_tokens, LONGEST), ends, self.task.stop)
        requests = [
            Request(
                {role: prompts.encode(asked, self.tokenizers[role], format) for role, format in self.formats.items()},
                limits,
                (1.0,) * len(mixture.pairs),
            )
            for asked in self.asked
        ]
        replies = dict(build(mixture, self.tokenizers["base"], Decode(batch_size=PROMPTS)).run(requests))
        return [replies[place].text for place in range(len(requests))]
