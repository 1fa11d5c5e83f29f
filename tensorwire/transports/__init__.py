"""Ways to move buffers.

A transport knows no codec: `send` takes an iterable of buffers, `receive` gives something to `decode` from, `run` holds
a conversation around a stream (`tensorwire.transfer`): greeting, resumption, receipt.
"""

from tensorwire.transports.aio import AsyncListener, AsyncTransport
from tensorwire.transports.blocking import TcpListener, TcpTransport
from tensorwire.transports.memory import MemoryTransport
from tensorwire.transports.pace import HANDSHAKE, TIMEOUT
from tensorwire.transports.resume import PATIENCE, send_resuming, send_resuming_async
from tensorwire.transports.tls import client_tls, is_loopback, server_tls, speaks_for
from tensorwire.transports.turns import Turns

__all__ = [
    "HANDSHAKE",
    "PATIENCE",
    "TIMEOUT",
    "AsyncListener",
    "AsyncTransport",
    "MemoryTransport",
    "TcpListener",
    "TcpTransport",
    "Turns",
    "client_tls",
    "is_loopback",
    "send_resuming",
    "send_resuming_async",
    "server_tls",
    "speaks_for",
]
