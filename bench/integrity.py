"""What checksums cost in streaming from one process into another over loopback: `python bench/integrity.py`.

On and off take turns on one connection; off, both ends take a constant for every CRC-32C. The receiver's seconds for 256 MiB of float32
into memory that is there already, medians; and the median of how much longer one takes than the other right beside it, which
what else the machine does touches least.
"""

import multiprocessing
import sys
from multiprocessing.connection import Connection
from statistics import median
from time import perf_counter

import numpy as np

import tensorwire
from tensorwire.checksum import crc32c
from tensorwire.transports import TcpListener, TcpTransport

COUNT = 64 << 20
TURNS = 100
CODECS = ("raw", "bf16", "int8", "nf4")


def use_checksums(on: bool) -> None:
    chosen = crc32c if on else lambda data, crc: 0
    for name in ("sender", "receiver"):
        sys.modules[f"tensorwire.streams.{name}"].crc32c = chosen


def send(port: int, orders: Connection) -> None:
    values = {"a": np.random.default_rng(0).standard_normal(COUNT, np.float32)}
    with TcpTransport.connect("127.0.0.1", port) as transport:
        while (order := orders.recv()) is not None:
            codec, on = order
            use_checksums(on)
            transport.send(tensorwire.encode(values, codec=codec))


def main() -> None:
    context = multiprocessing.get_context("spawn")
    orders, theirs = context.Pipe()
    into = {"a": np.zeros(COUNT, np.float32)}
    with TcpListener() as listener:
        sender = context.Process(target=send, args=(listener.port, theirs))
        sender.start()
        with listener.accept() as transport:
            for codec in CODECS:
                seconds: dict[bool, list[float]] = {True: [], False: []}
                for turn in range(2 * TURNS + 2):
                    on = turn % 4 in (0, 3)
                    use_checksums(on)
                    orders.send((codec, on))
                    start = perf_counter()
                    for _ in tensorwire.decode(transport.receive(), into=into):
                        pass
                    if turn > 1:
                        seconds[on].append(perf_counter() - start)
                cost = median(with_them / without for with_them, without in zip(seconds[True], seconds[False])) - 1
                on_s, off_s = median(seconds[True]), median(seconds[False])
                print(f"{codec}: {on_s:.3f} s with, {off_s:.3f} s without; pair by pair {cost:+.1%}", flush=True)
            orders.send(None)
        sender.join()


if __name__ == "__main__":
    main()
