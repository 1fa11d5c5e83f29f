"""Ways to move buffers. A transport knows no codec and no format: `send` takes an iterable of buffers, `receive`
gives something to `decode` from."""

from tensorwire.transports.memory import MemoryTransport
from tensorwire.transports.tcp import TcpListener, TcpTransport

__all__ = ["MemoryTransport", "TcpListener", "TcpTransport"]
