"""An engine whose base is behind an API, for callers without an event loop, and for those that must not wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

from proxytune.decoding.engine import Rows
from proxytune.decoding.remote import CertifiedReply, Counts, RemoteEngine
from proxytune.decoding.request import Request

T = TypeVar("T")


class Background:
    """An event loop in a thread of its own: a server's connections live there. Use as `with`, or `close` it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = Thread(target=self._run, name="proxytune-requests", daemon=True)
        self.thread.start()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """What it comes to; who is interrupted waits no longer, and it ends."""
        begun = self.start(work)
        try:
            return begun.result()
        except BaseException:
            begun.cancel()
            raise

    def do(self, work: Callable[..., T], *given: Any) -> T:
        """Call a function there, where no other does anything meanwhile."""

        async def call() -> T:
            return work(*given)

        return self.wait(call())

    def close(self) -> None:
        """End whatever still runs there."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:  # which cancels what is left
            runner.get_loop().run_forever()


class Away:
    """A RemoteEngine whose rounds run in the background, one at a time.

    wake: is called, on another thread, when a round has ended; the next `step` tells what it brought.
    """

    def __init__(self, engine: RemoteEngine, background: Background):
        self.engine, self.background = engine, background
        self.wake: Callable[[], None] = lambda: None
        self.tokenizer, self.batch_size = engine.tokenizer, engine.batch_size
        self.round: Future[list[tuple[int, CertifiedReply]]] | None = None

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return self.round.done() if self.round else self.engine.busy

    @property
    def rows(self) -> Rows:
        return self.engine.rows

    @property
    def stats(self) -> Counts:
        return self.engine.counts

    def submit(self, request: Request) -> int:
        return self.background.do(self.engine.submit, request)

    def cancel(self, handle: int) -> None:
        self.background.do(self.engine.cancel, handle)

    def step(self) -> list[tuple[int, CertifiedReply]]:
        """What the round that has ended brought; the next begins."""
        ended, self.round = self.round, None
        found = ended.result() if ended else []
        if self.engine.busy:
            self.round = self.background.start(self._round())
            self.round.add_done_callback(lambda _: self.wake())
        return found

    async def _round(self) -> list[tuple[int, CertifiedReply]]:
        if not self.engine.base.users:
            await self.engine.base.__aenter__()
        return await self.engine.step()

    def close(self) -> None:
        """End the round that runs; nothing more is asked of the server."""
        self.background.close()
