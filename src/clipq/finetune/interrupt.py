"""Signals that ask a run to stop: it saves first, and leaves then."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from clipq.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)
T = TypeVar("T")


class StopRequest:
    """Whether a signal has come.

    Attributes:
        signal: its number; 0 as long as none has.
    """

    def __init__(self) -> None:
        self.signal = 0

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come; to be called where all that is needed is saved."""
        if self.signal:
            raise Interrupted(f"stopped by {signal.Signals(self.signal).name}; all is saved", self.signal)

    def checked(self, items: Iterable[T]) -> Iterator[T]:
        """The same items, with a `check` before each."""
        for item in items:
            self.check()
            yield item


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of dying of them; the second one ends the process as ever.

    Outside the main thread, where Python hands out no signals, nothing is ever requested.
    """
    request = StopRequest()
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number
        restore()

    if threading.current_thread() is threading.main_thread():
        before.update({number: signal.signal(number, note) for number in SIGNALS})
    try:
        yield request
    finally:
        restore()
