"""The log of the tests' Hub: every request, what was sent for it, and how many were under way at once."""

import threading
import time
from dataclasses import dataclass


@dataclass
class LogEntry:
    """A request that was answered, or whose connection was ended."""

    method: str
    path: str  # unquoted
    query: str
    status: int = 0  # 0: no answer
    sent: int = 0  # bytes of the body
    range: str = ""
    token: str = ""
    cdn: bool = False
    started: float = 0.0  # seconds of time.monotonic
    seconds: float | None = None  # None: under way


class RequestLog:
    """The log of a server: entries in the order in which the requests came, and how many were under way at once."""

    def __init__(self):
        self.lock = threading.Lock()
        self.requests: list[str] = []
        self.log: list[LogEntry] = []
        self.under_way = 0
        self.peak = 0

    def clear_log(self) -> None:
        with self.lock:
            self.requests.clear()
            self.log.clear()
            self.peak = self.under_way

    def begin(self, entry: LogEntry) -> None:
        with self.lock:
            self.requests.append(f"{entry.method} {entry.path}")
            self.log.append(entry)
            entry.started = time.monotonic()
            self.under_way += 1
            self.peak = max(self.peak, self.under_way)

    def end(self, entry: LogEntry) -> None:
        with self.lock:
            if entry.seconds is None:
                entry.seconds = time.monotonic() - entry.started
                self.under_way -= 1

    def totals(self) -> dict[str, int]:
        """Requests answered, bytes of bodies sent, and the most requests that were under way at once."""
        with self.lock:
            return {"requests": len(self.log), "bytes": sum(entry.sent for entry in self.log), "peak": self.peak}
