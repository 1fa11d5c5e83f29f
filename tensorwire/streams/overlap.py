"""Encoding ahead of the sender, decoding behind the receiver: jobs in a helper thread, results in order.

Kernels release the GIL, so one helper overlaps a codec with the network. If the helper has not begun a job when its
result is due, the caller runs it, and so never waits for a helper that lost its core.
`tensorwire.set_threads` sets how many threads a kernel in a job may use.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Event, Lock
from typing import Final, Generic, TypeVar

# Slices of fewer bytes are not worth handing to another thread.
_WORTHWHILE: Final = 256 << 10
# Results that may wait to be taken, which bounds the memory they hold.
_AHEAD: Final = 1

T = TypeVar("T")


class _Job(Generic[T]):
    """Work that is done once, by the first thread to reach it, and releases everything when its result is taken."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work: Callable[[], T] | None = work
        self._claim = Lock()
        self._done = Event()
        self._value: T | None = None
        self._error: BaseException | None = None

    def attempt(self) -> None:
        """Do the work unless it has begun."""
        if not self._claim.acquire(blocking=False):
            return
        work, self._work = self._work, None
        assert work is not None
        try:
            self._value = work()
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()

    def result(self) -> T:
        """The result of the work, or its exception, which is raised."""
        self.attempt()
        self._done.wait()
        value, error = self._value, self._error
        self._value = self._error = None
        if error is not None:
            try:
                raise error
            finally:
                del (
                    error
                )  # its traceback refers to this frame: the cycle would outlive the stream and keep its files open
        return value  # type: ignore[return-value]  # which work that raised nothing gave


class Helper(Generic[T]):
    """A queue of jobs and a thread that starts with the first job worth one; `close` ends it."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._jobs: deque[_Job[T]] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def submit(self, work: Callable[[], T], size: int) -> None:
        """Add work over `size` bytes."""
        job = _Job(work)
        self._jobs.append(job)
        if size >= _WORTHWHILE:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="tensorwire")
            with suppress(RuntimeError):  # no thread available: the caller does the work when its turn comes
                self._executor.submit(job.attempt)

    @property
    def full(self) -> bool:
        """Whether a result should be taken before more work is added."""
        return len(self._jobs) > _AHEAD

    def take(self) -> T:
        """The result of the oldest job, or the exception that it raised."""
        return self._jobs.popleft().result()

    def drain(self) -> None:
        """Finish all jobs."""
        while self._jobs:
            self.take()

    def close(self) -> None:
        """Drop the jobs that have not begun and wait for the one that has."""
        self._jobs.clear()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


def in_order(jobs: Iterable[tuple[Callable[[], T], int]]) -> Iterator[T]:
    """The results of (job, size in bytes) pairs, in order."""
    helper: Helper[T] = Helper()
    try:
        for job, size in jobs:
            helper.submit(job, size)
            if helper.full:
                yield helper.take()
        while helper:
            yield helper.take()
    finally:
        helper.close()
