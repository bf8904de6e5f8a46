"""Ctrl-C and SIGTERM: asked once, a run commits and leaves; asked twice, it leaves at once.

The first signal raises `StopRequested` wherever the run is, as Ctrl-C does in any Python program, so that no phase
can forget to ask: reading rows, loading a base, the middle of a long backward. Only what must not be torn apart (an
update with its counters, a commit) holds it back for the moment that it takes.
"""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

log = logging.getLogger("veneer")


class StopRequested(BaseException):
    """Somebody asked the run to stop; no handler of ordinary errors catches it, and it never leaves this package.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)

    @property
    def exit_code(self) -> int:
        """What a shell shows for a process that the signal ended: 130 or 143."""
        return 128 + self.number


class StopFlag:
    """Whether somebody asked the run to stop, and whether it may stop now."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._held = 0
        self._before: dict[int, Any] = {}
        self.began = False
        """Whether the run folder is this run's."""

    @property
    def request(self) -> StopRequested | None:
        """The request that was made, if any."""
        return None if self._signal is None else StopRequested(self._signal)

    def check(self) -> None:
        """Raise where a stop was asked for; for long work, in case somebody else's code swallowed the first raise.

        Raises:
            StopRequested: Then.
        """
        if self._signal is not None:
            raise StopRequested(self._signal)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a request wait until the end of the block.

        Raises:
            StopRequested: At the end, where one waited.
        """
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if not self._held:
            self.check()

    def ask(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (a signal handler's signature)
        """Stop now, or when nothing holds it back; the next signal does what it did before this run.

        Nothing is logged here: a handler may interrupt a log line that is being written.
        """
        self._signal = number
        self.give_back()
        if not self._held:
            self.check()

    def take(self) -> None:
        """Have both signals come here, from the main thread; in others Python lets nobody.

        One that is ignored stays ignored: a shell that starts a run in the background keeps its own Ctrl-C from it so.
        """
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self.ask)

    def give_back(self) -> None:
        """Let the signals do what they did before."""
        for number, handler in self._before.items():
            # None stands for a handler that was not set from Python, and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}


def stop_behind(error: BaseException, flag: StopFlag) -> StopRequested | None:
    """Return the request that made a run leave, or None where it leaves for another reason.

    An error of other code counts as the request where one was made: that code may have caught ours and raised its own.
    A KeyboardInterrupt does not: it is the second Ctrl-C.
    """
    if isinstance(error, Exception):
        return flag.request
    return error if isinstance(error, StopRequested) else None


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Turn the first SIGINT or SIGTERM within the block into `StopRequested`; a second one acts as before the block.

    By default, that is: a second Ctrl-C raises KeyboardInterrupt, a second SIGTERM ends the process there and then.
    What is on the disk can bear both.
    """
    flag = StopFlag()
    try:
        flag.take()
        yield flag
    finally:
        flag.give_back()
