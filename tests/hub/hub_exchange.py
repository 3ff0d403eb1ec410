"""One request to the tests' Hub and its answer: headers, bodies, ranges, errors and faults."""

import json
import os
import re
import socket
import struct
import time
import traceback
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_faults import Fault
from hub_log import LogEntry
from hub_state import Account, Commit, HubFile, Repository


TOGETHER = 64 * 1024  # bytes: smaller bodies leave with their head
LARGE_PIECE = 8 * 1024**2  # bytes sent at once
DISABLED = "Access to this resource is disabled."


class Refusal(Exception):
    """An error that the client knows by its code."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class ConnectionEnded(Exception):
    """The connection was closed on purpose."""


class Exchange(BaseHTTPRequestHandler):
    """Answers the requests of one connection. `hub` is the HubServer, `route` finds who answers a request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Any
    is_cdn = False

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionEnded, ConnectionError, TimeoutError):
            self.close_connection = True

    def answer(self) -> None:
        parts = urlsplit(self.path)
        self.raw_path, self.query = parts.path, parse_qs(parts.query, keep_blank_values=True)
        self.chunked = "chunked" in self.headers.get("Transfer-Encoding", "")  # and not read yet
        self.unread = int(self.headers.get("Content-Length") or 0)
        self.faults: list[Fault] = []
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.entry = LogEntry(
            self.command, unquote(parts.path), unquote(parts.query), range=self.headers.get("Range", ""), token=token
        )
        self.entry.cdn = self.is_cdn
        if self.raw_path.startswith("/__test__/"):
            self.route_or_refuse()
            return
        self.hub.begin(self.entry)
        try:
            self.meet_faults()
            self.route_or_refuse()
        finally:
            self.hub.end(self.entry)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def meet_faults(self) -> None:
        request = f"{self.entry.method} {self.entry.path}" + (f"?{self.entry.query}" if self.entry.query else "")
        for part, status in list(self.hub.failures.items()):
            if part in f"{self.entry.method} {self.entry.path}":
                self.faults = [Fault(part, status=status)]
                return
        self.faults = self.hub.faults.take(request)
        for fault in self.faults:
            time.sleep(fault.delay)
            self.hub.carry_out(fault)

    def route_or_refuse(self) -> None:
        try:
            for fault in self.faults:
                if fault.drop:
                    self.end_connection()
                if fault.status is not None:
                    self.send(fault.status, fault.body.encode(), dict(fault.headers))
                    return
            self.route()
        except Refusal as refusal:
            self.send_json({"error": refusal.message}, refusal.status, refusal.headers)
        except (ConnectionEnded, ConnectionError, TimeoutError):
            raise
        except Exception:
            self.hub.crashes.append(traceback.format_exc())
            self.send_json({"error": traceback.format_exc(limit=-1)}, 500)

    def route(self) -> None:
        raise Refusal(404, "", f"{self.path} is not a page")

    # the request

    def read_body(self):
        """Yields the body of the request, a piece at a time."""
        if self.chunked:
            self.chunked = False
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        while self.unread:
            piece = self.rfile.read(min(1024**2, self.unread))
            if not piece:
                raise ConnectionResetError("the client left before its body was whole")
            self.unread -= len(piece)
            yield piece

    def read_json(self) -> Any:
        return json.loads(b"".join(self.read_body()) or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[-1].lower() in ("true", "1")

    @property
    def account(self) -> Account | None:
        """Who asks; None for an anonymous request. An unknown token is refused."""
        if not self.entry.token:
            return None
        account = self.hub.account_of(self.entry.token)
        if account is None:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return account

    def find(self, repo_type: str, repo_id: str, writes: bool = False) -> Repository:
        account, repository = self.account, self.hub.find(repo_id, repo_type)
        if repository is None or repository.vanished or repository.private and not (account and account.owns(repo_id)):
            if account is None:
                raise Refusal(401, "RepoNotFound", "Invalid username or password.")
            raise Refusal(404, "RepoNotFound", "Repository not found")
        if repository.disabled:
            raise Refusal(403, "", DISABLED)
        if writes:
            self.check_right_to_write(repo_id)
        return repository

    def check_right_to_write(self, owner: str) -> Account:
        if self.account is None:
            raise Refusal(401, "", "Invalid username or password.")
        if not self.account.owns(owner) or self.account.role != "write":
            raise Refusal(403, "", f"Forbidden: you don't have the right to write to {owner.split('/')[0]}")
        return self.account

    def check_gate(self, repository: Repository) -> None:
        account = self.account
        if not repository.gated or self.entry.token in repository.gated_to:
            return
        if account is None:
            raise Refusal(401, "GatedRepo", f"Access to {repository.repo_id} is restricted. Please log in.")
        if not account.owns(repository.repo_id):
            raise Refusal(403, "GatedRepo", f"Access to {repository.repo_id} is restricted: ask for access.")

    def commit_of(self, repository: Repository, revision: str | None) -> Commit:
        revision = revision or "main"
        commit = repository.at(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # the answer

    def send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_body(status, HubFile(body), 0, len(body), headers or {})

    def send_file(self, file: HubFile, headers: dict[str, str]) -> None:
        """Answers with a file, or with the range of it that was asked for."""
        headers["Accept-Ranges"] = "bytes"
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.entry.range)
        if not asked or asked[0] == "bytes=-" or any(fault.ignore_range for fault in self.faults):
            self.send_body(200, file, 0, file.size, headers)
            return
        if asked[1]:
            first, last = int(asked[1]), min(int(asked[2] or file.size), file.size - 1)
        else:
            first, last = max(0, file.size - int(asked[2])), file.size - 1
        if first >= file.size or last < first:
            self.send(416, b"", headers | {"Content-Range": f"bytes */{file.size}"})
            return
        headers["Content-Range"] = f"bytes {first}-{last}/{file.size}"
        self.send_body(206, file, first, last + 1 - first, headers)

    def send_body(self, status: int, file: HubFile, start: int, length: int, headers: dict[str, str]) -> None:
        for _ in self.read_body():  # what was not read of the request would be taken for the next one
            pass
        has_body = self.command != "HEAD" and status not in (204, 304)
        fault = next((fault for fault in self.faults if has_body and fault.changes_body), None)
        self.entry.status = status
        self.send_response(status)
        self.send_header("Content-Length", str(fault.length_of(length) if fault else length))
        for name, value in headers.items():
            self.send_header(name, value)
        if not has_body:
            self.note_piece(0, 0)
            self.end_headers()
        elif fault is not None:
            self.end_headers()
            self.send_faulty(file, start, length, fault)
        else:
            self.send_whole(file, start, length)

    def note_piece(self, size: int, left: int) -> None:
        """Counts bytes before they leave, and ends the request before the last of them.

        So the log is complete, and the request over, when the client has its answer.
        """
        self.entry.sent += size
        if size >= left:
            self.hub.end(self.entry)

    def send_whole(self, file: HubFile, start: int, length: int) -> None:
        if length <= TOGETHER:
            self.note_piece(length, length)
            self._headers_buffer.append(b"\r\n" + file.read(start, length))
            self.flush_headers()
            return
        self.end_headers()
        end, data = start + length, memoryview(file.data or b"")
        with file.path.open("rb") if file.path else nullcontext() as stream:
            while start < end:
                size = min(LARGE_PIECE, end - start)
                self.note_piece(size, end - start)
                if stream is None:
                    self.connection.sendall(data[start : start + size])
                else:
                    self.connection.sendfile(stream, start, size)
                start += size

    def send_faulty(self, file: HubFile, start: int, length: int, fault: Fault) -> None:
        left = fault.bytes_of(length)
        for piece in fault.apply(file.pieces(start, length), length):
            self.note_piece(len(piece), left)
            left -= len(piece)
            self.connection.sendall(piece)
        if fault.reset is not None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.end_connection(orderly=False)
        if fault.cut is not None:
            self.end_connection()

    def end_connection(self, orderly: bool = True) -> None:
        self.close_connection = True
        self.hub.end(self.entry)
        if orderly:
            self.connection.shutdown(socket.SHUT_RDWR)
        else:  # the last reference to the socket goes, and it is reset because it lingers for 0 seconds
            os.close(self.connection.detach())
        raise ConnectionEnded

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the output of the tests quiet: `HubServer.log` is the log."""
