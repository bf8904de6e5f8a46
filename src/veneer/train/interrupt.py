"""Ctrl-C and SIGTERM: asked once, a run commits and leaves; asked twice, it leaves at once."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

log = logging.getLogger("veneer")


class StopRequested(Exception):  # noqa: N818 (a request, not an error; it never leaves this package)
    """Somebody asked the run to stop."""


class StopFlag:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self._signal: int | None = None

    def check(self) -> None:
        """Raise where a stop was asked for.

        Raises:
            StopRequested: Then.
        """
        if self._signal is not None:
            raise StopRequested(signal.Signals(self._signal).name)

    def ask(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (a signal handler's signature)
        """Remember the request; a second one raises KeyboardInterrupt."""
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number
        log.warning("stopping after the step in hand, with a checkpoint; once more to leave at once")


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Turn the first SIGINT or SIGTERM within the block into a flag; outside the main thread nothing changes."""
    flag = StopFlag()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, flag.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
