"""A stand-in for the Hugging Face hub: the part of its HTTP interface that its own client uses to push and to pull.

Repositories are commits of files in memory. Large files go the way of Git LFS, the others inside the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import constants

TOKEN = "hf_stand_in"


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # in order; files by path
    messages: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], message: str) -> str:
        named = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[named] = files
        self.messages.append(message)
        return named

    def resolve(self, revision: str) -> str | None:
        if revision == "main":
            return list(self.commits)[-1]
        return self.tags.get(revision) or (revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    """`refusal`: a path's beginning and the status to answer it with. `seen`: method and path of each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.refusal: tuple[str, int] | None = None
        self.seen: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


def as_the_hub(monkeypatch, url: str, cache: Path, offline: bool = False) -> None:
    """Make a stand-in at `url` the hub of this process."""
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": True,  # the newer way of large files, whose server has no stand-in
    }.items():
        monkeypatch.setattr(constants, name, value)


_ROUTES: list[tuple[str, str, str]] = [
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/([0-9a-f]{64})", "put"),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
    ("GET", r"/api/models/([^/]+/[^/]+)/refs", "refs"),
    ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
    ("POST", r"/api/models/([^/]+/[^/]+)/tag/([^/]+)", "tag"),
    ("DELETE", r"/api/models/([^/]+/[^/]+)/tag/([^/]+)", "untag"),
    ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _route(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(size)
        path = urlsplit(self.path).path
        if path == "/":
            return self._answer(200)
        self.server.seen.append(f"{self.command} {path}")
        if self.server.refusal and path.startswith(self.server.refusal[0]):
            return self._answer(self.server.refusal[1])
        for method, pattern, name in _ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                given = [unquote(group) if group else None for group in match.groups()]
                return getattr(self, f"_{name}")(*given)
        return self._answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _route

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, value: Any = None, content: bytes | None = None, **headers: str) -> None:
        data = json.dumps(value or {}).encode() if content is None else content
        self.send_response(status)
        for key, text in ({"Content-Length": str(len(data)), "Content-Type": "application/json"} | headers).items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _may(self, write: bool, repo: Repo | None = None) -> bool:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        return known or not (write or (repo is not None and repo.private))

    def _repo(self, name: str, write: bool = False) -> Repo | None:
        """The repository, or None after a refusal was sent: a private one does not exist for strangers."""
        repo = self.server.repos.get(name)
        if repo is None or not self._may(write, repo):
            self._answer(401 if write else 404, {"error": "no"}, **{"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self._may(write=True):
            return self._answer(401)
        told = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if name in self.server.repos:
            return self._answer(409, told | {"error": "You already created this model repo"})
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.server.repos[name] = repo = Repo(private)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return self._answer(200, told)

    def _validate(self) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def _preupload(self, name: str, revision: str) -> None:
        if self._repo(name, write=True) is not None:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(self.body)["files"]
            ]
            self._answer(200, {"files": files})

    def _batch(self, name: str) -> None:
        if self._repo(name, write=True) is not None:
            objects = [
                {"oid": one["oid"], "size": one["size"]}
                | (
                    {}
                    if one["oid"] in self.server.blobs
                    else {"actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}", "header": {}}}}
                )
                for one in json.loads(self.body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._answer(400)
        self.server.blobs[oid] = self.body
        return self._answer(200)

    def _commit(self, name: str, revision: str) -> None:
        repo = self._repo(name, write=True)
        if repo is None:
            return
        files, message = dict(repo.commits[list(repo.commits)[-1]]), ""
        for line in self.body.splitlines():
            told = json.loads(line)
            value = told["value"]
            match told["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.blobs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        made = repo.commit(files, message)
        self._answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{made}", "commitOid": made, "hookOutput": ""})

    def _refs(self, name: str) -> None:
        if (repo := self._repo(name)) is not None:
            tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": at} for tag, at in repo.tags.items()]
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.resolve("main")}
            self._answer(200, {"branches": [main], "converts": [], "tags": tags})

    def _info(self, name: str, revision: str | None) -> None:
        if (repo := self._repo(name)) is None:
            return
        commit = repo.resolve(revision or "main")
        if commit is None:
            return self._answer(404, {"error": "no"}, **{"X-Error-Code": "RevisionNotFound"})
        sized = "blobs" in parse_qs(urlsplit(self.path).query)
        files = [
            {"rfilename": path} | ({"size": len(content)} if sized else {})
            for path, content in repo.commits[commit].items()
        ]
        return self._answer(200, {"id": name, "sha": commit, "private": repo.private, "tags": [], "siblings": files})

    def _tag(self, name: str, revision: str) -> None:
        if (repo := self._repo(name, write=True)) is not None:
            tag, commit = json.loads(self.body)["tag"], repo.resolve(revision)
            if tag in repo.tags:
                return self._answer(409)
            repo.tags[tag] = commit
            self._answer(200, {})

    def _untag(self, name: str, tag: str) -> None:
        if (repo := self._repo(name, write=True)) is not None:
            del repo.tags[tag]
            self._answer(200, {})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        commit = repo.resolve(revision)
        content = repo.commits[commit].get(path) if commit else None
        if content is None:
            known = {"X-Repo-Commit": commit} if commit else {}
            return self._answer(404, {"error": "no"}, **{"X-Error-Code": "EntryNotFound"}, **known)
        etag = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
        return self._answer(200, content=content, **headers)
