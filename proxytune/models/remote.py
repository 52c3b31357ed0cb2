"""A base behind HTTP: asks a server for scores, again where that can help, within a budget.

Faults that can pass (no connection, time-outs, 408, 409, 429, 5xx but 501, an answer that broke off) are asked again
after pauses that double, with jitter, and no sooner than Retry-After says. Everything else costs one request. The key
is read from the environment when a request is sent; it is in no attribute, message or log.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from proxytune.errors import ModelError, SettingsError
from proxytune.models.dialects import Dialect
from proxytune.models.replies import BadReply, Query, Spoilt, Told
from proxytune.settings import Remote

if TYPE_CHECKING:
    import httpx2

LONGEST_PAUSE = 60.0  # seconds between two tries, unless the server asks for more
LONGEST_WAIT = 600.0  # more than this a server may not ask for
ENTRY_BYTES = 1024  # of an answer, for each score that was asked for; llama.cpp takes about 100
SPARE_BYTES = 1 << 20  # of an answer, for what is not scores, the prompt's text among it


class BudgetSpent(ModelError):
    """The next request would go beyond base.max_requests or base.max_tokens; it was not sent."""


class Unreachable(ModelError):
    """No answer, though faults that can pass were asked again: it says nothing of what the server can do."""


class Passing(ModelError):
    """A fault that another try may not meet. wait: the seconds that the server asks for."""

    def __init__(self, what: str, wait: float = 0.0):
        super().__init__(what)
        self.wait = wait


@dataclass
class Spent:
    """What was sent so far: every request, retries among them, and the tokens of prompts and replies."""

    requests: int = 0
    tokens: int = 0
    retries: int = 0


class Turns:
    """Requests of one kind at a time, any number of them."""

    def __init__(self) -> None:
        self.changed = asyncio.Condition()
        self.kind, self.count = False, 0

    @asynccontextmanager
    async def of(self, kind: bool) -> AsyncGenerator[None]:
        async with self.changed:
            await self.changed.wait_for(lambda: not self.count or self.kind == kind)
            self.kind, self.count = kind, self.count + 1
        try:
            yield
        finally:
            self.count -= 1
            if not self.count:
                async with self.changed:
                    self.changed.notify_all()


class RemoteBase:
    """Asks one server in its dialect. Use as `async with`: connections live as long as the block, in one event loop.

    first_pause: seconds before the first retry.
    """

    def __init__(self, settings: Remote, dialect: Dialect, *, first_pause: float = 0.5):
        self.settings, self.dialect, self.first_pause = settings, dialect, first_pause
        self.spent = Spent()
        self.users = 0
        self._key()

    async def __aenter__(self) -> RemoteBase:
        if not self.users:
            self.client, self.places = self._client(), asyncio.Semaphore(self.settings.in_flight)
            self.turns = Turns()
        self.users += 1
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.users -= 1
        if not self.users:
            await self.client.aclose()

    async def ask(self, query: Query) -> list[Told]:
        """What the server tells of each position of the query.

        Raises BadReply for an answer that cannot be believed, BudgetSpent before going beyond the budget, Unreachable
        where there is no answer, ModelError where it is refused.
        """
        body = self.dialect.body(query, self.settings.model)
        entries = len(query.chosen) or query.top + 2 + len(query.beside)
        entries *= len(query.ids) if query.positions > 1 else 1
        most = SPARE_BYTES + ENTRY_BYTES * entries + 64 * len(query.ids)
        for attempt in range(self.settings.retries + 1):
            async with self.turns.of(bool(query.chosen) and self.dialect.chosen_apart):
                reply = await self.send("POST", self.dialect.path, body, tokens=len(query.ids) + 1, most=most)
            try:
                return self.dialect.parse(reply, query, self.settings.model)
            except BadReply as error:
                bad = error
            if not isinstance(bad, Spoilt):
                break
            if attempt < self.settings.retries:
                self.spent.retries += 1
                await asyncio.sleep(self._pause(attempt, 0))
        raise BadReply(f"{self.settings.url}: {self._safe(bad.what)}", "nothing was made of its answer")

    async def send(self, method: str, path: str, body: Any = None, *, tokens: int = 0, most: int = SPARE_BYTES) -> Any:
        """The JSON that the server answers with; `most` bytes of it at most."""
        tries = self.settings.retries + 1
        async with self.places:
            for attempt in range(tries):
                self._spend(tokens)
                try:
                    async with asyncio.timeout(self.settings.timeout_seconds):
                        return await self._once(method, path, body, most)
                except TimeoutError:
                    fault = Passing(f"no answer within {self.settings.timeout_seconds:g} s")
                except Passing as passing:
                    fault = passing
                if fault.wait > LONGEST_WAIT:
                    what = f"{fault.what}, and asks to wait {fault.wait:.0f} s"
                    raise self._error(what, "try again later", Unreachable)
                if attempt + 1 < tries:
                    self.spent.retries += 1
                    await asyncio.sleep(self._pause(attempt, fault.wait))
        raise self._error(
            f"{fault.what}, {tries} times in a row",
            "see whether the server runs, then run again: finished work is kept",
            Unreachable,
        )

    async def _once(self, method: str, path: str, body: Any, most: int) -> Any:
        import httpx2

        try:
            async with self.client.stream(
                method, self.settings.url + path, json=body, headers=self._headers()
            ) as answer:
                data = bytearray()
                async for part in answer.aiter_raw():
                    data += part
                    if len(data) > most:
                        raise self._error(f"the answer is larger than {most} bytes", "this is no server of scores")
        except (httpx2.LocalProtocolError, httpx2.InvalidURL):
            raise self._error("the request cannot be sent as HTTP", "check base.url and the key's variable") from None
        except (httpx2.TransportError, httpx2.StreamError) as error:
            raise Passing(_kind(error)) from None
        if answer.status_code != 200:
            self._refuse(answer, bytes(data))
        try:
            return json.loads(data, parse_constant=_no_number)
        except (ValueError, RecursionError):
            raise BadReply(f"{self.settings.url} answered with something that is no JSON") from None

    def _refuse(self, answer: httpx2.Response, data: bytes) -> None:
        """Raise what a status other than 200 means."""
        code, said = answer.status_code, self._safe(_message(data))
        what = f"the server answered {code}" + (f": {said}" if said else "")
        if code in (408, 409, 429) or (code >= 500 and code != 501):
            if "insufficient_quota" in what:
                raise self._error(what, "the account's money is spent", Unreachable)
            raise Passing(what, _retry_after(answer.headers.get("retry-after")))
        if code in (401, 403):
            named = self.settings.key_variable
            hint = f"check the key in {named}" if named else "name the variable of a key: base.key_variable=NAME"
        elif code == 404:
            hint = "check base.url (without /v1) and base.model"
        elif 300 <= code < 400:
            hint = "give the address it points to as base.url: keys are not sent on"
        else:
            hint = f"check base: the dialect {self.dialect.name}, the model, the prompt's length"
        raise self._error(what, hint)

    def _spend(self, tokens: int) -> None:
        limits, spent = self.settings, self.spent
        if limits.max_requests is not None and spent.requests + 1 > limits.max_requests:
            raise BudgetSpent(
                f"the budget of base.max_requests={limits.max_requests} is spent", "finished work is kept"
            )
        if limits.max_tokens is not None and spent.tokens + tokens > limits.max_tokens:
            raise BudgetSpent(
                f"the budget of base.max_tokens={limits.max_tokens} is spent: {spent.tokens} were sent, "
                f"the next request has {tokens}",
                "finished work is kept",
            )
        spent.requests += 1
        spent.tokens += tokens

    def _pause(self, attempt: int, wait: float) -> float:
        return max(wait, min(LONGEST_PAUSE, self.first_pause * 2**attempt) * random.uniform(0.5, 1))

    def _client(self) -> httpx2.AsyncClient:
        import httpx2

        parts = urlsplit(self.settings.url)
        local = parts.hostname in ("127.0.0.1", "localhost", "::1")
        most = self.settings.in_flight
        try:
            return httpx2.AsyncClient(
                timeout=None,  # the whole of an exchange is timed, not its parts
                limits=httpx2.Limits(max_connections=most, max_keepalive_connections=most, keepalive_expiry=300),
                trust_env=not local,  # a proxy of the surroundings is not for this machine's own servers
                verify=parts.scheme == "https",  # loading certificates takes .1 s, and http has none
            )
        except (ImportError, ValueError, OSError, httpx2.InvalidURL):  # a message that may quote a proxy's password
            raise SettingsError(
                "the proxy or certificates that the environment names cannot be used (ALL_PROXY, HTTPS_PROXY, "
                "HTTP_PROXY, SSL_CERT_FILE)",
                "name an http:// proxy (SOCKS needs the package socksio), or unset them",
            ) from None

    def _headers(self) -> dict[str, str]:
        key = self._key()
        # Bodies come as they are: a small answer cannot unpack into a large one.
        return {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def _key(self) -> str | None:
        named = self.settings.key_variable
        if named is None:
            return None
        key = os.environ.get(named, "").strip()
        if not key:
            raise SettingsError(f"base.key_variable={named}, and that variable is not set", f"export {named}=...")
        if not (key.isascii() and key.isprintable()):
            raise SettingsError(f"the key in {named} has characters that no key has", "copy it again")
        return key

    def _safe(self, text: str) -> str:
        """What a server said, as one short line without the key."""
        key = self._key()
        text = text.replace(key, "***") if key else text
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]

    def _error(self, what: str, hint: str, kind: type[ModelError] = ModelError) -> ModelError:
        return kind(f"{self.settings.url}: {what}", hint)


def _kind(error: Exception) -> str:
    """What went wrong on the way, in words. The library's own message may quote what was sent."""
    import httpx2

    if isinstance(error, httpx2.ConnectError):
        return "the server cannot be reached"
    return "the answer broke off" if isinstance(error, httpx2.RemoteProtocolError) else "the connection broke off"


def _message(data: bytes) -> str:
    """The error message in a body, in whichever of the usual places."""
    text = data[:65536].decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for key in ("error", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    if isinstance(found, dict):
        return " ".join(str(found[key]) for key in ("code", "message") if found.get(key) is not None)
    return str(found)


def _retry_after(value: str | None) -> float:
    """Seconds from a Retry-After header: a number, or a date."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, OverflowError):
            return 0.0


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
