"""A small Hugging Face hub on loopback, as far as huggingface_hub asks one for models.

Large files are redirected to another host name, as the hub redirects to its CDN, with the headers
that the hub has (X-Repo-Commit, X-Linked-Etag, X-Linked-Size) and with ranges.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 100_000
Files = dict[str, bytes]


@dataclass
class HubModel:
    """A model: `revisions` are branches and tags, `commits` their files."""

    revisions: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)  # tokens that may read what is not public

    def add(self, revision: str, files: Files) -> str:
        """Adds a commit; returns its hash."""
        digest = hashlib.sha1(revision.encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + content)
        commit = digest.hexdigest()
        self.revisions[revision] = commit
        self.commits[commit] = files
        return commit


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    host: str
    path: str
    token: str | None
    range: str | None


class RefusedError(Exception):
    """A request that ends with an error, in the hub's way of saying which."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: "Hub"

    def log_message(self, *_: object) -> None:
        """Be silent."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def answer(self) -> None:
        path = urlsplit(self.path).path
        host = self.headers["Host"].split(":")[0]
        request = Request(self.command, host, path, self.token, self.headers.get("Range"))
        self.hub.requests.append(request)
        try:
            if blob := re.fullmatch("/cdn/([0-9a-f]+)", path):
                self.send_content(self.hub.blobs[blob[1]], {})
            elif api := re.fullmatch("/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
                self.send_info(api[1], unquote(api[2] or "main"))
            elif tree := re.fullmatch("/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
                self.send_tree(tree[1], unquote(tree[2]))
            elif file := re.fullmatch("/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.send_file(file[1], unquote(file[2]), unquote(file[3]))
            else:
                raise RefusedError(404)
        except RefusedError as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self.send_body(refused.status, b"", {k: v for k, v in headers.items() if v})

    def model(self, name: str) -> HubModel:
        """A model that this token may see."""
        if self.token is not None and self.token not in self.hub.tokens:
            raise RefusedError(401, message="Invalid credentials in Authorization header")
        model = self.hub.models.get(name)
        if model is None or (model.private and self.token not in model.readers):
            # Whether it exists is nobody's business.
            raise RefusedError(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return model

    def commit(self, name: str, revision: str) -> str:
        model = self.model(name)
        commit = model.revisions.get(revision, revision)
        if commit not in model.commits:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def send_info(self, name: str, revision: str) -> None:
        commit = self.commit(name, revision)
        files = self.model(name).commits[commit]
        siblings = [{"rfilename": file} for file in sorted(files)]
        info = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []}
        self.send_body(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def send_tree(self, name: str, revision: str) -> None:
        files = self.model(name).commits[self.commit(name, revision)]
        entries = []
        for file, content in sorted(files.items()):
            oid = hashlib.sha1(content).hexdigest()
            entry = {"type": "file", "path": file, "size": len(content), "oid": oid}
            if len(content) >= LARGE_BYTES:
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self.send_body(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def send_file(self, name: str, revision: str, file: str) -> None:
        commit = self.commit(name, revision)
        model = self.model(name)
        if model.gated and self.token not in model.readers:
            raise RefusedError(403 if self.token else 401, "GatedRepo", "Access is restricted")
        headers = {"X-Repo-Commit": commit}
        content = model.commits[commit].get(file)
        if content is None:
            headers |= {"X-Error-Code": "EntryNotFound"}
            self.send_body(404, b"", headers)
            return
        sha256 = hashlib.sha256(content).hexdigest()
        if len(content) < LARGE_BYTES:
            self.send_content(content, headers | {"ETag": f'"{sha256[:40]}"'})
            return
        self.hub.blobs[sha256] = content
        headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
        headers |= {"Location": f"http://localhost:{self.hub.port}/cdn/{sha256}"}
        self.send_body(302, b"", headers)

    def send_content(self, content: bytes, headers: dict[str, str]) -> None:
        status, begin = 200, 0
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            status, begin = 206, int(wanted[1])
            last = len(content) - 1
            headers = headers | {"Content-Range": f"bytes {begin}-{last}/{len(content)}"}
        headers = headers | {"Accept-Ranges": "bytes"}
        if self.command == "GET" and len(content) >= LARGE_BYTES and self.hub.break_downloads > 0:
            self.hub.break_downloads -= 1
            self.send_half(content[begin:], headers)
        else:
            self.send_body(status, content[begin:], headers)

    def send_half(self, content: bytes, headers: dict[str, str]) -> None:
        """Breaks the connection off, or holds it while `hub.hold` is not set."""
        self.send_head(200, len(content), headers)
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        self.hub.is_half_sent.set()
        self.hub.hold.wait()
        self.close_connection = True

    def send_head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_body(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_head(status, len(body), headers)
        if self.command != "HEAD":
            self.wfile.write(body)


class Hub:
    """The hub's content, and what it was asked for."""

    def __init__(self) -> None:
        self.models: dict[str, HubModel] = {}
        self.tokens: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.break_downloads = 0  # how many downloads of large files break off in the middle
        self.is_half_sent = threading.Event()
        self.hold = threading.Event()
        self.hold.set()
        handler = type("HubHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the context ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.hold.set()
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()
