"""The loop with the base behind an API: expert and anti here in full, the base's best scores over HTTP, a certificate.

Every token is chosen from intervals that hold the steered scores (see steering/candidates). Where the certificate
fails, the tokens in its way are asked for by id, or a longer list; what is still open then is said as far as it is
known, and marked. A certified token is the one that the loop with a local base says.

The anti stands in for the base while drafting, so the caches, the drafts and the rules of choice are the loop's own.
Where the server gives prompt scores one call verifies a whole draft. A round asks for all its rows at once and reads
the last position of the small models meanwhile (before, where their scores say which ids to ask for as well); it lasts
as long as its slowest call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from proxytune.decoding.drafting import Chain, Clock, Stats
from proxytune.decoding.engine import Queue, Row
from proxytune.decoding.mixture import Mixture
from proxytune.decoding.pushed import Pusher
from proxytune.decoding.request import Reply, Request, finished
from proxytune.decoding.round import Round
from proxytune.decoding.verdicts import Verdicts, likely, own, prefix
from proxytune.errors import ModelError, SettingsError
from proxytune.models.probe import Abilities
from proxytune.models.remote import RemoteBase
from proxytune.models.replies import Query, Told
from proxytune.models.source import Term
from proxytune.models.vocabulary import Vocabulary

BESIDE = 64  # ids asked for beside the best ones at each position, where tokens are sampled and a server tells both


@dataclass
class CertifiedReply(Reply):
    """A reply that tells of each token whether it is certified, and how many calls it took."""

    certified: list[bool] = field(default_factory=list)
    calls: int = 0
    inexact: bool = False  # the base was only pushed (decoding/pushed.py)


@dataclass
class Counts:
    """What the loop did so far; calls are questions to the server, retries aside."""

    rounds: int = 0
    tokens: int = 0
    certified: int = 0
    calls: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def certified_share(self) -> float | None:
        return self.certified / self.tokens if self.tokens else None

    @property
    def calls_per_token(self) -> float | None:
        return self.calls / self.tokens if self.tokens else None

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that held, of those that were looked at."""
        return self.accepted / self.drafted if self.drafted else None


def small(pairs: Sequence[tuple[Term, Term]], vocabulary: Vocabulary, longest: int | None = None) -> Mixture:
    """What is here of a trio whose base is behind an API, and reads `longest` ids; the anti stands in for the base."""
    return Mixture(pairs[0][1], vocabulary, tuple(pairs), longest)


class RemoteEngine(Queue):
    """Writes replies with a base that only a server has. Alpha 0 for every pair is the base alone.

    abilities: what the probe found. batch_size: rows written at once, None for as many as calls may be in flight.
    """

    def __init__(
        self,
        base: RemoteBase,
        abilities: Abilities,
        pairs: Sequence[tuple[Term, Term]],
        vocabulary: Vocabulary,
        tokenizer,
        *,
        batch_size: int | None = None,
        prefill_tokens: int = 8192,
    ):
        assert pairs, "a remote base is steered by at least one pair"
        self.base, self.abilities, self.tokenizer = base, abilities, tokenizer
        self.small = small(pairs, vocabulary, abilities.longest)
        super().__init__(self.small, batch_size or base.settings.in_flight, prefill_tokens)
        self.drafter, self.clock = Chain(self.small.terms, self.small.pairs), Clock(Stats())
        self.top = min(base.settings.top, abilities.top)
        self.drafts = base.settings.draft_tokens if abilities.prompt_scores else 0
        self.beside = min(BESIDE, abilities.chosen // (self.drafts + 1)) if abilities.chosen_inside else 0
        self.counts = Counts()
        self.tasks: dict[int, asyncio.Task[None]] = {}  # of the round that runs, by the handles of its rows
        self.leaving: set[int] = set()  # rows of that round that were cancelled
        self.pusher = Pusher(base, tokenizer, vocabulary.size) if base.settings.mode == "bias" else None

    def submit(self, request: Request) -> int:
        """Queue a request; returns its handle. Raises SettingsError where it cannot be answered."""
        if request.sampling.repetition_penalty != 1:
            raise SettingsError(
                f"decode.repetition_penalty={request.sampling.repetition_penalty:g} needs raw scores, "
                "and a server gives log-probabilities",
                "leave it at 1 with a base behind an API",
            )
        if request.variant.base_top_p != 1 or request.variant.alpha_by != "constant":
            raise SettingsError(
                "decode.base_top_p and decode.alpha_by need the base's scores for the whole vocabulary",
                "leave them out with a base behind an API",
            )
        if request.logprobs:
            raise SettingsError(
                "log-probabilities of a reply need the base's scores for the whole vocabulary",
                "do not ask for them with a base behind an API",
            )
        if self.pusher and (request.sampling.top_k or request.sampling.min_p):
            raise SettingsError(
                "base.mode=bias leaves sampling to the server, which has no top_k or min_p", "leave them out"
            )
        return self.enqueue(request, CertifiedReply(inexact=self.pusher is not None))

    def run(
        self, requests: Sequence[Request], on_token: Callable[[int, Reply], None] | None = None
    ) -> Iterator[tuple[int, CertifiedReply]]:
        """Yield (index of the request, its finished reply) as replies finish; `stream` for callers without a loop."""
        stream = self.stream(requests, on_token)

        async def following() -> tuple[int, CertifiedReply] | None:
            return await anext(stream, None)

        with asyncio.Runner() as runner:
            try:
                while (found := runner.run(following())) is not None:
                    yield found
            finally:
                runner.run(_close(stream))

    async def stream(
        self, requests: Sequence[Request], on_token: Callable[[int, Reply], None] | None = None
    ) -> AsyncIterator[tuple[int, CertifiedReply]]:
        """Like `Engine.run`. When the server fails for good or the budget is spent, what is done is yielded first."""
        places = {self.submit(request): i for i, request in enumerate(requests)}
        async with self.base:
            while self.busy:
                for done in finished(await self.step(), places, on_token):
                    yield done

    def cancel(self, handle: int) -> None:
        """As `Queue.cancel`; for a reply of the round that runs no more is asked, and it is gone when that ends."""
        if handle in self.tasks:
            self.leaving.add(handle)
            self.tasks[handle].cancel()
        else:
            super().cancel(handle)

    async def step(self) -> list[tuple[int, CertifiedReply]]:
        """One round: every row says at least one token, or ends with an error of its own.

        Returns (handle, reply so far) of all that were not cancelled.
        """
        with torch.inference_mode():
            self.admit()
        if not self.rows.each:
            return []
        self.rows.advance()
        self.counts.rounds += 1
        left = max(row.left for row in self.rows.each)
        if self.longest is not None:
            left = min(left, self.longest - self.rows.furthest)
        round = Round(self.rows, self.clock)
        self._draft(round, min(self.drafts, left - 1))
        try:
            outcomes = await self._advance(round)
        finally:
            self.tasks.clear()
        found = []
        for i, (row, outcome) in reversed([*enumerate(zip(self.rows.each, outcomes, strict=True))]):
            if row.handle in self.leaving:
                row.reply.finish_reason = "cancelled"
            else:
                found.append((row.handle, _certified(row)))
                if isinstance(outcome, Exception):
                    row.reply.fail(outcome)
            if row.reply.finish_reason:
                self.rows.drop(i)
        self.leaving.clear()
        return found[::-1]

    async def _advance(self, round: Round) -> list[BaseException | None]:
        """Ask and write for every row at once, while the small models read their last position."""
        positions = 1 if self.pusher else round.drafted_RK.shape[1] + 1

        @torch.inference_mode()
        def read() -> None:
            round.extend(self.small.terms, positions)

        reading = asyncio.ensure_future(asyncio.to_thread(read))
        for i, row in enumerate(self.rows.each):
            self.tasks[row.handle] = asyncio.create_task(self._say(round, i, row, reading))
        try:
            return await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        finally:
            await asyncio.wait([reading])  # whoever is left early reads no more than this

    @torch.inference_mode()
    def _draft(self, round: Round, count: int) -> None:
        if count > 0:
            self.drafter.propose(round, count)

    async def _say(self, round: Round, i: int, row: Row, reading: asyncio.Future[None]) -> None:
        """Write what a round brings a row, once the small models have been read."""
        if self.pusher:  # their scores tell how to push the server, which chooses by itself
            await asyncio.shield(reading)
            self._count(row)
            token = await self.pusher.next(round, i, prefix(round, i, 0))
            _certified(row).certified.append(False)
            row.reply.append(token, row.request.limits, self.tokenizer)
            self.counts.tokens += 1
            return
        if self.beside:  # which ids to ask for is known only then
            await asyncio.shield(reading)
        positions = round.drafted_RK.shape[1] + 1
        ids, each = prefix(round, i, positions - 1), likely(round, i, positions, self.beside)
        beside = tuple(dict.fromkeys(k for ids in each for k in ids))
        told = await self._call(row, Query(ids, self.top, positions=positions, beside=beside))
        await asyncio.shield(reading)
        await self._write(round, i, [own(one, ids) for one, ids in zip(told, each, strict=True)])

    def _count(self, row: Row) -> None:
        self.counts.calls += 1
        _certified(row).calls += 1

    async def _call(self, row: Row, query: Query) -> list[Told]:
        self._count(row)
        return await self.base.ask(query)

    async def _write(self, round: Round, i: int, told: list[Told]) -> None:
        """Say tokens while the draft holds, up to the first that does not."""
        row = self.rows.each[i]
        reply, counts = _certified(row), self.counts
        verdicts = Verdicts(round, i, self.base.dialect.unbounded, self.abilities, self.top, told)
        for position in range(len(told)):
            decision = verdicts.decide(position)
            while not decision.certified_B and (question := verdicts.question(position)):
                question.learn(await self._call(row, question.query))
                decision = verdicts.decide(position)
            certified, token = bool(decision.certified_B), int(decision.tokens_B)
            if not certified and self.base.settings.require_certified:
                raise self._refusal(row, len(reply.token_ids))
            reply.certified.append(certified)
            reply.append(token, row.request.limits, self.tokenizer)
            counts.tokens += 1
            counts.certified += certified
            held = position < len(verdicts.drafted) and token == verdicts.drafted[position]
            counts.drafted += position < len(verdicts.drafted)
            counts.accepted += held
            if reply.finish_reason or not held:
                break

    def _refusal(self, row: Row, position: int) -> ModelError:
        return ModelError(
            f"the token at output position {position} of prompt {row.handle} is not certified, and "
            "base.require_certified=true",
            "raise base.top, or take marked tokens: base.require_certified=false",
        )


def _certified(row: Row) -> CertifiedReply:
    assert isinstance(row.reply, CertifiedReply)
    return row.reply


async def _close(stream) -> None:
    await stream.aclose()
