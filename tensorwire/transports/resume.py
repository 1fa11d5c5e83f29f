"""One stream from here to there, over as many connections as it takes."""

import random
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from tensorwire.errors import CorruptError, TransportError
from tensorwire.transfer.position import Position
from tensorwire.transfer.sending import Outgoing
from tensorwire.transfer.session import Offer, Peer, Receipt, greet, send_stream
from tensorwire.transports.blocking import TcpTransport
from tensorwire.transports.pace import HANDSHAKE, TIMEOUT

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0
# A receiver finds out that a connection is dead after TIMEOUT, and until then is busy with it.
PATIENCE: Final = 2 * TIMEOUT


def send_resuming(
    connect: Callable[[], TcpTransport],
    offer: Offer,
    outgoing: Outgoing,
    *,
    patience: float = PATIENCE,
    check_peer: Callable[[Peer], None] = lambda peer: None,
) -> Receipt:
    """Send a stream and connect again, from where the receiver is, whenever the connection breaks.

    `patience`: seconds without any progress of the receiver after which the last error is raised. Errors that trying again cannot
    mend are raised at once. `check_peer` may raise before anything is offered.
    """
    pause, reached, since = _FIRST_PAUSE, -1, time.monotonic()
    while True:
        source = _Watched(outgoing)
        try:
            with connect() as transport:
                check_peer(transport.run(greet(), within=HANDSHAKE))
                return transport.run(send_stream(offer, source))
        except (TransportError, CorruptError) as error:
            if not getattr(error, "retryable", True):
                raise
            if source.position.offset > reached:
                pause, reached, since = _FIRST_PAUSE, source.position.offset, time.monotonic()
            elif time.monotonic() - since > patience:
                raise
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, _LONGEST_PAUSE)


class _Watched:
    """An Outgoing that remembers where its receiver was."""

    def __init__(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        self.position = Position(offset=-1)

    def after(self, position: Position) -> Iterator[Any]:
        self.position = position
        return self._outgoing.after(position)

    @property
    def digest(self) -> str:
        return self._outgoing.digest
