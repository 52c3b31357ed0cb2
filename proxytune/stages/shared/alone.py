"""A single model by itself, tuned or not: as a system to be measured, and as an author of replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from proxytune.decoding.mixture import Mixture
from proxytune.decoding.request import Limits, Reply, Request, sampling
from proxytune.evaluation.system import System
from proxytune.experts.registry import Expert
from proxytune.files import hash_json
from proxytune.models import prompts
from proxytune.models.linear import quicken
from proxytune.models.loading import load_model, load_tokenizer
from proxytune.models.local import LocalSource
from proxytune.models.prompts import Format, Turns
from proxytune.models.source import Term
from proxytune.settings import Decode, ModelRef
from proxytune.stages.shared.kept import Kept
from proxytune.stages.shared.room import in_smaller_batches
from proxytune.stages.shared.trio import weights_of, whole_vocabulary
from proxytune.tracking.progress import track


def load(name: str, ref: ModelRef, dtype: str, expert: Expert | None = None, *, quick: bool = False) -> System:
    """The model `ref`, or what `expert` made of it, with the format that it was tuned with.

    An untuned one reads chats by its own template where it has one. quick: large layers laid out for decoding.
    """
    own = ModelRef(model=str(expert.folder)) if expert else ref
    adapter = expert.folder if expert and expert.manifest.kind == "lora" else None
    model = load_model(ref if adapter else own, dtype, adapter=adapter)
    tokenizer, plain = load_tokenizer(own), load_tokenizer(ref)
    format: Format = expert.manifest.prompt_format if expert else "chat" if tokenizer.chat_template else "plain"
    vocabulary = whole_vocabulary(tokenizer, model)
    model = quicken(model, second_copy=False) if quick else model
    return System(
        name=name,
        mixture=Mixture(Term(LocalSource(model, vocabulary.size), name), vocabulary),
        tokenizer=tokenizer,
        tokenizers={name: tokenizer},
        formats={name: format},
        end_ids=prompts.end_ids([tokenizer, plain], [model.generation_config]),
        end_id=prompts.end_id(tokenizer if format == "chat" else None, tokenizer, vocabulary),
    )


class Author:
    """Writes replies by itself. Its model is loaded when the first one is asked for."""

    def __init__(self, ref: ModelRef, dtype: str, expert: Expert | None = None):
        self.ref, self.dtype, self.expert = ref, dtype, expert

    @cached_property
    def system(self) -> System:
        return load("alone", self.ref, self.dtype, self.expert, quick=True)

    def replies(
        self,
        asked: Sequence[Turns],
        count: int,
        decode: Decode,
        limits: Limits,
        kept: Kept,
        label: str,
        *,
        plain: bool = False,
    ) -> list[list[Reply]]:
        """`count` replies to each prompt, all under way together; none to one that leaves no room for any.

        kept: those that this model wrote to these prompts before are taken from it. plain: the prompt is a text to be
        gone on with, whatever format the model was tuned with.
        """
        system = self.system
        if plain:
            system = replace(system, formats=dict.fromkeys(system.formats, "plain"))
        limits = replace(limits, end_ids=system.end_ids)
        longest = system.mixture.longest
        requests, places = [], []
        for place, turns in enumerate(asked):
            ids = system.encode(turns)
            if longest is None or max(map(len, ids.values())) < longest:
                its = range(place * count, place * count + count)
                requests += [Request(ids, limits, (), sampling(decode, number)) for number in its]
                places += [place] * count

        writer = weights_of(self.expert) if self.expert else self.ref.model_dump()
        asking = f"{label} {hash_json([writer, asked, decode.content()])[:16]}"

        def at_most(rows: int) -> dict[int, Reply]:
            engine = system.engine(decode.at_most(rows))
            return dict(track(kept.run(asking, engine.run, requests), label, len(requests)))

        written = in_smaller_batches(at_most, decode.batch_size)
        found: list[list[Reply]] = [[] for _ in asked]
        for number, place in enumerate(places):
            found[place].append(written[number])
        return found
