"""5716 MiB to a file and fsync, page cache or written behind: `python bench/file_writes.py [FOLDER [MIB]]`."""

import os
import sys
import tempfile
from collections.abc import Callable
from time import perf_counter

import numpy as np

from tensorwire.storage import Output

SIZE = int(sys.argv[2] if len(sys.argv) > 2 else 5716) << 20
PIECE = 4 << 20
TURNS = 3


def seconds(folder: str, write: Callable[[int, memoryview, int], None]) -> float:
    data = memoryview(np.random.default_rng(0).integers(0, 256, PIECE, np.uint8))
    with tempfile.TemporaryFile(dir=folder) as file:
        start = perf_counter()
        for offset in range(0, SIZE, PIECE):
            write(file.fileno(), data, offset)
        os.fsync(file.fileno())
        return perf_counter() - start


def plain(fd: int, data: memoryview, offset: int) -> None:
    os.pwrite(fd, data, offset)


def behind() -> Callable[[int, memoryview, int], None]:
    outputs: dict[int, Output] = {}
    return lambda fd, data, offset: outputs.setdefault(fd, Output(fd, "the file")).write_at(data, offset)


if __name__ == "__main__":
    target = sys.argv[1] if len(sys.argv) > 1 else tempfile.gettempdir()
    for _ in range(TURNS):
        print(
            f"page cache {seconds(target, plain):.2f} s, written behind {seconds(target, behind()):.2f} s", flush=True
        )
