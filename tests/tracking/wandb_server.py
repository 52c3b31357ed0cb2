"""The little of the W&B server's protocol that a run, its upload and its lineage need, on a free loopback port."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "c0ffee5eed" * 4


class Server(ThreadingHTTPServer):
    """`runs` maps the id of every run that arrived to its files' lines; `operations` lists what was asked for.

    broken: operations that are refused. failing: those that are answered 500. silent: those that are never answered
    ("*": nothing is). status, raw: what everything is answered with, where they are given.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.runs: dict[str, list[str]] = {}
        self.operations: list[tuple[str, dict[str, Any]]] = []
        self.artifacts: set[str] = set()
        self.broken: set[str] = set()
        self.failing: set[str] = set()
        self.silent: set[str] = set()
        self.over = threading.Event()
        self.status: int | None = None
        self.raw = b""
        self.links: list[socket.socket] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def shutdown(self) -> None:
        self.over.set()
        super().shutdown()

    def get_request(self) -> tuple[socket.socket, Any]:
        link, address = super().get_request()
        self.links.append(link)
        return link, address

    def vanish(self) -> None:
        """For those too that are connected, whose threads would go on answering."""
        self.shutdown()
        self.server_close()
        for link in self.links:
            with contextlib.suppress(OSError):  # closed since
                link.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news."""

    def named(self, operation: str) -> list[dict[str, Any]]:
        return [variables for name, variables in self.operations if name == operation]

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        self.operations.append((operation, variables))
        if operation in ("Viewer", "GetViewer"):
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if operation == "UpsertBucket":
            self.runs.setdefault(variables["name"], [])
            project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": variables["name"], "displayName": "", "config": "{}", "historyLineCount": 0}
            return {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}}
        if operation == "CreateArtifact":
            self.artifacts.add(variables["input"]["artifactCollectionName"])
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "a"}}}
            return {"createArtifact": {"artifact": artifact}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if operation == "GetDefaultEntity":
            return {"viewer": {"id": "u", "entity": "me"}}
        if operation == "Run" and variables["name"] in self.runs:
            run = {"id": "b", "name": variables["name"], "projectId": "1", "state": "finished", "config": "{}"}
            return {"project": {"run": {**run, "user": {}, "tags": [], "systemMetrics": "{}", "summaryMetrics": "{}"}}}
        if operation == "ArtifactMembershipByName":
            known = variables["name"].partition(":")[0] in self.artifacts
            return {"project": {"artifactCollectionMembership": _membership(variables) if known else None}}
        if operation == "ArtifactByID":
            asked = {"name": variables["id"], "project": "tests", "entity": "me"}
            return {"artifact": _membership(asked)["artifact"]}
        if operation == "UseArtifact":
            return {"useArtifact": {"artifact": {"id": variables["artifactID"]}}}
        return {"project": None}


def _membership(asked: dict[str, Any]) -> dict[str, Any]:
    """The artifact `name:alias`; its id is that very name, so that a use of it can be recognised."""
    project = {"id": "p", "internalId": "p", "name": asked["project"], "entity": {"name": asked["entity"]}}
    collection = {"name": asked["name"].partition(":")[0], "project": project}
    artifact = {
        "id": asked["name"],
        "artifactSequence": {"__typename": "ArtifactSequence", **collection},
        "versionIndex": 0,
        "artifactType": {"name": "dataset"},
        "description": None,
        "metadata": "{}",
        "ttlDurationSeconds": 0,
        "ttlIsInherited": False,
        "tags": [],
        "historyStep": None,
        "state": "COMMITTED",
        "size": 1,
        "digest": "d",
        "commitHash": None,
        "fileCount": 1,
        "createdAt": "2026-01-01T00:00:00",
        "updatedAt": None,
    }
    collection = {"__typename": "ArtifactSequence", **collection}
    membership = {"id": "m", "versionIndex": 0, "createdAt": "2026-01-01T00:00:00", "aliases": []}
    return {**membership, "artifactCollection": collection, "artifact": artifact}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "*" in self.server.silent:
            self.server.over.wait()
        if self.server.raw:
            self.close_connection = True
            self.wfile.write(self.server.raw)
            return
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self._reply(*((self.server.status, {}) if self.server.status else self._handle(body)))

    do_GET = do_PUT = do_POST

    def _handle(self, body: bytes) -> tuple[int, dict[str, Any]]:
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            operation = re.search(r"\b(?:query|mutation)\s+(\w+)", asked["query"])[1]
            if operation in self.server.silent:
                self.server.over.wait()
            if operation in self.server.failing:
                return 500, {}
            if operation in self.server.broken:
                return 400, {"errors": [{"message": "broken on purpose"}]}
            return 200, {"data": self.server.answer(operation, asked.get("variables") or {})}
        if stream := re.match(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            files = json.loads(body).get("files") or {}
            history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
            lines, first = self.server.runs[stream[1]], history["offset"]
            lines[first : first + len(history["content"])] = history["content"]  # sent again, they are the same lines
        return 200, {}

    def _reply(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""
