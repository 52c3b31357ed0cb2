"""What is asked and measured: a mixture of models, and how a question is put to each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxytune.decoding.engine import Engine, build
from proxytune.decoding.mixture import Mixture
from proxytune.decoding.remote import RemoteEngine, small
from proxytune.decoding.served import Served
from proxytune.errors import DataError
from proxytune.evaluation.benchmarks.benchmark import Prompt
from proxytune.models import prompts
from proxytune.models.prompts import Format, Turns
from proxytune.models.trio import Trio
from proxytune.settings import Decode


@dataclass(frozen=True)
class System:
    """A mixture by the name it has in tables. tokenizers, formats: by role; `tokenizer` reads and writes replies.

    served: the base behind an API; `mixture` then has the small models alone, and alphas of 0 are the base itself.
    """

    name: str
    mixture: Mixture
    tokenizer: Any
    tokenizers: Mapping[str, Any]
    formats: Mapping[str, Format]
    end_ids: frozenset[int]
    end_id: int | None
    served: Served | None = None

    @property
    def points(self) -> tuple[str, ...]:
        """The systems that are measured with it, by name."""
        return ("base", self.name) if self.served else (self.name,)

    @property
    def roles(self) -> list[str]:
        return [*(["base"] if self.served else []), *(term.role for term in self.mixture.terms)]

    def engine(self, decode: Decode) -> Engine | RemoteEngine:
        """What writes its replies."""
        if self.served is None:
            return build(self.mixture, self.tokenizer, decode)
        pairs, vocabulary = self.mixture.pairs, self.mixture.vocabulary
        return self.served.engine(pairs, vocabulary, self.tokenizer, decode.prefill_tokens, decode.batch_size)

    def alphas(self, name: str, alpha: float | None, beside: Sequence[float]) -> tuple[float, ...]:
        """One alpha for each pair, for the point of that name: its own, then those of the experts beside the first."""
        if name == "base":
            return (0.0,) * len(self.mixture.pairs)
        return (alpha or 0.0, *beside) if self.mixture.pairs else ()

    def encode(self, prompt: Turns | Prompt) -> dict[str, list[int]]:
        """The ids that each role reads of a prompt."""
        return {role: self._encode(prompt, self.tokenizers[role], self.formats[role]) for role in self.roles}

    def _encode(self, prompt: Turns | Prompt, tokenizer, format: Format) -> list[int]:
        if not isinstance(prompt, Prompt):
            return prompts.encode(prompt, tokenizer, format)
        if format == "plain":
            return prompts.encode(prompt.plain, tokenizer, format)
        opening = tokenizer(prompt.opening, add_special_tokens=False).input_ids if prompt.opening else []
        return prompts.encode(prompt.turns, tokenizer, format) + opening

    def encode_completion(self, prompt: Turns, completion: Turns, *, ended: bool = True) -> list[int]:
        """The ids of a given reply, with the token that ends it where it is `ended`. DataError for foreign tokens."""
        ids = prompts.encode_completion(prompt, completion, self.tokenizer, self.end_id if ended else None)
        foreign = next((i for i in ids if i not in self.mixture.vocabulary), None)
        if foreign is not None:
            token = self.tokenizer.convert_ids_to_tokens(foreign)
            raise DataError(
                f"a reply has the token {token!r}, which not all models of the trio know, so it cannot be scored",
                "leave such rows out",
            )
        return ids


def of_trio(trio: Trio, mixtures: Mapping[str, Mixture], served: Served | None = None) -> Sequence[System]:
    """The systems that are made of a trio's models; with a base behind an API one that is base and steered both."""
    own = (trio.tokenizers["base"], trio.tokenizers, trio.formats, trio.end_ids, trio.end_id)
    found = [System(name, mixture, *own) for name, mixture in mixtures.items()]
    if served is None:
        return found
    steered = small(trio.pairs, trio.vocabulary, served.probe.abilities.longest)
    return [*found, System("steered", steered, *own, served)]
