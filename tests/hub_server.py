"""A lean Hub on loopback: what the client of huggingface_hub asks for when it reads models, and the errors it knows.

`with HubServer() as hub: hub.add("org/name", {"config.json": b"{}"})`, and point HF_ENDPOINT at `hub.url` before
huggingface_hub is imported (`conftest.py` does). It keeps everything in memory and never touches a network.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?")
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
ERRORS = {"RepoNotFound": 404, "RevisionNotFound": 404, "EntryNotFound": 404, "GatedRepo": 403}


@dataclass
class Repository:
    """One model at one commit."""

    files: dict[str, bytes]
    gated_to: frozenset[str] = frozenset()  # tokens that may read it; empty: everyone
    revisions: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class HubServer:
    """Serves models on 127.0.0.1 in a thread. `requests` logs "METHOD /path"; clear it as you like."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.failures: dict[str, int] = {}  # substring of "METHOD /path" -> HTTP status, for as long as it is there
        hub = self

        class Handler(HubHandler):
            server_state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, repo_id: str, files: dict[str, bytes | str], gated_to: tuple[str, ...] = ()) -> str:
        """Publishes a model (again, at a new commit); returns the commit."""
        contents = {name: data.encode() if isinstance(data, str) else data for name, data in files.items()}
        repository = Repository(contents, frozenset(gated_to))
        repository.revisions = {"main": repository.commit}
        self.repositories[repo_id] = repository
        return repository.commit

    def downloaded(self, repo_id: str) -> list[str]:
        """Names of the files of a model whose bytes were sent."""
        prefix = f"GET /{repo_id}/resolve/"
        return sorted({r[len(prefix) :].split("/", 1)[1] for r in self.requests if r.startswith(prefix)})

    def start(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()


class HubHandler(BaseHTTPRequestHandler):
    """Answers one connection; `server_state` is the HubServer."""

    protocol_version = "HTTP/1.1"
    server_state: HubServer

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        # the client quotes a revision with safe="", so the raw path is split first and unquoted part by part
        path = urlsplit(self.path).path
        request = f"{self.command} {unquote(path)}"
        self.server_state.requests.append(request)
        for part, status in self.server_state.failures.items():
            if part in request:
                self.send(status, b'{"error": "failure on request of the test"}')
                return
        if match := API.fullmatch(path):
            self.answer_api(*match.groups())
        elif match := RESOLVE.fullmatch(path):
            self.answer_file(*match.groups())
        else:
            self.refuse("RepoNotFound")

    def repository(self, repo_id: str, revision: str | None) -> Repository | None:
        repository = self.server_state.repositories.get(unquote(repo_id))
        revision = unquote(revision or "main")
        if repository is None:
            self.refuse("RepoNotFound")
        elif repository.gated_to and self.headers.get("Authorization", "")[7:] not in repository.gated_to:
            self.refuse("GatedRepo")
        elif revision not in (repository.commit, *repository.revisions):
            self.refuse("RevisionNotFound")
        else:
            return repository
        return None

    def answer_api(self, repo_id: str, route: str | None, revision: str | None) -> None:
        # production tells everyone what is in a gated repository, and keeps the files: so does this
        gated = self.server_state.repositories.get(unquote(repo_id))
        known = {"main", *(gated.revisions if gated else ()), *([gated.commit] if gated else ())}
        repository = gated if gated and gated.gated_to and unquote(revision or "main") in known else None
        repository = repository or self.repository(repo_id, revision)
        if repository is None:
            return
        if route == "tree":
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in repository.files.items()
            ]
            self.send(200, json.dumps(rows).encode())
            return
        info = {
            "id": unquote(repo_id),
            "sha": repository.commit,
            "private": False,
            "gated": "auto" if repository.gated_to else False,
            "tags": [],
            "siblings": [{"rfilename": name} for name in repository.files],
        }
        self.send(200, json.dumps(info).encode())

    def answer_file(self, repo_id: str, revision: str, name: str) -> None:
        repository = self.repository(repo_id, revision)
        if repository is None:
            return
        data = repository.files.get(unquote(name))
        if data is None:
            self.refuse("EntryNotFound", {"X-Repo-Commit": repository.commit})
            return
        headers = {
            "X-Repo-Commit": repository.commit,
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Linked-Size": str(len(data)),
            "Accept-Ranges": "bytes",
        }
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            if first >= len(data):
                self.send(416, b"", headers)
                return
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self.send(206, data[first : last + 1], headers)
            return
        self.send(200, data, headers)

    def refuse(self, code: str, headers: dict[str, str] | None = None) -> None:
        body = json.dumps({"error": code}).encode()
        self.send(ERRORS[code], body, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test output quiet; `HubServer.requests` is the log."""
