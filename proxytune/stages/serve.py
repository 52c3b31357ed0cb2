"""A trio behind the OpenAI API until it is told to end."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from proxytune.decoding.background import Away, Background
from proxytune.decoding.engine import Engine, build
from proxytune.decoding.served import Served as There
from proxytune.errors import SettingsError, require
from proxytune.experts.registry import Expert
from proxytune.models.prompts import text_of
from proxytune.models.trio import Trio
from proxytune.settings import Serve
from proxytune.stages.shared import trio as trios
from proxytune.stages.shared.served import reach
from proxytune.stages.shared.start import start
from proxytune.tasks import catalog, sources

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

# Clients keep an idle connection for less (httpx and OpenAI's for 5 s, aiohttp for 15), so they close it. If the server
# did, a request could meet the end of its connection.
IDLE_SECONDS = 75


def run(settings: Serve) -> None:
    """Serve until SIGTERM or Ctrl-C; replies under way are finished first, for at most `drain_seconds`.

    What cannot be is told before a model is loaded: a missing library, a host without a key, a port that is taken.
    """
    for library in ("fastapi", "uvicorn"):
        require(library, by="proxytune serve", install="'proxytune[serve]'")
    from proxytune.serving import guard

    key = guard.key_of(os.environ, settings.host)
    with listening(settings.host, settings.port) as listener:
        expert = trios.find(settings)
        with start(settings, "serve", alpha=trios.alpha_of(settings, expert)) as tracked:
            tracked.use(expert.reference, "model", {"folder": str(expert.folder)})
            app = assemble(settings, expert, key)
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"proxytune: serving {app.state.name} at http://{shown}:{port}", file=sys.stderr, flush=True)
            answer(app, listener, settings.drain_seconds)


def assemble(settings: Serve, expert: Expert, key: str | None = None) -> FastAPI:
    """The application: models loaded, engines running."""
    from proxytune.serving import api
    from proxytune.serving.loop import Loop
    from proxytune.serving.served import Guide, Served

    names = [settings.expert, *(steer.expert for steer in settings.steering[1:])]
    beside = trios.held(settings)
    experts = [(expert, trios.alpha_of(settings, expert)), *beside]
    trio = trios.load(settings, expert, beside)
    there = None if settings.base is None else behind(settings, trio)
    served = Served(
        trio=trio,
        guides=tuple(Guide(name, e.reference, a) for name, (e, a) in zip(names, experts, strict=True)),
        decode=settings.decode,
        tokens=min(settings.max_tokens, trios.limits(settings, catalog.get(settings.task.name)).max_new_tokens),
        max_tokens=settings.max_tokens,
        example=example(settings, expert),
        longest=there.probe.abilities.longest if there else None,
    )
    engines: dict[str, Callable[[], Engine | Away]] = {
        name: partial(build, mixture, served.tokenizer, settings.decode) for name, mixture in served.mixtures.items()
    }
    if there:
        background, size = Background(), settings.decode.prefill_tokens
        engines[served.steered] = lambda: Away(
            there.engine(trio.pairs, trio.vocabulary, served.tokenizer, size), background
        )
    return api.app(served, Loop(engines, settings.queue), key=key, max_body=settings.max_body_bytes)


def behind(settings: Serve, trio: Trio) -> There:
    """The server that has the base, tried once."""
    if settings.base is not None and settings.base.mode == "bias":
        raise SettingsError(
            "serve takes no base.mode=bias: its answers could not be told from exact ones", "leave it out"
        )
    return reach(settings, trio)


def example(settings: Serve, expert: Expert) -> str:
    """A prompt that the expert was not tuned on; none where its task's rows are not built in."""
    source = settings.family.data if settings.data.source == "auto" else settings.data.source
    if source != "builtin" or expert.manifest.task not in catalog.TASKS:
        return ""
    task, cache = catalog.get(expert.manifest.task), settings.outputs / "cache"
    return text_of(sources.load(settings.data, task, settings.family, cache).rows["validation"][0]["prompt"])


def server_of(app: FastAPI, drain_seconds: float) -> uvicorn.Server:
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # a line for each request is what /metrics is for, and a query could hold a key
        server_header=False,
        lifespan="on",
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=math.ceil(drain_seconds) + 5,  # for connections that read nothing
    )
    return uvicorn.Server(config)


def answer(app: FastAPI, listener: socket.socket, drain_seconds: float) -> None:
    """Run the application on a socket. A second Ctrl-C does not wait."""
    server = server_of(app, drain_seconds)

    async def serve() -> None:
        ending = asyncio.create_task(end())
        await server.serve(sockets=[listener])
        ending.cancel()

    async def end() -> None:
        while not server.should_exit:
            await asyncio.sleep(0.1)
        await asyncio.sleep(drain_seconds)
        await asyncio.to_thread(app.state.loop.close)  # tells those who still wait

    # uvicorn raises the signal that ended it once more, and an end that was asked for is no failure
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        asyncio.run(serve())
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def listening(host: str, port: int) -> Generator[socket.socket]:
    """A socket at host and port; port 0 takes a free one."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # the address is told once
        what = f"cannot listen at {host} port {port}: {reason}"
        raise SettingsError(what, "give another port, or port=0 for any that is free") from error
    with listener:
        yield listener
