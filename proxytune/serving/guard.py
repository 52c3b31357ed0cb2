"""Who may ask, and how much: the key, the host, the size of a body. Before any route is looked at."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from fastapi import Request

from proxytune.errors import SettingsError
from proxytune.serving.protocol import Refused

KEY_VARIABLE = "PROXYTUNE_API_KEY"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def key_of(environment: Mapping[str, str], host: str) -> str | None:
    """The key that guards a server on this host. Raises SettingsError where others could reach it and there is none."""
    key = environment.get(KEY_VARIABLE, "").strip() or None
    if key is None and not is_loopback(host):
        raise SettingsError(
            f"host={host} can be reached by others, and there is no key",
            f"set the environment variable {KEY_VARIABLE}, or leave host at 127.0.0.1",
        )
    return key


def check(headers: Mapping[str, str], key: str | None) -> None:
    """Refuse a request without the key, which comes as a bearer token or, from a browser, as a Basic password.

    Without a key only this machine asks, and only by a name of its own: a page elsewhere whose name was pointed here
    is refused.
    """
    if key is None:
        if not is_loopback(_name(headers.get("host", ""))):
            raise Refused(403, "ask by the name 127.0.0.1 or localhost, or set a key", code="host_not_allowed")
    elif not hmac.compare_digest(_given(headers.get("authorization", "")), key.encode()):
        raise Refused(401, "the key is missing or not the one of this server", code="invalid_api_key")


def _name(host: str) -> str:
    """The name in a Host header, without a port; of a header that is none, nothing."""
    try:
        return urlsplit("//" + host).hostname or ""
    except ValueError:  # a bracket that is left open
        return ""


def _given(authorization: str) -> bytes:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.encode("latin-1").strip()  # a header's bytes, as they came
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


async def read(request: Request, most: int) -> bytes:
    """The body of a request. Raises Refused for one that is too large, or that a form of another site could send."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "send the body as Content-Type: application/json")
    declared = request.headers.get("content-length", "")
    size, data = int(declared) if declared.isdigit() else 0, bytearray()
    if size <= most:
        async for chunk in request.stream():
            data += chunk
            if (size := len(data)) > most:
                break
    if size > most:
        raise Refused(413, f"the body is larger than the {most} bytes of this server")
    return bytes(data)
