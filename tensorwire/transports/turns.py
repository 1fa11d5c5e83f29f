"""Turns for receiving from many peers: only a few at a time, so that memory does not grow with their number."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from tensorwire.errors import TransportError
from tensorwire.transfer import RefusedError, refuse, wait
from tensorwire.transports.aio import AsyncTransport

_KEPT: Final = 10.0  # seconds between signs of life to a peer that waits for its turn
_STALL: Final = 5.0  # seconds in which a peer must send, while others wait,
_LEAST: Final = 4096  # this many bytes, or lose its turn


class Turns:
    """Turns of peers: `places` of them have their turn at a time, and `line` may wait for one.

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
        """Run a conversation once its peer's turn has come; until then, the peer is told to wait.

        If too many wait already, the peer is told to try again later. Raises TransportError if others wait and the peer
        sends nothing, unless `is_working()` is true, for example while received data is verified.
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
