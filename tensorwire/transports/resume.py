"""`send_resuming`, blocking and for asyncio: sends one stream over as many connections as it takes."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from tensorwire.errors import TensorwireError
from tensorwire.transfer import Offer, Outgoing, Peer, Receipt
from tensorwire.transfer.resume import send_over
from tensorwire.transports.aio import AsyncTransport
from tensorwire.transports.blocking import BlockingTransport
from tensorwire.transports.driver import Driver, completed
from tensorwire.transports.pace import HANDSHAKE, TIMEOUT

# A receiver notices a dead connection only after TIMEOUT, and is busy until then.
PATIENCE: Final = 2 * TIMEOUT


def send_resuming(
    connect: Callable[[], BlockingTransport],
    offer: Offer,
    outgoing: Outgoing,
    *,
    patience: float = PATIENCE,
    check_peer: Callable[[Peer], None] = lambda peer: None,
    on_retry: Callable[[TensorwireError, float], None] = lambda error, seconds: None,
) -> Receipt:
    """Send a stream. Whenever the connection breaks, connect again and continue at the receiver's position.

    `patience`: seconds of failures without any progress after which the last error is raised. Permanent errors are
    raised at once. `check_peer`: may raise before anything is offered. `on_retry`: called with the error and the
    seconds until the next attempt.
    """

    async def connected() -> Driver:
        return connect().driver

    async def pause(seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 - nothing here waits: see `completed`

    sending = send_over(
        connected,
        pause,
        offer,
        outgoing,
        patience=patience,
        greeting=HANDSHAKE,
        check_peer=check_peer,
        on_retry=on_retry,
    )
    return completed(sending)


async def send_resuming_async(
    connect: Callable[[], Awaitable[AsyncTransport]],
    offer: Offer,
    outgoing: Outgoing,
    *,
    patience: float = PATIENCE,
    check_peer: Callable[[Peer], None] = lambda peer: None,
    on_retry: Callable[[TensorwireError, float], None] = lambda error, seconds: None,
) -> Receipt:
    """`send_resuming` under asyncio. `outgoing` makes its buffers in the event loop."""

    async def connected() -> Driver:
        return (await connect()).driver

    return await send_over(
        connected,
        asyncio.sleep,
        offer,
        outgoing,
        patience=patience,
        greeting=HANDSHAKE,
        check_peer=check_peer,
        on_retry=on_retry,
    )
