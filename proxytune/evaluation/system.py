"""What is asked and measured: a mixture of models, and how a question is put to each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxytune.decoding.mixture import Mixture
from proxytune.errors import DataError
from proxytune.evaluation.benchmarks.benchmark import Prompt
from proxytune.models import prompts
from proxytune.models.prompts import Format, Turns
from proxytune.models.trio import Trio


@dataclass(frozen=True)
class System:
    """A mixture by the name it has in tables. tokenizers, formats: by role; `tokenizer` reads and writes replies."""

    name: str
    mixture: Mixture
    tokenizer: Any
    tokenizers: Mapping[str, Any]
    formats: Mapping[str, Format]
    end_ids: frozenset[int]
    end_id: int | None

    @property
    def roles(self) -> list[str]:
        return [term.role for term in self.mixture.terms]

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


def of_trio(trio: Trio, mixtures: Mapping[str, Mixture]) -> Sequence[System]:
    """The systems that are made of a trio's models."""
    own = (trio.tokenizers["base"], trio.tokenizers, trio.formats, trio.end_ids, trio.end_id)
    return [System(name, mixture, *own) for name, mixture in mixtures.items()]
