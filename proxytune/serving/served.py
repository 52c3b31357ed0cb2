"""What is served under which name, and how a body becomes requests of an engine."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from proxytune.decoding.mixture import Mixture
from proxytune.decoding.remote import small
from proxytune.decoding.request import Limits, Request, sampling, variant
from proxytune.errors import did_you_mean
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
    """A trio by its names: `base`, `expert` (the first alone), and `base+` the experts' names.

    Of several experts each is also there alone, by its name, and `base+` some of them holds the others at alpha 0.
    decode: what a body leaves open. tokens: of a reply where a body does not say; max_tokens: the most.
    example: a prompt such as the first expert was tuned on. longest: the ids that a base behind an API reads.
    """

    trio: Trio
    guides: tuple[Guide, ...]
    decode: Decode
    tokens: int
    max_tokens: int
    example: str = ""
    longest: int | None = None

    @cached_property
    def steered(self) -> str:
        return "+".join(["base", *(guide.name for guide in self.guides)])

    @cached_property
    def mixtures(self) -> dict[str, Mixture]:
        """What has an engine of its own, by name. A base behind an API is the steered one at alpha 0."""
        trio = self.trio
        experts = [Mixture(expert, trio.vocabulary) for expert, _ in trio.pairs]
        alone = {guide.name: mixture for guide, mixture in zip(self.guides[1:], experts[1:], strict=True)}
        if trio.local is None:
            return {**alone, "expert": experts[0], self.steered: small(trio.pairs, trio.vocabulary, self.longest)}
        steered = Mixture(trio.base, trio.vocabulary, trio.pairs)
        return {**alone, "base": Mixture(trio.base, trio.vocabulary), "expert": experts[0], self.steered: steered}

    @cached_property
    def places(self) -> dict[str, int]:
        """Where an expert stands among the guides, by its version and by the name asked for."""
        found = {guide.reference: place for place, guide in enumerate(self.guides)}
        return found | {guide.name: place for place, guide in enumerate(self.guides)}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What is listed; `resolve` knows more."""
        alone, some = [g.name for g in self.guides], [f"base+{g.name}" for g in self.guides]
        several = [*alone, *some] if len(self.guides) > 1 else []
        return tuple(dict.fromkeys(["base", "expert", *several, self.steered]))

    def resolve(self, model: str) -> tuple[str, tuple[int, ...]]:
        """The mixture that a model's name means, and the places of the experts that steer it."""
        first, *others = model.split("+")
        places = tuple(self.places[name] for name in others if name in self.places)
        if first == "base" and others and len(set(places)) == len(others):
            return self.steered, places
        if model in self.mixtures:
            return model, ()
        if model == "base":
            return self.steered, ()
        if model in self.places:
            place = self.places[model]
            return (self.guides[place].name if place else "expert"), ()
        hint = did_you_mean(model, self.names)
        raise Refused(404, f"no model {model!r} is served; {hint}", "model", "model_not_found")

    @property
    def tokenizer(self) -> Any:
        return self.trio.tokenizers["base"]

    def mixture(self, model: str) -> Mixture:
        return self.mixtures[self.resolve(model)[0]]

    def roles(self, engine: str) -> list[str]:
        """Who reads a prompt, the one whose tokens are counted first."""
        own = [term.role for term in self.mixtures[engine].terms]
        return ["base", *own] if self.trio.local is None and engine == self.steered else own

    def card(self, model: str, created: int) -> dict[str, Any]:
        engine, places = self.resolve(model)
        steers = [self.guides[place] for place in places]
        return {
            "id": model,
            "object": "model",
            "created": created,
            "owned_by": "proxytune",
            "max_model_len": self.mixtures[engine].longest,
            "max_tokens": self.max_tokens,
            "steering": [{"expert": g.name, "version": g.reference, "alpha": g.alpha} for g in steers],
            "example": self.example,
            "logprobs": self.trio.local is not None,  # a base behind an API does not tell them
        }

    def alphas(self, body: Completion | Chat) -> tuple[float, ...]:
        """One alpha for each expert that is served, as asked for; none where the model is not steered."""
        engine, places = self.resolve(body.model)
        if not places:
            if body.alpha is not None or body.steering is not None:
                raise Refused(400, f"{body.model} is not steered; ask for {self.steered}", "alpha")
            return self._spread(()) if engine == self.steered else ()
        if body.steering is not None:
            given = body.steering
            return self._named(given if isinstance(given, dict) else {pull.expert: pull.alpha for pull in given})
        own = [self.guides[place].alpha for place in places]
        if isinstance(body.alpha, list):
            if len(body.alpha) != len(own):
                what = f"alpha has {len(body.alpha)} numbers, and {body.model} takes {len(own)}: one for each expert"
                raise Refused(400, what, "alpha")
            own = body.alpha
        elif body.alpha is not None:
            own[0] = body.alpha
        return self._spread(zip(places, own, strict=True))

    def _named(self, given: dict[str, float]) -> tuple[float, ...]:
        for name in given:
            if name not in self.places:
                hint = did_you_mean(name, [guide.name for guide in self.guides])
                raise Refused(400, f"no expert {name!r} is served; {hint}", "steering")
        return self._spread((self.places[name], alpha) for name, alpha in given.items())

    def _spread(self, given: Iterable[tuple[int, float]]) -> tuple[float, ...]:
        """Alphas in their places, 0 in the others."""
        by_place = dict(given)
        return tuple(by_place.get(place, 0.0) for place in range(len(self.guides)))

    def requests(self, body: Completion | Chat) -> list[Request]:
        """One for each choice of each prompt, in their order. Raises Refused where the body asks for too much."""
        alphas, how, count = self.alphas(body), self._sampling(body), body.n or 1
        tokens = body.max_tokens or self.tokens
        if tokens > self.max_tokens:
            raise Refused(400, f"{tokens} tokens are more than the {self.max_tokens} of this server", "max_tokens")
        least = self.decode.min_new_tokens if body.min_tokens is None else body.min_tokens
        limits = Limits(tokens, self.trio.end_ids, body.stops, least)
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

    def _encode(self, model: str, prompt: Any) -> dict[str, list[int]]:
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            ids = self._given_ids(model, prompt)
        else:
            ids = self.trio.encode(prompt, self.roles(self.resolve(model)[0]))
        mixture = self.mixture(model)
        used, longest = max(len(ids[term.role]) for term in mixture.terms), mixture.longest
        if longest is not None and used >= longest:
            what = f"a prompt has {used} tokens and the models read {longest}, the reply's included; shorten the prompt"
            raise Refused(400, what, "prompt", "context_length_exceeded")
        return ids

    def _given_ids(self, model: str, prompt: Sequence[Any]) -> dict[str, list[int]]:
        """Ids are read as they stand by every model, so none of them may want a chat format around the prompt."""
        roles = self.roles(self.resolve(model)[0])
        if any(self.trio.formats[role] == "chat" for role in roles):
            raise Refused(400, "the expert reads prompts in its chat format, so give text, not token ids", "prompt")
        foreign = next((i for i in prompt if i not in self.trio.vocabulary), None)
        if foreign is not None:
            raise Refused(400, f"token id {foreign} is not one that all models know", "prompt")
        return {role: list(prompt) for role in roles}
