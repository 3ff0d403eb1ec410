"""SIGTERM and SIGINT as a request that the training loop reads at its next step."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequest:
    """Context manager: inside it the first SIGTERM or SIGINT sets `reason`; a second one acts as it always did."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> StopRequest:
        main_thread = threading.current_thread() is threading.main_thread()  # only it may set handlers
        for number in (signal.SIGTERM, signal.SIGINT) if main_thread else ():
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
