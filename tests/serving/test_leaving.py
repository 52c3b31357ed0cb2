"""Clients that leave, or read nothing of what they asked for: their places are free within a second."""

from __future__ import annotations

import json
import logging
import socket
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx2
import pytest

from proxytune.settings import Decode
from tests.serving.conftest import metric, running, until

LONG = {"model": "base", "prompt": "x", "max_tokens": 1900, "min_tokens": 1900}


@pytest.fixture(scope="module")
def narrow(house):
    """A server that writes one reply at a time."""
    with running(house.settings(decode=Decode(batch_size=1), steering=[])) as found:
        found.client().completions.create(model="base", prompt="x", max_tokens=2)  # the first is slow
        yield found


@contextmanager
def asked(server, body: dict, path: str = "/v1/completions"):
    """A connection that has asked, and takes in little more than it is read."""
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    link.connect(("127.0.0.1", urlsplit(server.url).port))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    link.sendall(f"{head}\r\n\r\n".encode() + data)
    with link:
        yield link


def rows(server) -> int:
    return len(server.app.state.loop.engines["base"].rows.each)


def free(server) -> bool:
    return server.app.state.loop.open["base"] == 0


def test_a_client_that_leaves_frees_its_place_within_a_second(narrow):
    written = 'proxytune_engine_tokens_total{model="base"}'
    before, said = (metric(narrow.url, name) for name in ("proxytune_cancelled_total", written))
    for more in ({"stream": True}, {}, {"stream": True, "logprobs": 20}):
        with asked(narrow, LONG | more):
            until(lambda: rows(narrow) == 1)
        until(lambda: free(narrow), 1)
    assert metric(narrow.url, "proxytune_cancelled_total") == before + 3
    assert metric(narrow.url, written) - said < 3 * 1900


def test_a_client_that_leaves_while_it_sends_its_body_is_no_failure(narrow, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
    with socket.create_connection(("127.0.0.1", urlsplit(narrow.url).port)) as link:
        head = "POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 99"
        link.sendall(f"{head}\r\n\r\n{{".encode())
    until(lambda: 'route="/tokenize"' in httpx2.get(f"{narrow.url}/metrics", timeout=60).text)
    assert metric(narrow.url, 'proxytune_requests_total{route="/tokenize",status="499"}') == 1
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_client_that_leaves_while_it_waits_frees_its_place_in_the_queue(narrow):
    with asked(narrow, LONG | {"stream": True}):
        until(lambda: rows(narrow) == 1)
        with asked(narrow, LONG):
            until(lambda: narrow.app.state.loop.open["base"] == 2)
        until(lambda: narrow.app.state.loop.open["base"] == 1, 1)
    until(lambda: free(narrow), 1)


def test_one_who_reads_nothing_holds_no_place_and_no_other_reader(narrow):
    """The reply is written to its end and kept for the reader; the place is free for the next."""
    with asked(narrow, LONG | {"max_tokens": 300, "min_tokens": 300, "logprobs": 20, "stream": True}) as link:
        until(lambda: rows(narrow) == 1)
        answer = narrow.client().completions.create(model="base", prompt="x", max_tokens=3)
        assert answer.usage.completion_tokens == 3 and free(narrow)
        found = b""
        while b"[DONE]" not in found:
            found += (piece := link.recv(65536))
            assert piece
    assert found.count(b'"object": "text_completion"') == 300


def test_one_who_stops_reading_and_leaves_frees_its_place_within_a_second(narrow):
    with asked(narrow, LONG | {"logprobs": 20, "stream": True}) as link:
        link.recv(1000)
        time.sleep(1)  # until the server's own buffers are full
    until(lambda: free(narrow), 1)
    assert rows(narrow) == 0
