"""The process of a command: signals that end it, and standard streams that may be closed or full."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final, TypeVar

_SIGNALS: Final = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows does not have the last
_TOGETHER: Final = 1.0  # seconds

T = TypeVar("T")


class Stopped(KeyboardInterrupt):
    """A signal, such as that of Ctrl-C, asks the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Handler:
    """Raises `Stopped`, once for signals that arrive together.

    `timeout` sends two; a closing terminal and an init system send several. The second one would interrupt the removal
    of temporary files.
    """

    def __init__(self) -> None:
        self._last = -_TOGETHER
        self.number: int | None = None  # of the last signal

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        before, self._last = self._last, time.monotonic()
        if self._last - before >= _TOGETHER:
            raise Stopped(number)


@contextmanager
def stoppable() -> Iterator[None]:
    """Let every terminating signal raise `Stopped`, except those that the parent process set to be ignored.

    This also holds if the signal interrupts a library that then raises its own error, as torch's zip writer does.
    """
    handler = _Handler()
    with _handled_by(handler):
        try:
            yield
        except Exception:
            if handler.number is None:
                raise
            raise Stopped(handler.number) from None


def run_async(coroutine: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`. A signal cancels the coroutine, rather than interrupt any running task, then raises `Stopped`."""
    import asyncio

    signals: list[int] = []

    async def cancelled_by_signals() -> T | None:
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(coroutine)

        def stop(number: int, frame: FrameType | None) -> None:
            signals.append(number)
            loop.call_soon_threadsafe(task.cancel)

        with _handled_by(stop):
            await asyncio.wait([task])
        return None if task.cancelled() else task.result()

    result = asyncio.run(cancelled_by_signals())
    if signals:
        raise Stopped(signals[0])
    return result  # type: ignore[return-value]  # None means cancelled by a signal


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which has the signals
        yield
        return
    before: dict[signal.Signals, Any] = {}
    for name in _SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def open_streams() -> None:
    """Replace closed standard streams by ones that refuse every read and write, and print file names byte for byte.

    Otherwise the next file to be opened would become standard output.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # A stream for reading gets a descriptor for writing, and the other way round.
            os.open(os.devnull, os.O_WRONLY if mode == "r" else os.O_RDONLY)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    with suppress(AttributeError):  # a test may have put something else there
        sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]


def drop_output() -> None:
    """Discard unprinted output, so that Python does not fail on it again while it shuts down."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
