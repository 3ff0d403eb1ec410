"""A Hub on loopback that the real clients of huggingface_hub read from and write to; standard library and PyYAML only.

`with HubServer() as hub: hub.add("org/name", {"config.json": b"{}"})`, and point HF_ENDPOINT at `hub.url` before
huggingface_hub is imported (`conftest.py` does). As a process of its own: `python tests/hub/hub_server.py --port 0`.
The parts: `hub_state` keeps, `hub_exchange` answers one request, `hub_read_routes` and `hub_write_routes` say what,
`hub_faults` spoils it.
"""

import argparse
import itertools
import re
import signal
import socketserver
import sys
import tempfile
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from hub_control import CONTROL_ROUTES
from hub_exchange import Exchange, Refusal
from hub_faults import Fault, FaultRules
from hub_log import RequestLog
from hub_read_routes import CDN_ROUTES, READ_ROUTES, unquoted
from hub_state import DEFAULT_ACCOUNTS, Account, Clock, Commit, HubFile, Repository, as_file
from hub_uploads import UPLOAD_ROUTES
from hub_write_routes import WRITE_ROUTES
from hub_xet import XET_ROUTES


PAGE_SIZE = 1000  # rows of a listing or a tree in one answer, as in production


class LoopbackServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own would ask a name server for its name
        self.server_name, self.server_port = self.server_address[:2]


class HubServer(RequestLog):
    """Serves models, datasets and Spaces on 127.0.0.1 in threads of this process.

    `cdn`: LFS files are fetched from a second port, as in production. `multipart`: LFS files above so many bytes are
    uploaded in parts of that size. `requests` logs "METHOD /path", `log` all about it; clear them as you like.
    """

    def __init__(self, port: int = 0, cdn: bool = False, multipart: int | None = None):
        super().__init__()
        self.state_lock = threading.RLock()
        self.uploads = tempfile.TemporaryDirectory(prefix="tests-hub-")
        self.multipart = multipart
        routes = [*READ_ROUTES, *XET_ROUTES, *WRITE_ROUTES, *UPLOAD_ROUTES, *CONTROL_ROUTES]
        self._servers = [self._listen(port, routes, is_cdn=False)]
        self.url = f"http://127.0.0.1:{self._servers[0].server_address[1]}"
        self.cdn_url = None
        if cdn:
            self._servers.append(self._listen(0, CDN_ROUTES, is_cdn=True))
            self.cdn_url = f"http://localhost:{self._servers[1].server_address[1]}"  # another host: 1.33 ignores ports
        self.reset()

    def reset(self) -> None:
        """Empties the Hub: no repositories, no faults, no log."""
        with self.state_lock:
            for path in Path(self.uploads.name).iterdir():
                path.unlink(missing_ok=True)  # an answer may end late and delete its own upload
            self.repositories: dict[str, Repository] = {}  # models by id, others by "datasets/<id>", "spaces/<id>"
            self.failures: dict[
                str, int
            ] = {}  # substring of "METHOD /path" -> HTTP status, for as long as it is there
            self.faults = FaultRules()
            self.crashes: list[str] = []  # tracebacks of errors of this server, which answered 500
            self.accounts: dict[str, Account] = dict(DEFAULT_ACCOUNTS)
            self.stored: dict[str, HubFile] = {}  # sha256 -> LFS file that was uploaded
            self.page_size = PAGE_SIZE
            self.xet = False  # LFS files are fetched through Xet by clients that can
            self.xet_files: dict[str, HubFile] = {}  # hash -> file whose headers were asked for
            self._clock = Clock()
            self._numbers = itertools.count()
            self._facts: dict[tuple, dict[str, Any]] = {}
        self.clear_log()

    def _listen(self, port: int, routes: list, is_cdn: bool) -> LoopbackServer:
        table = [(method, re.compile(path), answer) for method, path, answer in routes]

        class Handler(Exchange):
            hub = self

            def route(self) -> None:
                method = "GET" if self.command == "HEAD" else self.command
                for verb, path, answer in table:
                    if verb == method and (match := path.fullmatch(self.raw_path)):
                        answer(self, **unquoted(match.groupdict()))
                        return
                raise Refusal(404, "", f"{self.command} {self.raw_path} is unknown to the tests' Hub")

        Handler.is_cdn = is_cdn
        return LoopbackServer(("127.0.0.1", port), Handler)

    # what a test does

    def add(
        self,
        repo_id: str,
        files: dict[str, HubFile | bytes | str | Path],
        gated_to: tuple[str, ...] = (),
        *,
        repo_type: str = "model",
        revision: str = "main",
        title: str = "Upload files",
        gated: bool | str = False,
        **facts: Any,
    ) -> str:
        """Publishes a repository, or a new commit whose files are exactly `files`; returns the commit.

        A text or bytes are contents, a Path is a file on disk that is served from there. `facts` are fields of
        `hub_state.Repository`: private, disabled, vanished, downloads, likes, labels, info.
        """
        contents = {name: as_file(source) for name, source in files.items()}
        with self.state_lock:
            key = self._key(repo_id, repo_type)
            repository = self.repositories.get(key)
            if repository is None:
                repository = self.repositories[key] = Repository(repo_id, repo_type, number=next(self._numbers))
            repository.gated_to = frozenset(gated_to)
            repository.gated = gated or ("auto" if gated_to else False)
            for name, value in facts.items():
                if name not in Repository.__dataclass_fields__:
                    raise TypeError(f"{name} is no field of a repository")
                setattr(repository, name, value)
            commit = self.commit_to(repository, contents, title, repository.owner, revision)
            repository.created = repository.created or commit.date
            return commit.id

    def find(self, repo_id: str, repo_type: str = "model") -> Repository | None:
        return self.repositories.get(self._key(repo_id, repo_type))

    def remove(self, repo_id: str, repo_type: str = "model") -> None:
        with self.state_lock:
            del self.repositories[self._key(repo_id, repo_type)]

    def move(self, repo_id: str, repo_type: str = "model") -> str:
        """Gives a repository a new commit, with a file `moved.txt` more; returns the commit."""
        with self.state_lock:
            repository = self.repositories[self._key(repo_id, repo_type)]
            number = len(repository.commits)
            files = repository.files | {"moved.txt": HubFile(f"commit {number}")}
            return self.commit_to(repository, files, f"Move {number}", repository.owner, "main").id

    def fault(self, match: str, **action: Any) -> Fault:
        """Orders a fault (fields: `hub_faults.Fault`); `.fired` of what is returned counts the requests it hit."""
        fault = Fault(match, **action)
        self.faults.append(fault)
        return fault

    def add_account(self, token: str, name: str, orgs: tuple[str, ...] = (), role: str = "write") -> None:
        self.accounts[token] = Account(name, tuple(orgs), role)

    def downloaded(self, repo_id: str) -> list[str]:
        """Names of the files of a model whose bytes were sent."""
        prefix = f"GET /{repo_id}/resolve/"
        return sorted({r[len(prefix) :].split("/", 1)[1] for r in self.requests if r.startswith(prefix)})

    # what the answers need

    @staticmethod
    def _key(repo_id: str, repo_type: str) -> str:
        return repo_id if repo_type == "model" else f"{repo_type}s/{repo_id}"

    def repositories_of(self, repo_type: str) -> list[Repository]:
        with self.state_lock:
            return [found for found in self.repositories.values() if found.repo_type == repo_type]

    def account_of(self, token: str) -> Account | None:
        """The account of a token; an unknown token that begins with `hf_` is one of a user of that name."""
        if token not in self.accounts and token.startswith("hf_"):
            return Account(token.removeprefix("hf_"))
        return self.accounts.get(token)

    def commit_to(
        self, repository: Repository, files: dict[str, HubFile], title: str, author: str, revision: str
    ) -> Commit:
        return repository.add_commit(files, self._clock, title, author, revision)

    def cached_facts(self, repository: Repository, commit: Commit, read: Callable) -> dict[str, Any]:
        """What follows from the files of a commit is read once."""
        state = (repository.private, repository.gated, repository.disabled, repository.downloads, repository.likes)
        key = (repository.number, commit.id, *state, repository.labels, repr(repository.info))
        if key not in self._facts:
            self._facts[key] = read(repository, commit)
        return self._facts[key]

    def carry_out(self, fault: Fault) -> None:
        """Does what a fault does to the Hub itself before the request is answered."""
        if fault.do is not None:
            fault.do(self)
        if fault.remove is not None:
            self.remove(fault.remove)
        if fault.disable is not None:
            self.repositories[fault.disable].disabled = True
        if fault.move is not None:
            self.move(fault.move)

    # its life

    def start(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self.uploads.cleanup()

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hub on loopback, until it is interrupted. Prints its address.")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--cdn", action="store_true", help="LFS files come from a second port")
    parser.add_argument("--mixed", action="store_true", help="publishes the mixed models of hub_models.py")
    options = parser.parse_args()
    with HubServer(options.port, options.cdn) as hub:
        if options.mixed:
            from hub_models import seed_mixed

            seed_mixed(hub)
        sys.stdout.write(f"{hub.url}\n")
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            sys.exit()


if __name__ == "__main__":
    main()
