"""One of the two processes of `bench memory`: `python -m tensorwire.bench.peer`, a job as JSON on stdin.

The receiver prints the port it listens on, takes one model, and answers one byte when all of it is there and
verified. The sender loads its model, connects, waits for the receiver's "ready" byte and sends. Both print
the memory that this took beyond the level right before, in bytes; the sender also prints the seconds from its
first byte to the answer. torch is imported only for the methods that need it.
"""

import io
import json
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any, Final

import tensorwire
from tensorwire import dtypes
from tensorwire.bench import models
from tensorwire.bench.rss import Rise
from tensorwire.streams import Schema
from tensorwire.tensor import TensorView
from tensorwire.transports import TcpListener, TcpTransport

READY: Final = b"r"
DONE: Final = b"d"
# Loading a model, or a slow codec's first pass over a large item, may take minutes.
_TIMEOUT: Final = 600.0
_LENGTH: Final = 8

Job = dict[str, Any]


def main() -> None:
    """Do one job."""
    job = json.load(sys.stdin)
    {"send": send, "receive": receive}[job["role"]](job)


def send(job: Job) -> None:
    """Load the model (in file mode there is none to load), send it, report."""
    prepare, run = SENDERS[job["method"]]
    subject = prepare(job)
    models.release()
    with TcpTransport.connect("127.0.0.1", job["port"], timeout=_TIMEOUT) as transport:
        _expect(transport, READY)
        rise = Rise()
        start = perf_counter()
        run(transport, subject, job)
        _expect(transport, DONE)
        seconds = perf_counter() - start
    _report({"extra": rise.peak(), "seconds": seconds})


def receive(job: Job) -> None:
    """Take one model, keep it, report."""
    prepare, run = RECEIVERS[job["method"]]
    subject = prepare(job)
    with TcpListener(timeout=_TIMEOUT) as listener:
        _report({"port": listener.port})
        with listener.accept() as transport:
            rise = Rise()
            transport.send([READY])
            kept = run(transport, subject, job)
            transport.send([DONE])
            extra = rise.peak()
    del kept
    _report({"extra": extra})


def _arrays(job: Job) -> dict[str, Any]:
    return models.resolve(job["model"]).load(tensorwire.numpy.FRONT)


def _tensors(job: Job) -> dict[str, Any]:
    return models.resolve(job["model"]).load(tensorwire.torch.FRONT)


def _safetensors_tensors(job: Job) -> dict[str, Any]:
    import safetensors.torch  # noqa: F401

    return _tensors(job)


def _file(job: Job) -> str:
    tensorwire.safetensors  # noqa: B018 - imported here, before anything is measured
    path: str = job["path"]
    return path


def _schema(job: Job) -> Schema:
    views = {
        name: TensorView(dtypes.BY_NAME[dtype], tuple(shape), lambda start, stop: b"")
        for name, dtype, shape in job["tensors"]
    }
    return Schema.of(views, models.VIEWS)


def _torch(job: Job) -> None:
    import torch  # noqa: F401


def _safetensors(job: Job) -> None:
    import safetensors.torch  # noqa: F401


def _send_message(transport: TcpTransport, message: Any) -> None:
    transport.send([len(message).to_bytes(_LENGTH, "little"), message])


def _receive_message(transport: TcpTransport) -> io.BytesIO:
    """A whole message, received into one buffer of its size: the least that anybody can do."""
    length = bytearray(_LENGTH)
    _fill(transport, memoryview(length))
    message = io.BytesIO(bytes(int.from_bytes(length, "little")))
    _fill(transport, message.getbuffer())
    return message


def _send_regular(transport: TcpTransport, arrays: Any, job: Job) -> None:
    _send_message(transport, tensorwire.dumps(arrays, codec=job["codec"]))


def _receive_regular(transport: TcpTransport, nothing: None, job: Job) -> Any:
    return tensorwire.loads(_receive_message(transport).getbuffer())


def _send_container(transport: TcpTransport, arrays: Any, job: Job) -> None:
    transport.send(tensorwire.encode(arrays, codec=job["codec"]))


def _receive_container(transport: TcpTransport, schema: Schema, job: Job) -> Any:
    return dict(tensorwire.decode(transport.receive(), expect=schema))


def _send_file(transport: TcpTransport, path: str, job: Job) -> None:
    transport.send(tensorwire.safetensors.encode(path, codec=job["codec"]))


def _receive_file(transport: TcpTransport, path: str, job: Job) -> None:
    tensorwire.safetensors.decode(transport.receive(), path)


def _send_torch(transport: TcpTransport, tensors: Any, job: Job) -> None:
    import torch

    message = io.BytesIO()
    torch.save(tensors, message)
    _send_message(transport, message.getbuffer())


def _receive_torch(transport: TcpTransport, nothing: None, job: Job) -> Any:
    import torch

    return torch.load(_receive_message(transport), weights_only=True)


def _send_safetensors(transport: TcpTransport, tensors: Any, job: Job) -> None:
    from safetensors.torch import save

    _send_message(transport, save(tensors))


def _receive_safetensors(transport: TcpTransport, nothing: None, job: Job) -> Any:
    from safetensors.torch import load

    return load(_receive_message(transport).getvalue())


def _nothing(job: Job) -> None:
    return None


# Method: what to have in memory before anything is measured, and the measured part.
SENDERS: Final[dict[str, tuple[Callable[[Job], Any], Callable[..., None]]]] = {
    "regular": (_arrays, _send_regular),
    "container": (_arrays, _send_container),
    "file": (_file, _send_file),
    "torch.save": (_tensors, _send_torch),
    "safetensors": (_safetensors_tensors, _send_safetensors),
}
RECEIVERS: Final[dict[str, tuple[Callable[[Job], Any], Callable[..., Any]]]] = {
    "regular": (_nothing, _receive_regular),
    "container": (_schema, _receive_container),
    "file": (_file, _receive_file),
    "torch.save": (_torch, _receive_torch),
    "safetensors": (_safetensors, _receive_safetensors),
}


def _fill(transport: TcpTransport, buffer: memoryview) -> None:
    while buffer:
        size = transport.readinto(buffer)
        if not size:
            raise tensorwire.TransportError("the other process went away")
        buffer = buffer[size:]


def _expect(transport: TcpTransport, byte: bytes) -> None:
    got = bytearray(1)
    _fill(transport, memoryview(got))
    assert got == byte


def _report(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
