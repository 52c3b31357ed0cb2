"""Faults of servers: those that another try may not meet, and those that no try can mend."""

from __future__ import annotations

import copy
import gzip
import json
import socket
import struct
import time
from email.utils import formatdate
from typing import Any

from tests.remote.server import Fault, Handler

PATIENCE, LONG = 2.5, 5.0  # seconds: enough for an honest answer on a busy machine, and of a slow fault


def hangs_up(handler: Handler, reply: dict[str, Any]) -> None:
    handler.close_connection = True


def resets(handler: Handler, reply: dict[str, Any]) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def raw(data: bytes) -> Fault:
    def act(handler: Handler, reply: dict[str, Any]) -> None:
        handler.wfile.write(data)
        handler.close_connection = True

    return act


def half_a_body(handler: Handler, reply: dict[str, Any]) -> None:
    data = json.dumps(reply).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.close_connection = True


def is_silent(handler: Handler, reply: dict[str, Any]) -> None:
    time.sleep(LONG)
    handler.close_connection = True


def drips(handler: Handler, reply: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(60):
        handler.wfile.write(b" ")
        time.sleep(LONG / 60)
    handler.close_connection = True


def status(code: int, value: Any = None, **headers: str) -> Fault:
    return lambda handler, reply: handler.reply(code, value or {"error": {"message": "told so"}}, **headers)


def body(data: bytes, **headers: str) -> Fault:
    return lambda handler, reply: handler.send(200, data, **headers)


def edited(change) -> Fault:
    def act(handler: Handler, reply: dict[str, Any]) -> None:
        reply = copy.deepcopy(reply)
        changed = change(reply)
        handler.send(200, json.dumps(reply if changed is None else changed).encode())

    return act


def pairs(reply: dict[str, Any]) -> list[list[Any]]:
    """The [token, score] pairs of an answer's last position, whatever its dialect."""
    if "meta_info" in reply:
        return [[entry[1], entry[0]] for entry in reply["meta_info"]["output_top_logprobs"][0]]
    if "completion_probabilities" in reply:
        return [[e["id"], e["logprob"]] for e in reply["completion_probabilities"][0]["top_logprobs"]]
    return [list(item) for item in reply["choices"][0]["logprobs"]["top_logprobs"][0].items()]


def put(reply: dict[str, Any], pairs: list[list[Any]]) -> None:
    if "meta_info" in reply:
        reply["meta_info"]["output_top_logprobs"][0] = [[score, token, None] for token, score in pairs]
    elif "completion_probabilities" in reply:
        entries = [{"id": token, "token": "", "bytes": [], "logprob": score} for token, score in pairs]
        reply["completion_probabilities"][0]["top_logprobs"] = entries
    else:
        listed = reply["choices"][0]["logprobs"]
        listed["top_logprobs"][0] = dict(pairs)
        listed["token_logprobs"] = [dict(pairs).get(listed["tokens"][0], listed["token_logprobs"][0])]


def scores(change) -> Fault:
    """A fault in the best scores; change gets and gives [token, score] pairs."""
    return edited(lambda reply: put(reply, change(pairs(reply))))


def first_score(value: Any) -> Fault:
    return scores(lambda found: [[found[0][0], value], *found[1:]])


def packed(handler: Handler, reply: dict[str, Any]) -> None:
    handler.send(200, gzip.compress(json.dumps(reply).encode()), Content_Encoding="gzip")


def no_count(reply: dict[str, Any]) -> None:
    for key in ("usage", "tokens_evaluated", "meta_info"):
        reply.pop(key, None)


def longer_prompt(reply: dict[str, Any]) -> None:
    for place, key in (("usage", "prompt_tokens"), ("meta_info", "prompt_tokens")):
        if place in reply:
            reply[place][key] += 1
    if "tokens_evaluated" in reply:
        reply["tokens_evaluated"] += 1


CUT_CHUNKS = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"id"\r\n'

PASSING: dict[str, Fault] = {
    "hangs up": hangs_up,
    "resets": resets,
    "half a status line": raw(b"HTTP/1.1 2"),
    "no HTTP": raw(b"SSH-2.0-OpenSSH\r\n\r\n"),
    "headers only": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"),
    "half a body": half_a_body,
    "cut chunks": raw(CUT_CHUNKS),
    "408": status(408),
    "409": status(409),
    "429": status(429),
    "429, asks to wait": status(429, Retry_After="0"),
    "429, asks for nonsense": status(429, Retry_After="soon"),
    "429, asks for no date": status(429, Retry_After="1 Jan 2020 00:00 +99999999999999999999"),
    "500": status(500),
    "502 with HTML": lambda handler, reply: handler.send(502, b"<html>Bad Gateway</html>"),
    "503 until a date": lambda handler, reply: handler.reply(503, {}, Retry_After=formatdate(time.time(), usegmt=True)),
    "504": status(504),
    "529": status(529),
}

SLOW: dict[str, Fault] = {"is silent": is_silent, "drips": drips}

LASTING: dict[str, Fault] = {
    "204": lambda handler, reply: handler.send(204, b""),
    "301": status(301, Location="http://127.0.0.1:9/"),
    "400": status(400),
    "401": status(401),
    "403": status(403),
    "404": status(404),
    "413": status(413),
    "422": status(422),
    "429, no money": status(429, {"error": {"message": "pay", "code": "insufficient_quota"}}),
    "501": status(501),
    "503 until next year": status(503, Retry_After="9999999"),
    "nothing": body(b""),
    "HTML": body(b"<html>Welcome</html>"),
    "half a JSON": lambda handler, reply: handler.send(200, json.dumps(reply).encode()[:-20]),
    "no text": body(b"\xff\xfe\x00{"),
    "null": body(b"null"),
    "a list": body(b"[]"),
    "an empty object": body(b"{}"),
    "an error with 200": body(b'{"error": {"message": "overloaded"}}'),
    "deep nesting": body(b"[" * 100_000),
    "a huge number": body(b'{"usage": ' + b"9" * 5000 + b"}"),
    "packed": packed,
    "endless": body(b" " * 3_000_000),
    "null for a score": first_score(None),
    "text for a score": first_score("-0.1"),
    "NaN": first_score(float("nan")),
    "Infinity": first_score(float("inf")),
    "minus Infinity": first_score(float("-inf")),
    "positive scores": scores(lambda found: [[token, -score] for token, score in found]),
    "probabilities": scores(lambda found: [[token, 0.5 / n] for n, (token, _) in enumerate(found, 1)]),
    "too much probability": scores(lambda found: [[token, -0.1] for token, _ in found]),
    "too few scores": scores(lambda found: found[:-2]),
    "too many scores": scores(lambda found: [*found, *([type(found[0][0])(9990 + n), -50.0 - n] for n in range(2))]),
    "no scores": scores(lambda found: []),
    "a longer prompt": edited(longer_prompt),
    "no count of the prompt": edited(no_count),
}
