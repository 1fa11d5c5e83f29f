"""Encoding ahead of the sender, decoding behind the receiver: jobs in a few threads, results in order.

Kernels release the GIL, so one helper thread overlaps a codec with the network and more divide its work. The caller
takes part: a job that no helper has begun when its result is due is run by the caller, who thus never waits for a
helper that lost its core to another process.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

from tensorwire.errors import EncodeError

ENVIRONMENT: Final = "TENSORWIRE_THREADS"
# Slices of fewer bytes are not worth handing to another thread.
WORTHWHILE: Final = 256 << 10


def thread_count(threads: int | None) -> int:
    """`threads`, or the environment's TENSORWIRE_THREADS, or 1. Raises EncodeError unless it is a count."""
    value: Any = os.environ.get(ENVIRONMENT, "1") if threads is None else threads
    if not str(value).isdecimal():
        raise EncodeError(f"threads must be a non-negative int, not {value!r}")
    return int(value)


class Workers:
    """A queue of jobs. Threads start with the first job that is worth one and end with `close`.

    At most `threads` results wait to be taken, which bounds the memory that they hold. With 0 threads every job
    runs in the caller when its result is due.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._executor: ThreadPoolExecutor | None = None
        self._jobs: deque[tuple[Callable[[], Any], Future | None]] = deque()

    def submit(self, job: Callable[[], Any], size: int) -> None:
        """Add a job over `size` bytes."""
        future = None
        if self._threads and size >= WORTHWHILE:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self._threads, thread_name_prefix="tensorwire")
            future = self._executor.submit(job)
        self._jobs.append((job, future))

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def full(self) -> bool:
        """Whether a result should be taken before another job is added."""
        return len(self._jobs) > self._threads

    def take(self) -> Any:
        """The result of the oldest job, or the exception that it raised."""
        job, future = self._jobs.popleft()
        return job() if future is None or future.cancel() else future.result()

    def drain(self) -> None:
        """Finish all jobs."""
        while self._jobs:
            self.take()

    def close(self) -> None:
        """Drop the jobs that have not begun and wait for those that have."""
        self._jobs.clear()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


def in_order(jobs: Iterable[tuple[Callable[[], Any], int]], threads: int) -> Iterator[Any]:
    """The results of (job, size in bytes) pairs, in order."""
    workers = Workers(threads)
    try:
        for job, size in jobs:
            workers.submit(job, size)
            if workers.full:
                yield workers.take()
        while workers:
            yield workers.take()
    finally:
        workers.close()
