"""NF4 encoding of 64 MiB alone and beside busy processes, medians of 60 calls: `python bench/contention.py`."""

import argparse
import subprocess
import sys
from statistics import median
from time import perf_counter, sleep

import numpy as np

from tensorwire import kernels

BUSY = [sys.executable, "-c", "while True: pass"]


def gbps(count: int, calls: int, threads: int) -> float:
    values = np.random.default_rng(0).standard_normal(count, np.float32)
    codes, absmax = np.zeros(count // 2, np.uint8), np.zeros(count // 64, np.float32)
    kernels.set_threads(threads)
    times = []
    for _ in range(calls):
        start = perf_counter()
        kernels.quantize_4bit(values, codes, absmax, blocksize=64, quant_type="nf4")
        times.append(perf_counter() - start)
    return values.nbytes / 1e9 / median(times)


def report(what: str, count: int, calls: int) -> None:
    one, two = (gbps(count, calls, threads) for threads in (1, 2))
    print(f"{what}: {one:.1f} GB/s with one thread, {two:.1f} with two", flush=True)


def main(count: int, calls: int) -> None:
    gbps(count, calls, 1)
    report("alone", count, calls)
    for prefix, what in ((["nice", "-n", "10"], "beside two niced processes"), ([], "beside two equal processes")):
        busy = [subprocess.Popen([*prefix, *BUSY]) for _ in range(2)]
        sleep(0.5)
        report(what, count, calls)
        for process in busy:
            process.kill()
            process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--calls", type=int, default=60)
    options = parser.parse_args()
    main(options.mib << 18, options.calls)
