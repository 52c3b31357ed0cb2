"""The thread that runs the engines: requests come in from any thread, and what becomes of them is handed back.

Only this thread touches an engine; one whose base is behind an API runs its rounds beside it, so that no other waits
for a server. A request waits, is written and ends here; one that is cancelled frees its place before the next round. A
reply that cannot go on ends with what went wrong, and so do all requests of an engine that fails, which is made anew.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from proxytune.decoding.background import Away
from proxytune.decoding.engine import Engine
from proxytune.decoding.remote import CertifiedReply
from proxytune.decoding.request import Reply, Request, TokenLogprobs
from proxytune.decoding.streaming import Pieces
from proxytune.errors import ProxytuneError


class Busy(Exception):
    """As many requests wait as may."""


class Closed(Exception):
    """The server is shutting down."""


@dataclass(frozen=True)
class Update:
    """What a reply gained: final text, and its new ids with their log-probabilities where asked for.

    certified, calls: of the new ids, with a base behind an API, those that are certified, and the questions that they
    took. finish_reason as in `Reply`; error ends a reply that could not be written.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    certified: int | None = None
    calls: int = 0
    finish_reason: str | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False)
class Job:
    """A request of one engine. `deliver` is called on the loop's thread: with every gain, or not streamed with all."""

    engine: str
    request: Request
    deliver: Callable[[Update], None]
    streams: bool
    handle: int | None = None
    ended: bool = False
    pieces: Pieces | None = None
    given: int = 0
    calls: int = 0

    def gain(self, reply: Reply) -> Update | None:
        """What the reply gained since the last call; None where nobody wants to know yet."""
        if not (self.streams or reply.finish_reason):
            return None
        assert self.pieces is not None
        given, self.given = self.given, len(reply.token_ids)
        new, told = tuple(reply.token_ids[given:]), tuple(reply.logprobs[given:])
        certified, calls = None, 0
        if isinstance(reply, CertifiedReply):
            certified = sum(reply.certified[given:])
            calls, self.calls = reply.calls - self.calls, reply.calls
        return Update(self.pieces.next(reply), new, told, certified, calls, reply.finish_reason)


class Loop:
    """engines: how each is made, by name. queue: how many requests may wait for a place in an engine."""

    def __init__(self, engines: Mapping[str, Callable[[], Engine | Away]], queue: int):
        self.makers = engines
        self.inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.engines = {name: self._made(name) for name in engines}
        self.capacity = {name: engine.batch_size + queue for name, engine in self.engines.items()}
        self.jobs: dict[str, dict[int, Job]] = {name: {} for name in engines}  # the thread's own
        self.open = dict.fromkeys(engines, 0)  # requests that have not ended, under the lock
        self.cancelled = 0
        self.failures = 0
        self.lock = Lock()
        self.closed = False
        self.thread = Thread(target=self._run, name="proxytune-engine", daemon=True)
        self.thread.start()

    @property
    def alive(self) -> bool:
        return self.thread.is_alive() and not self.closed

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all of these or, raising Busy or Closed, none."""
        with self.lock:
            if self.closed:
                raise Closed
            asked = {name: sum(job.engine == name for job in jobs) for name in self.engines}
            if any(count and self.open[name] + count > self.capacity[name] for name, count in asked.items()):
                raise Busy
            for name, count in asked.items():
                self.open[name] += count
        self.inbox.put(partial(self._start, jobs))  # as one, so that no round begins with some of them

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more; those that have ended are let be."""
        for job in jobs:
            self.inbox.put(partial(self._cancel, job))

    def close(self) -> None:
        """End every request that is left, and the thread."""
        with self.lock:
            self.closed = True
        self.inbox.put(None)
        self.thread.join()

    def _run(self) -> None:
        try:
            self._work()
        finally:
            with self.lock:
                self.closed = True
            for jobs in self.jobs.values():
                for job in list(jobs.values()):
                    self._end(job, Closed())
            while not self.inbox.empty():
                if message := self.inbox.get():
                    message()
            for engine in self.engines.values():
                if isinstance(engine, Away):
                    engine.close()

    def _made(self, name: str) -> Engine | Away:
        engine = self.makers[name]()
        if isinstance(engine, Away):
            engine.wake = lambda: self.inbox.put(lambda: None)
        return engine

    def _work(self) -> None:
        while True:
            busy = [name for name, engine in self.engines.items() if engine.busy]
            try:
                message = self.inbox.get(block=not busy)
            except Empty:
                for name in busy:
                    self._step(name)
                continue
            if message is None:
                return
            message()

    def _start(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            engine = self.engines[job.engine]
            try:
                if self.closed:
                    raise Closed
                job.handle = engine.submit(job.request)
            except Exception as error:
                self._end(job, error)
                continue
            job.pieces = Pieces(job.request.limits, engine.tokenizer)
            self.jobs[job.engine][job.handle] = job

    def _cancel(self, job: Job) -> None:
        if not job.ended:
            assert job.handle is not None  # its start came before, in the same queue
            self.engines[job.engine].cancel(job.handle)
            self.cancelled += 1
            self._end(job)

    def _step(self, name: str) -> None:
        jobs = self.jobs[name]
        try:
            written = self.engines[name].step()
            self._log(reply.error for _, reply in written if reply.error)
            for handle, reply in written:
                job = jobs.get(handle)
                if job is None:  # cancelled while its round ran
                    continue
                if reply.error:
                    self._end(job, reply.error)
                elif update := job.gain(reply):
                    if update.last:
                        self._end(job)
                    job.deliver(update)
        except Exception as error:
            self._log([error])
            for job in list(jobs.values()):
                self._end(job, error)
            self.engines[name] = self._made(name)

    def _log(self, errors: Iterable[Exception]) -> None:
        """Each once, however many replies of a round met it."""
        for error in {str(error): error for error in errors}.values():
            self.failures += 1
            if isinstance(error, ProxytuneError):
                print(f"proxytune: {error}", file=sys.stderr, flush=True)
            else:
                traceback.print_exception(error)

    def _end(self, job: Job, error: Exception | None = None) -> None:
        """Count a request as done; with an error, tell its owner."""
        job.ended = True
        if job.handle is not None:
            self.jobs[job.engine].pop(job.handle, None)
        with self.lock:
            self.open[job.engine] -= 1
        if error is not None:
            job.deliver(Update(error=error))
