"""NF4 encoding of 64 MiB alone and beside busy processes, medians of 60 calls: `python bench/contention.py`."""

import subprocess
import sys
from statistics import median
from time import perf_counter, sleep

import numpy as np

from tensorwire import kernels

COUNT = 16 << 20
CALLS = 60
BUSY = [sys.executable, "-c", "while True: pass"]


def gbps(threads: int) -> float:
    values = np.random.default_rng(0).standard_normal(COUNT, np.float32)
    codes, absmax = np.zeros(COUNT // 2, np.uint8), np.zeros(COUNT // 64, np.float32)
    kernels.set_threads(threads)
    times = []
    for _ in range(CALLS):
        start = perf_counter()
        kernels.quantize_4bit(values, codes, absmax, blocksize=64, quant_type="nf4")
        times.append(perf_counter() - start)
    return values.nbytes / 1e9 / median(times)


def report(what: str) -> None:
    print(f"{what}: {gbps(1):.1f} GB/s with one thread, {gbps(2):.1f} with two", flush=True)


if __name__ == "__main__":
    gbps(1)
    report("alone")
    for prefix, what in ((["nice", "-n", "10"], "beside two niced processes"), ([], "beside two equal processes")):
        busy = [subprocess.Popen([*prefix, *BUSY]) for _ in range(2)]
        sleep(0.5)
        report(what)
        for process in busy:
            process.kill()
            process.wait()
