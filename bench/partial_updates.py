"""How long a layer takes from being made to being decoded in another process: `python bench/partial_updates.py`.

A generator makes a layer every 0.4 s, `tensorwire.encode` encodes them into one stream that goes over a socket, and the
receiver notes when each is there. Both clocks are CLOCK_MONOTONIC of one machine. Exit code 1 where a layer takes
longer than 0.1 s.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np

import tensorwire
from tensorwire.transports import TcpListener, TcpTransport

BAR = 0.1  # seconds


def receive(pipe: Connection) -> None:
    """Say when each layer is there, decoded."""
    with TcpListener() as listener:
        pipe.send(listener.port)
        with listener.accept() as transport:
            for name, _ in tensorwire.decode(transport.receive()):
                pipe.send((name, time.monotonic()))


def layers(count: int, every: float, size: int, made: dict[str, float]) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for number in range(count):
        began = time.monotonic()
        layer = rng.standard_normal(size // 4, np.float32)
        time.sleep(max(began + every - time.monotonic(), 0))  # what training would take
        made[f"layer{number}"] = time.monotonic()
        yield f"layer{number}", layer


def measure(count: int, every: float, size: int, codec: str) -> list[float]:
    """Seconds from each layer's being made to its being there."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=receive, args=(there,), daemon=True)
    process.start()
    made: dict[str, float] = {}
    with TcpTransport.connect("127.0.0.1", here.recv()) as transport:
        transport.send(tensorwire.encode(layers(count, every, size, made), codec=codec))
        come = dict(here.recv() for _ in range(count))
    process.join()
    return [come[name] - made[name] for name in made]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--every", type=float, default=0.4, help="seconds between two of them (0.4)")
    parser.add_argument("--mib", type=float, default=2.0, help="of a layer (2)")
    parser.add_argument("--codec", default="nf4")
    options = parser.parse_args()
    delays = measure(options.layers, options.every, int(options.mib * (1 << 20)), options.codec)
    print(json.dumps({"codec": options.codec, "layer_mib": options.mib, "delays_s": [round(d, 4) for d in delays]}))
    sys.exit(max(delays) > BAR)
