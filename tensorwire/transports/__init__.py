"""Ways to move buffers. A transport knows no codec: `send` takes an iterable of buffers, `receive` gives something to `decode` from,
`run` holds a conversation around a stream (`tensorwire.transfer`): greeting, resumption, receipt.
"""

from tensorwire.transports.aio import AsyncListener, AsyncTransport
from tensorwire.transports.blocking import TcpListener, TcpTransport
from tensorwire.transports.memory import MemoryTransport
from tensorwire.transports.resume import send_resuming
from tensorwire.transports.tls import client_tls, server_tls

__all__ = [
    "AsyncListener",
    "AsyncTransport",
    "MemoryTransport",
    "TcpListener",
    "TcpTransport",
    "client_tls",
    "send_resuming",
    "server_tls",
]
