"""Encoding ahead of the sender, decoding behind the receiver: jobs in a helper thread, results in order.

Kernels release the GIL, so one helper overlaps a codec with the network. The caller takes part: a job that the helper
has not begun when its result is due is run by the caller, who thus never waits for a helper that lost its core.
How many threads a job itself may use is the kernels' business (`tensorwire.set_threads`).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

# Slices of fewer bytes are not worth handing to another thread.
_WORTHWHILE: Final = 256 << 10
# Results that may wait to be taken, which bounds the memory they hold.
_AHEAD: Final = 1


class Helper:
    """A queue of jobs and a thread that starts with the first job worth one; `close` ends it."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._jobs: deque[tuple[Callable[[], Any], Future | None]] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def submit(self, job: Callable[[], Any], size: int) -> None:
        """Add a job over `size` bytes."""
        future = None
        if size >= _WORTHWHILE:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="tensorwire")
            future = self._executor.submit(job)
        self._jobs.append((job, future))

    @property
    def full(self) -> bool:
        """Whether a result should be taken before another job is added."""
        return len(self._jobs) > _AHEAD

    def take(self) -> Any:
        """The result of the oldest job, or the exception that it raised."""
        job, future = self._jobs.popleft()
        return job() if future is None or future.cancel() else future.result()

    def drain(self) -> None:
        """Finish all jobs."""
        while self._jobs:
            self.take()

    def close(self) -> None:
        """Drop the jobs that have not begun and wait for the one that has."""
        self._jobs.clear()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


def in_order(jobs: Iterable[tuple[Callable[[], Any], int]]) -> Iterator[Any]:
    """The results of (job, size in bytes) pairs, in order."""
    helper = Helper()
    try:
        for job, size in jobs:
            helper.submit(job, size)
            if helper.full:
                yield helper.take()
        while helper:
            yield helper.take()
    finally:
        helper.close()
