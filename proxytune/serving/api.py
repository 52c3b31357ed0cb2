"""The routes: OpenAI's, the page's and the operator's."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxytune.errors import ProxytuneError
from proxytune.serving import guard, metrics
from proxytune.serving.document import document, told
from proxytune.serving.loop import Loop
from proxytune.serving.metrics import Metrics
from proxytune.serving.protocol import Chat, Completion, Refused, Tokenize
from proxytune.serving.served import Served
from proxytune.serving.writing import Server, refusal

PAGE = Path(__file__).parent / "page"
FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
HEALTH = "/health"
POLICY = "default-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Gate:
    """Before any route: the key is looked at, and answers are counted."""

    def __init__(self, app: ASGIApp, key: str | None, metrics: Metrics):
        self.app, self.key, self.metrics = app, key, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self.metrics.requests[route, message["status"]] += 1
            await send(message)

        try:
            if scope["path"] != HEALTH:  # asked by what has no key, and tells nothing
                guard.check(Headers(scope=scope), self.key)
        except Refused as error:
            return await refused(error)(scope, receive, counted)
        await self.app(scope, receive, counted)


def app(served: Served, loop: Loop, *, key: str | None, max_body: int) -> FastAPI:
    """The application; its end ends the loop."""
    server = Server(served, loop, max_body, Metrics(), int(time.time()))

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        yield
        await asyncio.to_thread(loop.close)

    api = FastAPI(title="proxytune", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    api.state.name, api.state.loop = served.steered, loop
    routes(api, server)
    api.add_middleware(Gate, key=key, metrics=server.metrics)

    @api.exception_handler(HTTPException)
    async def unknown(http: Request, error: HTTPException) -> Response:
        answer = refused(Refused(error.status_code, f"{http.method} {http.url.path}: {error.detail}"))
        answer.headers.update(error.headers or {})
        return answer

    @api.exception_handler(Refused)
    async def refuse(http: Request, error: Refused) -> Response:
        return refused(error)

    @api.exception_handler(ClientDisconnect)
    async def gone(http: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @api.exception_handler(ProxytuneError)
    @api.exception_handler(Exception)
    async def failed(http: Request, error: Exception) -> Response:
        return refused(refusal(error))

    return api


def refused(error: Refused) -> JSONResponse:
    headers = {401: {"WWW-Authenticate": 'Basic realm="proxytune"'}, 429: {"Retry-After": "1"}}
    return JSONResponse(error.body(), error.status, headers.get(error.status))


def routes(api: FastAPI, server: Server) -> None:
    writes = (400, 404, 413, 415, 429, 499, 500, 503)

    @api.get("/v1/models", **told("Models"))
    async def models():
        return {"object": "list", "data": [server.served.card(name, server.created) for name in server.served.names]}

    @api.get("/v1/models/{model}", **told("Model", 404))
    async def model(model: str):
        return server.served.card(model, server.created)

    @api.post("/v1/completions", **told("Reply", *writes, takes=Completion, streams=True))
    async def completions(http: Request):
        return await server.generate(http, Completion)

    @api.post("/v1/chat/completions", **told("Reply", *writes, takes=Chat, streams=True))
    async def chat(http: Request):
        return await server.generate(http, Chat)

    @api.post("/tokenize", **told("Tokens", 400, 404, 413, 415, 499, takes=Tokenize))
    async def tokenize(http: Request):
        body = await server.body(http, Tokenize)
        ids = (await asyncio.to_thread(server.served.trio.encode, body.text, ["base"]))["base"]
        longest = server.served.mixture(body.model or "base").longest
        return {"count": len(ids), "max_model_len": longest, "tokens": ids}

    @api.get(HEALTH, **told("Health", 503))
    async def health():
        if not server.loop.alive:
            raise Refused(503, "the engine has stopped", code="engine_stopped")
        return {"status": "ok"}

    @api.get("/metrics", response_class=Response, **told())
    async def told_metrics():
        return Response(server.metrics.text(server.loop), media_type=metrics.CONTENT_TYPE)

    @api.get("/openapi.json", include_in_schema=False)
    async def described():
        return document(api)

    for path, name in FILES.items():
        api.get(path, include_in_schema=False)(page_file(name))


def page_file(name: str):
    async def file():
        return FileResponse(PAGE / name, headers=HEADERS)

    return file
