"""The Python surface: load a steered base, generate, stream.

import proxytune

steered = proxytune.load("code@best", base="meta-llama/Llama-3.1-70B")
print(steered.generate("def area(radius):", alpha=0.6).text)
for piece in steered.stream("def area(radius):"): print(piece, end="")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from proxytune.decoding.engine import Engine
from proxytune.decoding.mixture import Mixture
from proxytune.decoding.request import Limits, Reply, Request
from proxytune.decoding.streaming import Pieces
from proxytune.experts.registry import Registry
from proxytune.models import trio as trios
from proxytune.models.prompts import Turns
from proxytune.models.trio import Trio
from proxytune.settings import Family, ModelRef
from proxytune.stages.trio import files_of
from proxytune.steering.choice import Sampling
from proxytune.steering.variants import EQUATION, Variant


def load(
    expert: str | Sequence[str],
    base: str | ModelRef | None = None,
    *,
    alpha: float | Sequence[float] | None = None,
    outputs: str | Path = "outputs",
    dtype: str = "auto",
    batch_size: int = 64,
    drafter: str = "expert",
) -> Steered:
    """A base steered by one registered expert, or by several.

    base: a model on the hub or in a folder; None takes the base of the family that the expert was made for. alpha: one
    number for each expert; None takes what a sweep left with the expert, else 1. Raises ProxytuneError in one line
    where expert, anti and base do not belong together.
    """
    registry = Registry(Path(outputs) / "registry")
    names = [expert] if isinstance(expert, str) else list(expert)
    experts = [registry.resolve(name) for name in names]
    for found in experts:
        registry.verify(found)
    if base is None:
        base = Family(**experts[0].manifest.config["family"]).base_ref
    trio = trios.load(ModelRef(model=base) if isinstance(base, str) else base, [files_of(e) for e in experts], dtype)
    if alpha is None:
        alphas = tuple(1.0 if e.manifest.alpha is None else e.manifest.alpha for e in experts)
    else:
        alphas = (float(alpha),) if isinstance(alpha, (int, float)) else tuple(map(float, alpha))
    return Steered(trio, alphas, batch_size, drafter)


@dataclass(frozen=True)
class Steered:
    """A loaded trio with its alphas. `mixture` is what the engine and `ProxyTuningLogitsProcessor` take."""

    trio: Trio
    alphas: tuple[float, ...]
    batch_size: int = 64
    drafter: str = "expert"

    @property
    def mixture(self) -> Mixture:
        return Mixture(self.trio.base, self.trio.vocabulary, self.trio.pairs)

    @property
    def tokenizer(self):
        return self.trio.tokenizers["base"]

    @overload
    def generate(self, prompts: str, **how) -> Reply: ...
    @overload
    def generate(self, prompts: Sequence[Turns], **how) -> list[Reply]: ...
    def generate(self, prompts, **how):
        """The reply to a prompt, or the replies to a list of prompts (texts, or lists of messages) in their order.

        how: max_new_tokens, min_new_tokens, stop (a list of texts), alpha, and the fields of `Sampling` (temperature,
        top_k, top_p, min_p, repetition_penalty, seed). The i-th prompt has the seed seed + i.
        """
        if isinstance(prompts, str):
            return self.generate([prompts], **how)[0]
        requests = [self.request(prompt, place, **how) for place, prompt in enumerate(prompts)]
        replies = dict(self.engine().run(requests))
        return [replies[i] for i in range(len(requests))]

    def stream(self, prompt: Turns, **how) -> Iterator[str]:
        """The text of one reply, piece by piece."""
        request, engine = self.request(prompt, **how), self.engine()
        pieces = Pieces(request.limits, self.tokenizer)
        engine.submit(request)
        while engine.busy:
            for _, reply in engine.step():
                if piece := pieces.next(reply):
                    yield piece

    def request(
        self,
        prompt: Turns,
        place: int = 0,
        *,
        alpha: float | Sequence[float] | None = None,
        max_new_tokens: int = 256,
        min_new_tokens: int = 0,
        stop: Sequence[str] = (),
        variant: Variant = EQUATION,
        **sampling,
    ) -> Request:
        alphas = self.alphas if alpha is None else (alpha,) if isinstance(alpha, (int, float)) else tuple(alpha)
        chosen = Sampling(**sampling)
        limits = Limits(max_new_tokens, self.trio.end_ids, tuple(stop), min_new_tokens)
        return Request(self.trio.encode(prompt), limits, alphas, replace(chosen, seed=chosen.seed + place), variant)

    def engine(self) -> Engine:
        """An engine of its own, for requests that come and go."""
        return Engine(self.mixture, self.tokenizer, batch_size=self.batch_size, drafter=self.drafter)
