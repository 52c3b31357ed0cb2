"""A generation from its body to its answer, whole or as a stream; whoever leaves frees the places."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from proxytune.decoding.request import Request as Asked
from proxytune.errors import ModelError, ProxytuneError
from proxytune.serving import guard
from proxytune.serving.answers import Envelope, Writer
from proxytune.serving.loop import Busy, Closed, Job, Loop, Update
from proxytune.serving.metrics import Metrics
from proxytune.serving.protocol import Refused, parse
from proxytune.serving.served import Served

Gains = AsyncGenerator[tuple[int, Update], None]  # by the place of a choice


@dataclass(frozen=True)
class Server:
    """What the routes share. max_body: bytes."""

    served: Served
    loop: Loop
    max_body: int
    metrics: Metrics
    created: int

    async def body(self, http: Request, kind):
        return parse(kind, await guard.read(http, self.max_body))

    async def generate(self, http: Request, kind) -> Response:
        """Answer a completion or a chat, whole or as a stream."""
        began = time.perf_counter()
        body = await self.body(http, kind)
        engine, _ = self.served.resolve(body.model)
        role, count = self.served.roles(engine)[0], body.n or 1
        if (choices := len(body.prompts) * count) > (most := self.loop.capacity[engine]):
            raise Refused(400, f"{choices} choices are more than this server takes at once, which is {most}", "n")
        requests = await asyncio.to_thread(self.served.requests, body)
        envelope = Envelope(body, sum(len(r.prompts[role]) for r in requests[::count]), self.steering(requests[0]))
        writers = [Writer(body, request, self.served.tokenizer, i) for i, request in enumerate(requests)]
        gains = self.follow(http, engine, requests, bool(body.stream))
        counted = self.count(gains, engine, envelope, began)
        first = await anext(counted, None)  # what cannot be written at all is told by the status
        if body.stream:
            events = stream(first, counted, envelope, writers)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        ended = dict([first] if first else [])
        async with contextlib.aclosing(counted):
            async for place, update in counted:
                ended[place] = update
        if len(ended) < len(writers):
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(envelope.whole([writer.choice(ended[writer.index], delta=False) for writer in writers]))

    def steering(self, request: Asked) -> list[dict[str, Any]]:
        guides = self.served.guides if request.alphas else ()
        return [
            {"expert": guide.reference, "alpha": alpha} for guide, alpha in zip(guides, request.alphas, strict=True)
        ]

    async def count(self, gains: Gains, model: str, envelope: Envelope, began: float) -> Gains:
        """Pass the gains on, and count them; what was refused before its first token is no generation."""
        try:
            async for place, update in gains:
                envelope.count(update)
                yield place, update
        finally:
            await gains.aclose()
            if envelope.completion_tokens:
                self.metrics.prompt_tokens[model] += envelope.prompt_tokens
                self.metrics.completion_tokens[model] += envelope.completion_tokens
                self.metrics.seconds[model] += time.perf_counter() - began
                self.metrics.generations[model] += 1

    async def follow(self, http: Request, model: str, requests: Sequence[Asked], streams: bool) -> Gains:
        """Have replies written and yield what each gains, until all have ended or the reader has gone.

        Whatever ends this early frees the places. Raises Refused for a reply that cannot be written.
        """
        events = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[int, Update] | None] = asyncio.Queue()

        def job(place: int, request: Asked) -> Job:
            def deliver(update: Update) -> None:
                with contextlib.suppress(RuntimeError):  # the server's event loop has ended
                    events.call_soon_threadsafe(queue.put_nowait, (place, update))

            return Job(model, request, deliver, streams)

        jobs = [job(place, request) for place, request in enumerate(requests)]
        try:
            self.loop.submit(jobs)
        except Busy:
            raise Refused(429, "too many requests wait; try again in a moment", code="queue_full") from None
        except Closed:
            raise shutting_down() from None
        gone = asyncio.create_task(disconnected(http))
        gone.add_done_callback(lambda _: queue.put_nowait(None))
        left = len(jobs)
        try:
            while left and (gain := await queue.get()):
                if gain[1].error is not None:
                    raise refusal(gain[1].error)
                left -= gain[1].last
                yield gain
        finally:
            gone.cancel()
            self.loop.cancel([job for job in jobs if not job.ended])


async def disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def shutting_down() -> Refused:
    return Refused(503, "the server is shutting down", code="shutting_down")


def refusal(error: Exception) -> Refused:
    """What a client is told of an error; of a bug no more than that it is one."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Closed):
        return shutting_down()
    if isinstance(error, ProxytuneError):
        return Refused(500 if isinstance(error, ModelError) else 400, str(error))
    return Refused(500, f"the server failed: {type(error).__name__}")


async def stream(
    first: tuple[int, Update] | None, gains: Gains, envelope: Envelope, writers: Sequence[Writer]
) -> AsyncIterator[bytes]:
    """Server-sent events: a chunk for each gain, one with the usage where asked for, and [DONE]."""
    try:
        if first:
            yield chunk(envelope, writers, *first)
        async for place, update in gains:
            yield chunk(envelope, writers, place, update)
        options = envelope.body.stream_options
        if options and options.include_usage:
            yield event(envelope.chunk([], {"usage": envelope.usage, **envelope.certificate}))
        yield b"data: [DONE]\n\n"
    except Refused as error:
        yield event(error.body())
    finally:
        await gains.aclose()


def chunk(envelope: Envelope, writers: Sequence[Writer], place: int, update: Update) -> bytes:
    told = envelope.certificate if update.last else None  # of all choices so far
    return event(envelope.chunk([writers[place].choice(update, delta=True)], told))


def event(value: Any) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n".encode()
