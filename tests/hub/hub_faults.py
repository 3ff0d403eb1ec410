"""Faults that a test orders from the Hub: which requests they hit, what happens then, how often they did."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


SMALL_PIECE = 64 * 1024  # bytes


@dataclass
class Fault:
    """A rule for requests whose "METHOD /path?query" (unquoted) is found by the regular expression `match`.

    It lets `skip` requests pass, then hits `times` of them (-1: for ever). `fired` counts the hits.
    """

    match: str
    times: int = 1
    skip: int = 0
    # instead of the answer
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: str = '{"error": "failure on request of the test"}'
    drop: bool = False  # closes the connection without an answer
    # before the answer
    delay: float = 0.0  # seconds
    do: Callable[[Any], None] | None = None  # called with the HubServer
    remove: str | None = None  # id of a repository that goes
    disable: str | None = None  # id of a repository that is disabled
    move: str | None = None  # id of a repository that gets a new commit, with a file `moved.txt` more
    # on the body of the answer, in bytes from its beginning
    cut: int | None = None  # the connection ends (FIN) after so many bytes
    reset: int | None = None  # the connection is reset (RST) after so many bytes
    truncate: int | None = None  # the body is so many bytes, and says so
    extend: int = 0  # so many zeros come after it, and it says so
    corrupt: int | None = None  # one bit of this byte is flipped; negative: counted from the end
    stall_at: int | None = None
    stall: float = 0.0  # seconds of silence at `stall_at`
    throttle: float | None = None  # bytes per second
    ignore_range: bool = False
    seen: int = 0
    fired: int = 0

    def __post_init__(self) -> None:
        re.compile(self.match)

    @property
    def is_for_bodies(self) -> bool:
        """Whether it changes bodies and nothing else: then a HEAD request neither meets nor uses it up."""
        others = self.status or self.drop or self.delay or self.do or self.remove or self.disable or self.move
        return not others

    @property
    def ends_the_request(self) -> bool:
        return self.status is not None or self.drop

    @property
    def changes_body(self) -> bool:
        offsets = (self.cut, self.reset, self.truncate, self.corrupt, self.stall_at, self.throttle)
        return self.extend > 0 or any(value is not None for value in offsets)

    def length_of(self, length: int) -> int:
        """Content-Length that is told for a body of `length` bytes."""
        return (length if self.truncate is None else min(length, self.truncate)) + self.extend

    def bytes_of(self, length: int) -> int:
        """How many bytes `apply` yields for a body of `length` bytes."""
        ends = [value for value in (self.cut, self.reset, self.truncate) if value is not None]
        return min([length, *ends]) + (self.extend if self.cut is None and self.reset is None else 0)

    def apply(self, pieces: Iterator[bytes | memoryview], length: int) -> Iterator[bytes | memoryview]:
        """The pieces of a body of `length` bytes as they are sent; the caller ends the connection after a cut."""
        zeros = self.extend if self.cut is None and self.reset is None else 0
        end = self.bytes_of(length) - zeros
        flipped = None if self.corrupt is None else self.corrupt % max(length, 1)
        position = 0
        for piece in pieces:
            for start in range(0, len(piece), SMALL_PIECE):
                part = piece[start : start + min(SMALL_PIECE, max(0, end - position))]
                if not part:
                    break
                if flipped is not None and position <= flipped < position + len(part):
                    part = bytearray(part)
                    part[flipped - position] ^= 1
                if self.stall_at is not None and position <= self.stall_at < position + len(part):
                    yield part[: self.stall_at - position]
                    time.sleep(self.stall)
                    yield part[self.stall_at - position :]
                else:
                    yield part
                position += len(part)
                if self.throttle:
                    time.sleep(len(part) / self.throttle)
        if zeros:
            yield bytes(zeros)

    def summary(self) -> dict[str, Any]:
        return {"match": self.match, "times": self.times, "skip": self.skip, "seen": self.seen, "fired": self.fired}


class FaultRules(list):
    """The faults that are in force, in the order in which they were ordered."""

    def __init__(self):
        super().__init__()
        self._lock = threading.Lock()

    def take(self, request: str) -> list[Fault]:
        """The faults that hit a request; one that ends the request shields it from those after it."""
        hits = []
        with self._lock:
            for fault in self:
                if request.startswith("HEAD ") and fault.is_for_bodies or not re.search(fault.match, request):
                    continue
                fault.seen += 1
                if fault.seen <= fault.skip or fault.times >= 0 and fault.fired >= fault.times:
                    continue
                fault.fired += 1
                hits.append(fault)
                if fault.ends_the_request:
                    break
        return hits
