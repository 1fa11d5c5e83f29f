"""What checksums cost in streaming from one process into another over loopback: `python bench/integrity.py`.

On and off take turns on one connection; off, both ends take a constant for every CRC-32C. Printed are the receiver's
seconds for 256 MiB of float32 (--mib) into memory that is there already, medians; and the median of how much longer
one takes than the other right beside it, which other work on the machine disturbs least.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import tensorwire
from tensorwire import kernels
from tensorwire.checksum import crc32c
from tensorwire.transports import TcpListener, TcpTransport

CODECS = ("raw", "bf16", "int8", "nf4")
# Kernels that take the checksum of what they make along, and how many arrays stand before it.
FUSED = {"cast": 2, "quantize_4bit": 3, "quantize_int8": 3, "quantize_linear": 3}
KERNELS = {name: getattr(kernels, name) for name in FUSED}


def use_checksums(on: bool) -> None:
    chosen = crc32c if on else lambda data, crc=0: 0
    for name, module in list(sys.modules.items()):
        if name.startswith("tensorwire.streams.") and hasattr(module, "crc32c"):
            module.crc32c = chosen
    for name, kernel in KERNELS.items():
        setattr(kernels, name, kernel if on else without_checksum(kernel, FUSED[name]))


def without_checksum(kernel: Callable[..., Any], place: int) -> Callable[..., Any]:
    def run(*arrays: Any, crc: Any = None, **options: Any) -> Any:
        given = arrays[place] if len(arrays) > place else crc
        if given is not None:
            given[0] = 0
        return kernel(*arrays[:place], **options)

    return run


def send(port: int, orders: Connection, count: int) -> None:
    values = {"a": np.random.default_rng(0).standard_normal(count, np.float32)}
    with TcpTransport.connect("127.0.0.1", port) as transport:
        while (order := orders.recv()) is not None:
            codec, on = order
            use_checksums(on)
            transport.send(tensorwire.encode(values, codec=codec))


def main(count: int, turns: int) -> None:
    context = multiprocessing.get_context("spawn")
    orders, theirs = context.Pipe()
    into = {"a": np.zeros(count, np.float32)}
    with TcpListener() as listener:
        sender = context.Process(target=send, args=(listener.port, theirs, count))
        sender.start()
        with listener.accept() as transport:
            for codec in CODECS:
                seconds: dict[bool, list[float]] = {True: [], False: []}
                for turn in range(2 * turns + 2):
                    on = turn % 4 in (0, 3)
                    use_checksums(on)
                    orders.send((codec, on))
                    start = perf_counter()
                    for _ in tensorwire.decode(transport.receive(), into=into):
                        pass
                    if turn > 1:
                        seconds[on].append(perf_counter() - start)
                pairs = zip(seconds[True], seconds[False], strict=True)
                cost = median(with_them / without for with_them, without in pairs) - 1
                on_s, off_s = median(seconds[True]), median(seconds[False])
                print(f"{codec}: {on_s:.3f} s with, {off_s:.3f} s without; pair by pair {cost:+.1%}", flush=True)
            orders.send(None)
        sender.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--turns", type=int, default=100)
    options = parser.parse_args()
    main(options.mib << 18, options.turns)
