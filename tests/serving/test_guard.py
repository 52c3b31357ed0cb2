"""The key, the host and the sizes: what is refused before any work is done, and that no key is ever told."""

from __future__ import annotations

import base64
import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import openai
import pytest
from starlette.datastructures import Headers

from proxytune.errors import SettingsError
from proxytune.serving import guard
from proxytune.serving.api import FILES
from proxytune.serving.protocol import Refused
from proxytune.stages import serve
from proxytune.stages.shared import trio as trios
from tests.serving.conftest import STEERED, House, running

KEY = "canary-5f3a9c1e"
ROUTES = [*FILES, "/openapi.json", "/metrics", "/v1/models", "/v1/models/base", "/nowhere"]
POSTS = ["/v1/completions", "/v1/chat/completions", "/tokenize"]


@pytest.fixture(scope="module")
def keyed(house):
    with running(house.settings(max_body_bytes=5000, steering=[]), KEY) as found:
        yield found


def test_a_key_guards_every_route_but_health(keyed):
    paths = {route.path.replace("{model}", "base") for route in keyed.app.routes}
    assert paths == {*ROUTES[:-1], *POSTS, "/health"}
    asked = [("GET", route) for route in ROUTES] + [("POST", route) for route in POSTS]
    with httpx2.Client(base_url=keyed.url, timeout=60) as http:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}, {"Authorization": KEY}):
            for method, route in asked:
                answer = http.request(method, route, headers=given)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", route
        assert http.get("/health").json() == {"status": "ok"}
        for route in ROUTES[:-1]:
            assert http.get(route, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_the_client_s_key_and_a_browser_s_password_are_the_key(keyed):
    assert keyed.client(KEY).completions.create(model="base", prompt="x", max_tokens=1).choices
    with pytest.raises(openai.AuthenticationError):
        keyed.client("wrong").models.list()
    password = base64.b64encode(f"anyone:{KEY}".encode()).decode()
    assert httpx2.get(keyed.url, headers={"Authorization": f"Basic {password}"}, timeout=60).status_code == 200
    for wrong in ("Basic x", "Basic " + base64.b64encode(b"anyone:").decode(), "Basic \u00fc"):
        asked = httpx2.get(keyed.url, headers={"Authorization": wrong.encode("latin-1")}, timeout=60)
        assert asked.status_code == 401 and asked.headers["www-authenticate"].startswith("Basic")


def test_a_key_may_have_any_characters():
    for key in ("sch\u00fcssel", "voil\u00e0", "\u9375"):  # the middle one ends in what is a space in Latin-1
        password = base64.b64encode(f"anyone:{key}".encode()).decode()
        for value in (f"Bearer {key}", f"Basic {password}"):
            guard.check(Headers(raw=[(b"authorization", value.encode())]), key)
        with pytest.raises(Refused):
            guard.check(Headers(raw=[(b"authorization", f"Bearer {key}x".encode())]), key)


def test_without_a_key_only_this_machine_s_own_names_are_answered(server):
    port = server.url.rpartition(":")[2]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "127.0.0.1"):
        assert httpx2.get(f"{server.url}/v1/models", headers={"Host": host}, timeout=60).status_code == 200
    for host in ("rebound.example", f"127.0.0.1.example:{port}", "192.168.0.1", "", "[", "[x]", "]:80"):
        assert httpx2.get(f"{server.url}/v1/models", headers={"Host": host}, timeout=60).status_code == 403


def test_a_host_that_others_reach_needs_a_key():
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        assert guard.key_of({}, host) is None
    for host in ("0.0.0.0", "::", "10.0.0.1", "machine.example"):
        with pytest.raises(SettingsError, match="PROXYTUNE_API_KEY"):
            guard.key_of({"PROXYTUNE_API_KEY": " "}, host)
        assert guard.key_of({"PROXYTUNE_API_KEY": KEY}, host) == KEY


def test_a_body_that_is_too_large_is_413_whether_or_not_it_says_so(keyed):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    large = json.dumps({"model": "base", "prompt": "x" * 6000, "max_tokens": 1}).encode()
    for content in (large, (large[i : i + 1000] for i in range(0, len(large), 1000))):
        answer = httpx2.post(f"{keyed.url}/v1/completions", content=content, headers=headers, timeout=60)
        assert answer.status_code == 413 and "5000 bytes" in answer.json()["error"]["message"]


def test_a_body_is_json_and_says_so(server):
    def post(content, kind="application/json"):
        return httpx2.post(f"{server.url}/v1/completions", content=content, headers={"Content-Type": kind}, timeout=60)

    whole = b'{"model": "base", "prompt": "x", "max_tokens": 1}'
    assert post(whole, "application/json; charset=utf-8").status_code == 200
    assert post(whole, "text/plain").status_code == post(whole, "").status_code == 415  # what another site could send
    for broken in (b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 3000, b'{"model": NaN}'):
        answer = post(broken)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_unknown_routes_and_methods_have_openai_s_shape(server):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("GET", "/docs", 404),
        ("GET", "/redoc", 404),
    ):
        answer = httpx2.request(method, server.url + path, timeout=60)
        assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_metrics_are_prometheus_s_text(server):
    server.client().completions.create(model=STEERED, prompt="x", max_tokens=3)
    answer = httpx2.get(f"{server.url}/metrics", timeout=60)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    sample = r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.e+-]+'
    named = set()
    for line in answer.text.splitlines():
        if line.startswith("# TYPE "):
            named.add(line.split()[2])
        elif not line.startswith("# HELP "):
            assert re.fullmatch(sample, line), line
            assert re.match(r"[a-z_]+", line)[0] in named
    assert f'proxytune_completion_tokens_total{{model="{STEERED}"}}' in answer.text
    assert 'proxytune_requests_total{route="/v1/completions",status="200"}' in answer.text


def start(house: House, folder, environment, *arguments: str) -> subprocess.Popen:
    """`proxytune serve` in a process of its own; the family in a configuration folder of the user's."""
    import yaml

    (folder / "conf" / "family").mkdir(parents=True)
    (folder / "conf" / "family" / "random.yaml").write_text(yaml.safe_dump(house.family.model_dump(mode="json")))
    chosen = ["--config-dir", str(folder / "conf"), "family=random", "task=qa", "expert=qa@best", "port=0"]
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "serve", *chosen, f"outputs={house.outputs}", *arguments],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_an_idle_connection_is_not_closed_by_the_server_before_the_client(server):
    kept = openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry  # then the client closes it
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    for pause in (kept + 0.5, 0):
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b'{"status":"ok"}')
        time.sleep(pause)
    connection.close()


def test_sigterm_lets_replies_end_takes_no_more_and_no_key_is_written_anywhere(house, tmp_path):
    process = start(house, tmp_path, {guard.KEY_VARIABLE: KEY})
    said, found = [], []
    while not (said and said[-1].startswith("proxytune: serving base+qa@best at http://127.0.0.1:")):
        said.append(process.stderr.readline())
        assert said[-1], "the server ended"
    url = said[-1].split()[-1]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    httpx2.get(f"{url}/v1/models?key={KEY}", headers={"Authorization": f"Bearer {KEY}x"}, timeout=60)
    httpx2.post(f"{url}/v1/completions", headers={"Authorization": f"Bearer {KEY}"}, content=KEY, timeout=60)
    stream = client.completions.create(
        model="base+qa@best", prompt="x", max_tokens=150, stream=True, extra_body={"min_tokens": 150, "alpha": 1}
    )
    first = next(iter(stream))
    process.send_signal(signal.SIGTERM)
    reader = threading.Thread(target=lambda: found.extend(stream))
    reader.start()
    reader.join(timeout=300)
    assert first and found[-1].choices[0].finish_reason == "length"
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    written = [path for path in house.outputs.rglob("*") if path.is_file() and "runs" in path.parts]
    record = json.loads(next(path for path in written if path.name == "run.json").read_text())
    assert record["stage"] == "serve" and record["status"] == "finished"
    assert KEY not in "".join(said) + out + err
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


def test_replies_that_outlast_the_drain_are_told_so(house):
    """On this process's own main thread, with a signal of its own."""
    app = serve.assemble(house.settings(steering=[]), trios.find(house.settings()))
    told, before = [], signal.getsignal(signal.SIGTERM)

    def ask(url: str) -> None:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        how = {"model": "base", "prompt": "x", "max_tokens": 2000, "extra_body": {"min_tokens": 2000}}
        stream = client.completions.create(**how, stream=True)
        next(iter(stream))
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            list(stream)
        except openai.APIError as error:
            told.append(error.message)

    with serve.listening("127.0.0.1", 0) as listener:
        asking = threading.Thread(target=ask, args=(f"http://127.0.0.1:{listener.getsockname()[1]}",))
        asking.start()
        serve.answer(app, listener, 0.1)
    asking.join(timeout=300)
    assert told == ["the server is shutting down"] and not app.state.loop.alive
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_cannot_be_served_is_one_line_before_a_model_is_loaded(house, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "assemble", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.delenv(guard.KEY_VARIABLE, raising=False)
    with pytest.raises(SettingsError, match=r"host=0\.0\.0\.0 can be reached by others"):
        serve.run(house.settings(host="0.0.0.0"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"cannot listen at 127.0.0.1 port {port}: .*in use"):
            serve.run(house.settings(port=port))
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(SettingsError, match=r"serve needs uvicorn, .*pip install 'proxytune\[serve\]'"):
        serve.run(house.settings())
