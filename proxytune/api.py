"""The Python surface: load a steered base, generate, stream.

import proxytune

steered = proxytune.load("code@best", base="meta-llama/Llama-3.1-70B")
print(steered.generate("def area(radius):", alpha=0.6).text)
for piece in steered.stream("def area(radius):"): print(piece, end="")

A base behind an API is named by the settings of conf/base: base={"name": "vllm", "url": "http://...", "model": "..."}.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, overload

from proxytune.decoding.background import Background
from proxytune.decoding.engine import Engine
from proxytune.decoding.mixture import Mixture
from proxytune.decoding.remote import RemoteEngine
from proxytune.decoding.request import Limits, Reply, Request, finished
from proxytune.decoding.served import Served, reach
from proxytune.decoding.streaming import Pieces
from proxytune.experts.registry import Registry
from proxytune.models import trio as trios
from proxytune.models.prompts import Turns
from proxytune.models.trio import Trio
from proxytune.settings import Family, ModelRef, Remote
from proxytune.settings import load as validated
from proxytune.stages.shared.trio import files_of
from proxytune.steering.choice import Sampling
from proxytune.steering.variants import EQUATION, Variant

T = TypeVar("T")


def load(
    expert: str | Sequence[str],
    base: str | ModelRef | Remote | Mapping[str, Any] | None = None,
    *,
    base_model: str | ModelRef | None = None,
    alpha: float | Sequence[float] | None = None,
    outputs: str | Path = "outputs",
    dtype: str = "auto",
    batch_size: int = 64,
    drafter: str = "expert",
) -> Steered:
    """A base steered by one registered expert, or by several.

    base: a model on the hub or in a folder; None takes the base of the family that the expert was made for. A server
    that has it is given as `Remote` or as a dict of its fields, and is tried here; base_model then names the model that
    it serves, for its tokenizer (None: the family's). alpha: one number for each expert; None takes what a sweep left
    with the expert, else 1. Raises ProxytuneError in one line where expert, anti and base do not belong together, or a
    server does not do what it should.
    """
    registry = Registry(Path(outputs) / "registry")
    names = [expert] if isinstance(expert, str) else list(expert)
    experts = [registry.resolve(name) for name in names]
    for found in experts:
        registry.verify(found)
    remote = None
    if isinstance(base, (Remote, Mapping)):
        remote, base = validated(Remote, dict(base)), base_model
    if base is None:
        base = Family(**experts[0].manifest.config["family"]).base_ref
    ref = ModelRef(model=base) if isinstance(base, str) else base
    trio = trios.load(ref, [files_of(e) for e in experts], dtype, served=remote is not None)
    served = _apart(lambda: reach(remote, trio.tokenizers["base"], trio.vocabulary.size)) if remote else None
    if alpha is None:
        alphas = tuple(1.0 if e.manifest.alpha is None else e.manifest.alpha for e in experts)
    else:
        alphas = (float(alpha),) if isinstance(alpha, (int, float)) else tuple(map(float, alpha))
    return Steered(trio, alphas, batch_size, drafter, served)


@dataclass(frozen=True)
class Steered:
    """A loaded trio with its alphas. `mixture` is what the engine and `ProxyTuningLogitsProcessor` take.

    served: the server that has the base, if one has. Replies then are `CertifiedReply`, and budgets last as long as
    this object.
    """

    trio: Trio
    alphas: tuple[float, ...]
    batch_size: int = 64
    drafter: str = "expert"
    served: Served | None = None

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
        replies = dict(self.finished(prompts, **how))
        return [replies[place] for place in range(len(prompts))]

    def finished(self, prompts: Sequence[Turns], **how) -> Iterator[tuple[int, Reply]]:
        """(place of the prompt, its reply) as replies finish, so that a fault on the way costs only what is not."""
        engine = self._writer()
        places = {engine.submit(self.request(prompt, place, **how)): place for place, prompt in enumerate(prompts)}
        for written in _rounds(engine):
            yield from finished(written, places, None)

    def stream(self, prompt: Turns, **how) -> Iterator[str]:
        """The text of one reply, piece by piece."""
        request, engine = self.request(prompt, **how), self._writer()
        pieces = Pieces(request.limits, self.tokenizer)
        engine.submit(request)
        for written in _rounds(engine):
            for _, reply in written:
                if reply.error:
                    raise reply.error
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
        """An engine of its own, for requests that come and go; SettingsError with a base behind an API."""
        return Engine(self.mixture, self.tokenizer, batch_size=self.batch_size, drafter=self.drafter)

    def _writer(self) -> Engine | RemoteEngine:
        if self.served is None:
            return self.engine()
        return self.served.engine(self.trio.pairs, self.trio.vocabulary, self.tokenizer)


def _rounds(engine: Engine | RemoteEngine) -> Iterator[Sequence[tuple[int, Reply]]]:
    """What each round wrote, until all is written."""
    if isinstance(engine, Engine):
        while engine.busy:
            yield engine.step()
        return
    with Background() as background:
        background.wait(engine.base.__aenter__())
        try:
            while engine.busy:
                yield background.wait(engine.step())
        finally:
            background.wait(engine.base.__aexit__())


def _apart(work: Callable[[], T]) -> T:
    """Do what needs an event loop of its own: in a thread where one runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()
