"""Turns at receiving from many peers: so many at a time, so that memory does not grow with their number."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from tensorwire.errors import TransportError
from tensorwire.transfer import RefusedError, refuse, wait
from tensorwire.transports.aio import AsyncTransport

_KEPT: Final = 10.0  # seconds after which a peer that waits for its turn hears from us again
_STALL: Final = 5.0  # seconds in which somebody in whose way others wait must send
_LEAST: Final = 4096  # bytes, or give up its place


class Turns:
    """Turns of peers, of which `places` have theirs at a time and `line` may wait for one.

    turns = Turns(2, line=16)
    await turns.take(transport, receive_stream(open_recording))
    """

    def __init__(self, places: int, *, line: int) -> None:
        self._places = asyncio.Semaphore(places)
        self._line = line
        self._waiting = 0

    async def take(
        self, transport: AsyncTransport, conversation: Any, *, is_working: Callable[[], bool] = lambda: False
    ) -> None:
        """Hold a conversation when the turn of its peer has come, who is told to wait until then.

        Where too many wait already the peer is told to come again. Raises TransportError where others wait and nothing
        comes, unless `is_working()`: what has come is verified, say.
        """
        if self._waiting >= self._line:
            await transport.run(
                refuse(RefusedError("too many are waiting: try again later", kind="busy", retryable=True))
            )
            return
        async with self._turn(transport):
            holding = asyncio.ensure_future(transport.run(conversation))
            try:
                before = transport.received
                while not (await asyncio.wait([holding], timeout=_STALL))[0]:
                    if self._waiting and not is_working() and transport.received - before < _LEAST:
                        raise TransportError("others are waiting, and nothing arrives: connect again to continue")
                    before = transport.received
            finally:
                holding.cancel()
                await asyncio.wait([holding])
            holding.result()

    @asynccontextmanager
    async def _turn(self, transport: AsyncTransport) -> AsyncIterator[None]:
        turn = asyncio.ensure_future(self._places.acquire())
        self._waiting += 1
        try:
            try:
                while not (await asyncio.wait([turn], timeout=_KEPT))[0]:
                    await transport.run(wait())
            finally:
                self._waiting -= 1
            yield
        finally:
            if not turn.cancel():
                self._places.release()
