"""The loop: every model reads its own prompt, the scores are combined, one token is chosen for all of them.

There is one loop. Plain decoding is the loop with no drafted tokens, a sweep over alpha is the loop with one row for
each alpha, and a server is the loop that is given requests while it runs. What a row says does not depend on the rows
beside it, on when it came, or on the drafts.

Rows live side by side in the models' caches, the busy ones in front. A finished row is replaced by the last one, and
requests that wait take the free places, so no row waits for the longest.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proxytune.decoding import drafting
from proxytune.decoding.drafting import Clock, Drafter, Planner, Stats
from proxytune.decoding.mixture import Mixture, Term, no_number
from proxytune.decoding.request import Reply, Request, finished, fitted
from proxytune.decoding.round import Round
from proxytune.errors import ModelError
from proxytune.settings import Decode
from proxytune.steering.choice import Choice
from proxytune.steering.variants import Variants


@dataclass
class Row:
    """A request in progress; its limits keep it within the models' contexts (`fitted`)."""

    handle: int
    request: Request
    reply: Reply

    @property
    def left(self) -> int:
        """The tokens that it may still say."""
        return self.request.limits.max_new_tokens - len(self.reply.token_ids)


class Rows:
    """The rows that are being written, their streams, and what a round needs of them as tensors."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture
        self.device = mixture.base.source.device
        self.streams = [group[0].source.open(1, 256, tuple(term.member for term in group)) for group in mixture.groups]
        self.each: list[Row] = []
        self.stale = True  # whether rows came or went since the tensors were made

    def admit(self, new: Sequence[Row], budget: int) -> None:
        """Read the prompts of new rows, each distinct prompt once, at most `budget` ids in a forward."""
        self.stale = True
        alike: dict[tuple, list[Row]] = defaultdict(list)
        for row in new:
            alike[tuple(tuple(row.request.prompts[term.role]) for term in self.mixture.terms)].append(row)
        first, distinct = len(self.each), [rows[0] for rows in alike.values()]
        self._fill(distinct, first, budget)
        self.each += distinct
        for place, rows in enumerate(alike.values(), first):
            for row in rows[1:]:
                for stream in self.streams:
                    stream.copy(place, len(self.each))
                self.each.append(row)

    def _fill(self, new: Sequence[Row], first: int, budget: int) -> None:
        """All ids of each prompt but the last, which the row's first round reads."""
        for group, stream in zip(self.mixture.groups, self.streams, strict=True):
            prompts = [[list(row.request.prompts[term.role])[:-1] for term in group] for row in new]
            rows = max(1, min(len(new), budget // max(1, max(len(ids) for each in prompts for ids in each))))
            for at in range(0, len(new), rows):
                part = prompts[at : at + rows]
                longest = max(len(ids) for each in part for ids in each)
                width = max(1, budget // (len(part) * len(group)))
                for start in range(0, longest, width):
                    stop = min(start + width, longest)
                    ids = [[(ids + [0] * (stop - len(ids)))[start:stop] for ids in each] for each in part]
                    starts_NM = torch.full((len(part), len(group)), start)
                    stream.fill(torch.tensor(ids, device=self.device), starts_NM, first=first + at)

    def drop(self, row: int) -> None:
        """Free a row's place; the last row takes it."""
        self.stale = True
        last = len(self.each) - 1
        if row < last:
            for stream in self.streams:
                stream.copy(last, row)
            self.each[row] = self.each[last]
        self.each.pop()

    def _gather(self) -> None:
        """The tensors of the present rows, made anew after rows came or went."""
        self.stale = False
        each = [row.request for row in self.each]
        self.choice = Choice([request.sampling for request in each], self.device)
        self.variants = Variants([request.variant for request in each], self.device)
        self.alphas = [
            torch.tensor([[request.alphas[i]] for request in each], dtype=torch.float64, device=self.device)
            for i in range(len(self.mixture.pairs))
        ]
        self.ends = [
            torch.tensor([[len(request.prompts[term.role]) - 1 for term in group] for request in each])
            for group in self.mixture.groups
        ]
        self.banned_RV = None
        if any(request.limits.banned for request in each):
            self.banned_RV = torch.zeros(len(each), self.mixture.vocabulary.size, dtype=torch.bool, device=self.device)
            for row, request in enumerate(each):
                self.banned_RV[row, list(request.limits.banned)] = True
        self.seen_RV = None
        if any(request.sampling.repetition_penalty != 1 for request in each):
            self.seen_RV = torch.zeros(len(each), self.mixture.vocabulary.size, dtype=torch.bool, device=self.device)
            for row, ids in enumerate(self.texts()):
                known = [i for i in ids if i < self.mixture.vocabulary.size]
                self.seen_RV[row, torch.tensor(known, device=self.device)] = True

    def advance(self) -> None:
        """Where each row stands now: what it read, and the token it said last."""
        if self.stale:
            self._gather()
        counts_R1 = torch.tensor([[len(row.reply.token_ids)] for row in self.each])
        self.counts_R1 = counts_R1.to(self.device)
        self.starts = [ends_RM + counts_R1 for ends_RM in self.ends]  # on the CPU, for each group
        self.pending = [
            torch.tensor([self._pending(row, group) for row in self.each], device=self.device)
            for group in self.mixture.groups
        ]

    @property
    def furthest(self) -> int:
        """The largest position that any model reads next."""
        return max(int(starts_RM.max()) for starts_RM in self.starts)

    @staticmethod
    def _pending(row: Row, group: Sequence[Term]) -> list[int]:
        """The id that each term of a group reads next: the one said last, or the end of the term's own prompt."""
        if row.reply.token_ids:
            return [row.reply.token_ids[-1]] * len(group)
        return [row.request.prompts[term.role][-1] for term in group]

    def texts(self) -> list[list[int]]:
        """The base's prompt and the reply so far of every row."""
        role = self.mixture.base.role
        return [[*row.request.prompts[role], *row.reply.token_ids] for row in self.each]

    def forbid(self, scores_RQV: Tensor, first: int) -> Tensor:
        """No banned id, and no end id before a row's min_new_tokens."""
        if self.banned_RV is not None:
            scores_RQV = scores_RQV.masked_fill(self.banned_RV[:, None], -torch.inf)
        for i, row in enumerate(self.each):
            early = row.request.limits.min_new_tokens - len(row.reply.token_ids) - first
            if early <= 0:
                continue
            if ends := [e for e in row.request.limits.end_ids if e < scores_RQV.shape[-1]]:
                scores_RQV = scores_RQV.clone()
                scores_RQV[i, :early, ends] = -torch.inf
        return scores_RQV

    def note(self, row: int, tokens: Sequence[int]) -> None:
        if self.seen_RV is not None and tokens:
            self.seen_RV[row, torch.tensor(tokens, device=self.device)] = True

    def broken(self, row: int, position: int) -> ModelError:
        """No token can be chosen so many positions after those that the row had when the round began."""
        place = int(self.counts_R1[row]) + position
        return no_number(f"output position {place} of prompt {self.each[row].handle}")


class Queue:
    """Requests that wait for a place, and the rows that are being written, of one mixture."""

    def __init__(self, mixture: Mixture, batch_size: int, prefill_tokens: int):
        self.batch_size, self.prefill_tokens = batch_size, prefill_tokens
        self.rows, self.longest = Rows(mixture), mixture.longest
        self.waiting: deque[Row] = deque()
        self.handles = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.rows.each)

    def enqueue(self, request: Request, reply: Reply) -> int:
        """Returns the request's handle. Raises SettingsError where it cannot be answered."""
        row = Row(self.handles, fitted(request, self.rows.mixture, self.longest), reply)
        self.handles += 1
        self.waiting.append(row)
        return row.handle

    def cancel(self, handle: int) -> None:
        """End a reply now; it is not heard of again. A handle that is done or unknown is let be."""
        self.waiting = deque(row for row in self.waiting if row.handle != handle)
        for i, row in enumerate(self.rows.each):
            if row.handle == handle:
                row.reply.finish_reason = "cancelled"
                self.rows.drop(i)
                return

    def admit(self) -> None:
        """Waiting requests take the free places, as far as prefill_tokens ids of their prompts go; one always may."""
        new: list[Row] = []
        tokens = 0
        while self.waiting and len(self.rows.each) + len(new) < self.batch_size:
            prompts = self.waiting[0].request.prompts
            size = sum(len(prompts[term.role]) for term in self.rows.mixture.terms)
            known = new and prompts is new[-1].request.prompts
            if new and not known and tokens + size > self.prefill_tokens:
                break
            tokens += 0 if known else size
            new.append(self.waiting.popleft())
        if new:
            self.rows.admit(new, self.prefill_tokens)


class Engine(Queue):
    """Writes replies to requests under one mixture.

    batch_size: rows written at once. prefill_tokens: ids of prompts read in one forward, and the most that are read
    between two rounds. drafter: none, expert, pair or ngram, or one's own; draft_tokens: how many each round, None to
    let measured costs decide (0 where drafting does not pay). None of these changes a token.
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer,
        *,
        batch_size: int = 64,
        prefill_tokens: int = 8192,
        drafter: str | Drafter = "none",
        draft_tokens: int | None = None,
    ):
        super().__init__(mixture, batch_size, prefill_tokens)
        self.mixture, self.tokenizer = mixture, tokenizer
        self.stats = Stats()
        self.drafter = drafting.drafter(drafter, mixture) if isinstance(drafter, str) else drafter
        self.clock = Clock(self.stats)
        self.planner = Planner(mixture, self.drafter, self.clock, draft_tokens)

    def submit(self, request: Request) -> int:
        """Queue a request; returns its handle. Raises SettingsError where it cannot be answered."""
        return self.enqueue(request, Reply())

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Reply]]:
        """One round: waiting requests take free places, every row says at least one token.

        Returns (handle, reply so far) of every row that was written on; finish_reason tells which are done, and `error`
        those that cannot go on. The rows beside them do.
        """
        self.admit()
        if not self.rows.each:
            return []
        self.rows.advance()
        rows = len(self.rows.each)
        count = min(self.planner.next(rows), max(row.left for row in self.rows.each) - 1)
        if self.longest is not None:
            count = min(count, self.longest - self.rows.furthest - 1)
        round = Round(self.rows, self.clock)
        said, kept = round.run(self.drafter, count)
        self.planner.learn(count, kept)
        for row, told in round.logprobs(said).items():
            self.rows.each[row].reply.logprobs += told
        return self._write(said, kept, count, round.broken)

    def _write(
        self, said: list[list[int]], kept: list[int], count: int, broken: Mapping[int, int]
    ) -> list[tuple[int, Reply]]:
        stats, found, done = self.stats, [], []
        stats.rounds += 1
        stats.row_rounds += len(said)
        stats.accepted += sum(kept)
        stats.drafted += sum(min(k + 1, count) for k in kept)
        for i, (row, tokens) in enumerate(zip(self.rows.each, said, strict=True)):
            before = len(row.reply.token_ids)
            for token in tokens:
                row.reply.append(token, row.request.limits, self.tokenizer)
                if row.reply.finish_reason:
                    break
            if i in broken and not row.reply.finish_reason:
                row.reply.fail(self.rows.broken(i, broken[i]))
            if row.reply.finish_reason:
                done.append(i)
            del row.reply.logprobs[len(row.reply.token_ids) :]  # of what was said beyond the reply's end
            stats.tokens += len(row.reply.token_ids) - before
            self.rows.note(i, row.reply.token_ids[before:])
            found.append((row.handle, row.reply))
        for i in reversed(done):
            self.rows.drop(i)
        return found

    def run(
        self, requests: Sequence[Request], on_token: Callable[[int, Reply], None] | None = None
    ) -> Iterator[tuple[int, Reply]]:
        """Yield (index of the request, its finished reply) as replies finish.

        on_token is called with each reply as it grows, every round. Raises ModelError where one cannot go on, after
        what its round finished.
        """
        places = {self.submit(request): i for i, request in enumerate(requests)}
        while self.busy:
            yield from finished(self.step(), places, on_token)


def build(mixture: Mixture, tokenizer, decode: Decode) -> Engine:
    """The engine as the settings say."""
    return Engine(
        mixture,
        tokenizer,
        batch_size=decode.batch_size,
        prefill_tokens=decode.prefill_tokens,
        drafter=decode.drafter,
        draft_tokens=decode.draft_tokens,
    )
