"""Ways to move buffers. A transport knows no codec: `send` takes an iterable of buffers, `receive` gives something to `decode` from,
`run` holds a conversation around a stream (`session`): greeting, resumption, receipt.
"""

from tensorwire.transports.aio import AsyncListener, AsyncTransport
from tensorwire.transports.memory import MemoryTransport
from tensorwire.transports.session import (
    Do,
    Fill,
    Offer,
    Peer,
    Receipt,
    RefusedError,
    Send,
    greet,
    hear,
    receive_stream,
    refuse,
    say,
    send_stream,
    wait,
)
from tensorwire.transports.tcp import TcpListener, TcpTransport
from tensorwire.transports.tls import client_tls, server_tls
from tensorwire.transports.transfer import send_resuming

__all__ = [
    "AsyncListener",
    "AsyncTransport",
    "Do",
    "Fill",
    "MemoryTransport",
    "Offer",
    "Peer",
    "Receipt",
    "RefusedError",
    "Send",
    "TcpListener",
    "TcpTransport",
    "client_tls",
    "greet",
    "hear",
    "receive_stream",
    "refuse",
    "say",
    "send_resuming",
    "send_stream",
    "server_tls",
    "wait",
]
