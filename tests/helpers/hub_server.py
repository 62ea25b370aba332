"""A local hub server: the part of the hub's API that its client uses to read and to publish, with injected failures.

Large files are answered as the real hub does: a redirect to another host (here `localhost` beside `127.0.0.1`), with
size and SHA-256 in the headers of the redirect.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".onnx", ".data", ".trt", ".safetensors")
GATED, MISSING, NO_REPOSITORY = "GatedRepo", "EntryNotFound", "RepoNotFound"
Tree = dict[str, bytes]


@dataclass
class InjectedResponse:
    """An injected response to a request: status, error code, headers."""

    status: int
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class LocalHub:
    """Repositories (branch -> commit, commit -> files), the log of requests, and the failures to inject.

    `refuse`: path, or "*" for all -> answer. `cut`: path -> after how many bytes each of the next connections ends.
    `spoil`: paths whose bytes arrive changed. `pause`: seconds before each answer. `token`: needed to write.
    """

    address: str = ""
    commits: dict[str, Tree] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    refuse: dict[str, InjectedResponse] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    spoil: set[str] = field(default_factory=set)
    pause: float = 0.0
    token: str = ""

    def commit(self, repository: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add files on top of a branch; return the new commit."""
        branches = self.branches.setdefault(repository, {})
        tree = {**self.commits.get(branches.get(branch, ""), {}), **files}
        oid = hashlib.sha1(repr((repository, branch, len(self.commits))).encode()).hexdigest()
        self.commits[oid], branches[branch] = tree, oid
        return oid

    def tree(self, repository: str, revision: str) -> tuple[str, Tree] | None:
        oid = self.branches[repository].get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None

    def reads(self) -> list[str]:
        """Return the paths whose bytes were requested, in order."""
        return [path for method, path, _ in self.asked if method == "GET"]


def digest_of(path: str, data: bytes) -> str:
    """Return the etag: SHA-256 of a large file, git's SHA-1 of a small one."""
    if path.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def serve(hub: LocalHub | None = None) -> Iterator[LocalHub]:
    """Run a hub, at `address`, until the block ends."""
    hub = hub or LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # type: ignore[method-assign]  # a client that was killed is no news
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._read("HEAD")

    def do_GET(self) -> None:
        self._read("GET")

    def _read(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self._note(method, path)
        time.sleep(self.hub.pause)
        if path.startswith("cdn/"):
            self._send_bytes(path.split("/", 2)[2], self.hub.blobs[path.split("/")[1]], method)
        elif path.startswith("api/"):
            self._json(*self._describe(path))
        else:
            self._resolve(method, path)

    def _resolve(self, method: str, path: str) -> None:
        repository, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        if rest.startswith("refs/pr/"):
            parts = rest.split("/", 3)
            revision, name = "/".join(parts[:3]), parts[3]
        refusal = self.hub.refuse.get(name) or self.hub.refuse.get("*")
        if refusal is None and repository not in self.hub.branches:
            refusal = InjectedResponse(401, NO_REPOSITORY)
        commit_and_files = None if refusal else self.hub.tree(repository, revision)
        if refusal is None and commit_and_files is None:
            refusal = InjectedResponse(404, "RevisionNotFound")
        if commit_and_files is not None and name not in commit_and_files[1]:
            refusal = InjectedResponse(404, MISSING, {"X-Repo-Commit": commit_and_files[0]})
        if refusal is not None or commit_and_files is None:
            assert refusal is not None
            self._answer(refusal.status, b"", {"X-Error-Code": refusal.code, **refusal.headers})
            return
        data = commit_and_files[1][name]
        headers = {"X-Repo-Commit": commit_and_files[0]}
        if not name.endswith(LARGE):
            self._send_bytes(name, data, method, {**headers, "ETag": f'"{digest_of(name, data)}"'})
            return
        oid = digest_of(name, data)
        self.hub.blobs[oid] = data
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)), "ETag": '"of the redirect"'}
        port = self.hub.address.rpartition(":")[2]
        self._answer(302, b"", {**headers, "Location": f"http://localhost:{port}/cdn/{oid}/{name}"})

    def _send_bytes(self, name: str, data: bytes, method: str, headers: Mapping[str, str] | None = None) -> None:
        if name in self.hub.spoil:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0
        if self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        for key, value in {**(headers or {}), "Content-Length": str(len(data) - start)}.items():
            self.send_header(key, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if method == "HEAD":
            return
        cuts = self.hub.cut.get(name)
        if not cuts:
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data[start:])
            return
        self.wfile.write(data[start : start + cuts.pop(0)])
        self.wfile.flush()
        self.close_connection = True
        time.sleep(0.05)  # what was sent is to arrive before the reset
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _describe(self, path: str) -> tuple[int, Any]:
        if path == "api/whoami-v2":
            return (200, {"name": "someone", "type": "user"}) if self._may_write() else (401, {"error": "no"})
        repository, _, revision = path.removeprefix("api/models/").partition("/revision/")
        if repository not in self.hub.branches:
            return 404, {"error": "Repository not found"}
        commit_and_files = self.hub.tree(repository, revision or "main")
        if commit_and_files is None:
            return 404, {"error": "no revision"}
        return 200, {
            "id": repository,
            "sha": commit_and_files[0],
            "siblings": [{"rfilename": name} for name in commit_and_files[1]],
        }

    def do_PUT(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        data = self._body()
        self._note("PUT", path)
        oid = path.rpartition("/")[2]
        self.hub.blobs[oid] = data[:-1] if "upload" in self.hub.spoil else data
        self._answer(200, b"", {"ETag": '"1"'})

    def do_POST(self) -> None:
        path, query = unquote(urlsplit(self.path).path).lstrip("/"), parse_qs(urlsplit(self.path).query)
        data = self._body()
        self._note("POST", path)
        if not self._may_write():
            self._json(401, {"error": "Invalid credentials"})
        elif refusal := self.hub.refuse.get("POST"):
            self._answer(refusal.status, b"", {"X-Error-Code": refusal.code, **refusal.headers})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(data)["objects"]
            made = [{**o, "actions": {"upload": {"href": f"{self.hub.address}/upload/{o['oid']}"}}} for o in objects]
            self._json(200, {"transfer": "basic", "objects": made})
        else:
            repository, _, rest = path.removeprefix("api/models/").partition("/preupload/")
            for verb in ("commit", "branch", "paths-info"):
                if not rest:
                    repository, _, rest = path.removeprefix("api/models/").partition(f"/{verb}/")
            self._write(path.removeprefix(f"api/models/{repository}/").partition("/")[0], repository, rest, query, data)

    def _write(self, verb: str, repository: str, revision: str, query: Mapping[str, list[str]], data: bytes) -> None:
        if repository not in self.hub.branches:
            self._answer(404, b"{}", {"X-Error-Code": NO_REPOSITORY})
        elif verb == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                 "shouldIgnore": False} for f in json.loads(data)["files"]
            ]  # fmt: skip
            self._json(200, {"files": files})
        elif verb == "branch":
            start = json.loads(data or b"{}").get("startingPoint", "main") if data else "main"
            branches = self.hub.branches[repository]
            if revision in branches:
                self._json(409, {"error": "Reference already exists"})
                return
            branches[revision] = branches[start]
            self._json(200, {})
        elif verb == "commit":
            self._commit(repository, revision, bool(query.get("create_pr")), data)
        else:
            self._json(404, {"error": verb})

    def _commit(self, repository: str, revision: str, as_request: bool, data: bytes) -> None:
        files: Tree = {}
        for line in data.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.hub.blobs[entry["value"]["oid"]]
        branches = self.hub.branches[repository]
        answer = {}
        if as_request:
            number = 1 + sum(name.startswith("refs/pr/") for name in branches)
            branches[f"refs/pr/{number}"] = branches[revision]
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.address}/{repository}/discussions/{number}"
        oid = self.hub.commit(repository, files, revision)
        self._json(200, {"commitUrl": f"{self.hub.address}/{repository}/commit/{oid}", "commitOid": oid, **answer})

    def _may_write(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {self.hub.token}"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _note(self, method: str, path: str) -> None:
        self.hub.asked.append((method, path, {key.lower(): value for key, value in self.headers.items()}))

    def _json(self, status: int, document: Any) -> None:
        self._answer(status, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextlib.contextmanager
def client_at(address: str, cache: Any, token: str = "") -> Iterator[None]:
    """Point the real client of this process at a hub and a cache, as HF_ENDPOINT, HF_HOME and HF_TOKEN do at its start.

    Its timeouts are shortened, so that a test of a hanging server does not wait for the defaults.
    """
    import pytest
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
        patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        patch.setattr(constants, "DEFAULT_ETAG_TIMEOUT", 1)
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # bytes that a broken connection may cost
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache) + ".token")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # what is spoken here is git's large file storage
        patch.delenv("HF_TOKEN", raising=False)
        patch.delenv("SA3_ONNX_DIR", raising=False)
        if token:
            patch.setenv("HF_TOKEN", token)
        yield
