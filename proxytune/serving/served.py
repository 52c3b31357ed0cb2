"""What is served under which name, and how a body becomes requests of an engine."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from proxytune.decoding.mixture import Mixture
from proxytune.decoding.request import Limits, Request, sampling, variant
from proxytune.errors import did_you_mean
from proxytune.models.prompts import Turns
from proxytune.models.trio import Trio
from proxytune.serving.protocol import Chat, Completion, Refused
from proxytune.settings import Decode


@dataclass(frozen=True)
class Guide:
    """An expert that is served: the name asked for, the version it means, and its alpha where none is asked for."""

    name: str
    reference: str
    alpha: float


@dataclass(frozen=True)
class Served:
    """A trio under three names: `base`, `expert` (the first alone), and `base+` the experts' names.

    decode: what a body leaves open. tokens: of a reply where a body does not say; max_tokens: the most.
    """

    trio: Trio
    guides: tuple[Guide, ...]
    decode: Decode
    tokens: int
    max_tokens: int

    @cached_property
    def steered(self) -> str:
        return "+".join(["base", *(guide.name for guide in self.guides)])

    @cached_property
    def mixtures(self) -> dict[str, Mixture]:
        trio = self.trio
        return {
            "base": Mixture(trio.base, trio.vocabulary),
            "expert": Mixture(trio.pairs[0][0], trio.vocabulary),
            self.steered: Mixture(trio.base, trio.vocabulary, trio.pairs),
        }

    @property
    def tokenizer(self) -> Any:
        return self.trio.tokenizers["base"]

    def mixture(self, model: str) -> Mixture:
        if model not in self.mixtures:
            hint = did_you_mean(model, self.mixtures)
            raise Refused(404, f"no model {model!r} is served; {hint}", "model", "model_not_found")
        return self.mixtures[model]

    def longest(self, model: str) -> int | None:
        """How many ids the models of a mixture read at most."""
        terms = self.mixture(model).terms
        return min((s for term in terms if (s := getattr(term.source, "longest", None))), default=None)

    def cards(self, created: int) -> list[dict[str, Any]]:
        steers = [{"expert": g.name, "version": g.reference, "alpha": g.alpha} for g in self.guides]
        return [
            {
                "id": model,
                "object": "model",
                "created": created,
                "owned_by": "proxytune",
                "max_model_len": self.longest(model),
                "steering": steers if mixture.pairs else [],
            }
            for model, mixture in self.mixtures.items()
        ]

    def alphas(self, body: Completion | Chat) -> tuple[float, ...]:
        """One alpha for each expert of the model asked for, as asked for."""
        if not self.mixture(body.model).pairs:
            if body.alpha is not None or body.steering is not None:
                raise Refused(400, f"{body.model} is not steered; ask for {self.steered}", "alpha")
            return ()
        if body.steering is not None:
            given = body.steering
            return self._named(given if isinstance(given, dict) else {pull.expert: pull.alpha for pull in given})
        own = tuple(guide.alpha for guide in self.guides)
        if body.alpha is None:
            return own
        if not isinstance(body.alpha, list):
            return (body.alpha, *own[1:])
        if len(body.alpha) != len(own):
            raise Refused(400, f"{len(body.alpha)} alphas are given for {len(own)} experts; give one each", "alpha")
        return tuple(body.alpha)

    def _named(self, given: dict[str, float]) -> tuple[float, ...]:
        places = {g.reference: i for i, g in enumerate(self.guides)} | {g.name: i for i, g in enumerate(self.guides)}
        alphas = [0.0] * len(self.guides)
        for name, alpha in given.items():
            if name not in places:
                hint = did_you_mean(name, [guide.name for guide in self.guides])
                raise Refused(400, f"no expert {name!r} is served; {hint}", "steering")
            alphas[places[name]] = alpha
        return tuple(alphas)

    def requests(self, body: Completion | Chat) -> list[Request]:
        """One for each choice of each prompt, in their order. Raises Refused where the body asks for too much."""
        alphas, how, count = self.alphas(body), self._sampling(body), body.n or 1
        tokens = body.max_tokens or self.tokens
        if tokens > self.max_tokens:
            raise Refused(400, f"{tokens} tokens are more than the {self.max_tokens} of this server", "max_tokens")
        limits = Limits(tokens, self.trio.end_ids, body.stops, body.min_tokens)
        prompts = [self._encode(body.model, prompt) for prompt in body.prompts]
        return [
            Request(
                prompt,
                limits,
                alphas,
                replace(how, seed=how.seed + place * count + choice),
                variant(self.decode),
                logprobs=0 if body.told is None else max(1, body.told),
            )
            for place, prompt in enumerate(prompts)
            for choice in range(count)
        ]

    def _sampling(self, body: Completion | Chat):
        """The settings' way of choosing, with what the body says instead."""
        fields = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {field: value for field in fields if (value := getattr(body, field)) is not None}
        seed = secrets.randbits(31) if body.seed is None else body.seed
        return replace(sampling(self.decode, 0), seed=seed, **given)

    def _encode(self, model: str, prompt: Turns | list[int]) -> dict[str, list[int]]:
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            ids = self._given_ids(model, prompt)
        else:
            ids = self.read(prompt)
        used = max(len(ids[term.role]) for term in self.mixture(model).terms)
        longest = self.longest(model)
        if longest is not None and used >= longest:
            what = f"a prompt has {used} tokens and the models read {longest}, the reply's included; shorten the prompt"
            raise Refused(400, what, "prompt", "context_length_exceeded")
        return ids

    def read(self, prompt: Any) -> dict[str, list[int]]:
        try:
            return self.trio.encode(prompt)
        except TemplateError as error:
            raise Refused(400, f"the expert's chat template refuses these messages: {error}", "messages") from None

    def _given_ids(self, model: str, prompt: Sequence[Any]) -> dict[str, list[int]]:
        """Ids are read as they stand by every model, so none of them may want a chat format around the prompt."""
        roles = [term.role for term in self.mixture(model).terms]
        if any(self.trio.formats[role] == "chat" for role in roles):
            raise Refused(400, "the expert reads prompts in its chat format, so give text, not token ids", "prompt")
        foreign = next((i for i in prompt if i not in self.trio.vocabulary), None)
        if foreign is not None:
            raise Refused(400, f"token id {foreign} is not one that all models know", "prompt")
        return {role: list(prompt) for role in roles}
