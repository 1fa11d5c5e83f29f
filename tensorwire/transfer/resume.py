"""Sends one stream over as many connections as it takes: when to try again, and when to give up. Without I/O."""

import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any, Final, Protocol, TypeVar

from tensorwire.errors import CorruptError, SequenceError, TensorwireError, TransportError
from tensorwire.transfer.position import Position
from tensorwire.transfer.sending import Outgoing
from tensorwire.transfer.session import Conversation, Offer, Peer, Receipt, greet, send_stream

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 5.0

T = TypeVar("T")


class Backoff:
    """Pauses between attempts, each longer than the last, until the patience is used up.

    `patience`: seconds since the first failure after the last progress; a transfer that makes progress may take any
    time. Pauses double from `first` to `longest` seconds. Each is shortened by a random amount of up to a half, so that
    peers that were hit by the same failure do not all come back at once.

        backoff = Backoff(patience=60)
        while True:
            try:
                return attempt(on_progress=backoff.reset)
            except TransportError as error:
                pause = backoff.after(error)
            time.sleep(pause)
    """

    def __init__(
        self,
        *,
        patience: float,
        first: float = FIRST_PAUSE,
        longest: float = LONGEST_PAUSE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._patience = patience
        self._first = first
        self._longest = longest
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Note progress: patience and pauses start again."""
        self._pause = self._first
        self._failing_since: float | None = None

    def after(self, error: TensorwireError) -> float:
        """Seconds to wait after this error.

        Raises the error if trying again cannot help, or after `patience` seconds of failures.
        """
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now
        if not getattr(error, "retryable", True) or now - self._failing_since > self._patience:
            raise error
        pause, self._pause = self._pause, min(2 * self._pause, self._longest)
        return pause * random.uniform(0.5, 1)


class Line(Protocol):
    """A connection that can run conversations; the driver of every transport is one."""

    async def converse(self, conversation: Conversation[T], *, within: float | None = None) -> T:
        """Run a conversation, which may take `within` seconds in all."""

    async def hang_up(self) -> None:
        """Close the connection."""


async def send_over(
    connect: Callable[[], Awaitable[Line]],
    pause: Callable[[float], Awaitable[None]],
    offer: Offer,
    outgoing: Outgoing,
    *,
    patience: float,
    greeting: float,
    check_peer: Callable[[Peer], None],
    on_retry: Callable[[TensorwireError, float], None],
    clock: Callable[[], float] = time.monotonic,
) -> Receipt:
    """Send a stream. Whenever the connection breaks, connect again and continue at the receiver's position.

    `patience`: seconds of failures without any progress after which the last error is raised. `greeting`: seconds that
    the greeting may take. `check_peer`: may raise before anything is offered. `on_retry`: called with the error and the
    seconds until the next attempt. A receiver that has the beginning of another stream under this transfer key is asked
    once to drop it. Errors that cannot go away by trying again are raised at once.
    """
    backoff = Backoff(patience=patience, clock=clock)
    reached = -1
    anew = begun_anew = False
    while True:
        watched = Watched(outgoing)
        try:
            line = await connect()
            try:
                check_peer(await line.converse(greet(), within=greeting))
                return await line.converse(send_stream(replace(offer, anew=anew), watched))
            finally:
                await line.hang_up()
        except SequenceError:  # the receiver has the beginning of another stream
            if begun_anew:
                raise
            anew = begun_anew = True
            continue
        except (TransportError, CorruptError) as error:
            if watched.position.offset >= 0:  # the receiver has dropped it by now
                anew = False
            if watched.reached > reached:
                reached = watched.reached
                backoff.reset()
            seconds = backoff.after(error)
            on_retry(error, seconds)
        await pause(seconds)


class Watched:
    """An Outgoing that remembers the receiver's position, and how much has been sent since."""

    def __init__(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        self.position = Position(offset=-1)
        self.reached = -1

    def after(self, position: Position) -> Iterator[Any]:
        """The buffers from `position` on."""
        self.position, self.reached = position, position.offset
        for buffer in self._outgoing.after(position):
            yield buffer
            self.reached += memoryview(buffer).nbytes

    @property
    def digest(self) -> str:
        """The digest in the END frame."""
        return self._outgoing.digest
