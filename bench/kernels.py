"""Throughput of the native kernels, in GB/s of float32, beside a memcpy of the float32 in the same run.

    python bench/kernels.py [--mib 0.25,64,512] [--tiers avx512,avx2,portable] [--threads 1] [--repeats 9]

One warm output per kernel, medians, all kernels taking turns so that a busy moment hits them alike.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np

from tensorwire.kernels import _native

BLOCKSIZE = {"4bit": 64, "int8": 4096, "linear": 256}


def warm(size: int, dtype: type[np.generic]) -> np.ndarray:
    array = np.empty(size, dtype)
    array.fill(0)
    return array


def workload(n: int) -> dict[str, Callable[[], object]]:
    sample = np.random.default_rng(0).standard_normal(min(n, 1 << 22), dtype=np.float32)
    x, y = np.resize(sample, n), warm(n, np.float32)
    half, brain = warm(n, np.float16), warm(n, np.uint16)
    packed, codes, linear = warm(n // 2, np.uint8), warm(n, np.uint8), warm(n, np.int8)
    absmax4 = warm(-(-n // BLOCKSIZE["4bit"]), np.float32)
    absmax8 = warm(-(-n // BLOCKSIZE["int8"]), np.float32)
    scales = warm(-(-n // BLOCKSIZE["linear"]), np.uint16)
    k = _native
    nf4 = {"blocksize": BLOCKSIZE["4bit"], "quant_type": "nf4"}
    fp4 = {"blocksize": BLOCKSIZE["4bit"], "quant_type": "fp4"}
    int8, lin = {"blocksize": BLOCKSIZE["int8"]}, {"blocksize": BLOCKSIZE["linear"]}
    return {
        "memcpy": lambda: np.copyto(y, x),
        "crc32c": lambda: k.crc32c(x),
        "absmax": lambda: k.blockwise_absmax(x, absmax4, blocksize=BLOCKSIZE["4bit"]),
        "nf4 encode": lambda: k.quantize_4bit(x, packed, absmax4, **nf4),
        "nf4 decode": lambda: k.dequantize_4bit(packed, absmax4, y, **nf4),
        "fp4 encode": lambda: k.quantize_4bit(x, packed, absmax4, **fp4),
        "fp4 decode": lambda: k.dequantize_4bit(packed, absmax4, y, **fp4),
        "int8 encode": lambda: k.quantize_int8(x, codes, absmax8, **int8),
        "int8 decode": lambda: k.dequantize_int8(codes, absmax8, y, **int8),
        "linear encode": lambda: k.quantize_linear(x, linear, scales, **lin),
        "linear decode": lambda: k.dequantize_linear(linear, scales, y, **lin),
        "float16 encode": lambda: k.cast(x, half),
        "float16 decode": lambda: k.cast(half, y),
        "bfloat16 encode": lambda: k.cast(x, brain),
        "bfloat16 decode": lambda: k.cast(brain, y),
    }


def measure(kernels: dict[str, Callable[[], object]], calls: int, repeats: int) -> dict[str, float]:
    """Median seconds a call."""
    times: dict[str, list[float]] = {name: [] for name in kernels}
    for turn in range(repeats + 1):
        for name, call in kernels.items():
            began = time.perf_counter()
            for _ in range(calls):
                call()
            if turn:  # the first turn warms up
                times[name].append((time.perf_counter() - began) / calls)
    return {name: statistics.median(series) for name, series in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", default="0.25,64,512", help="sizes of the float32 input; default: %(default)s")
    parser.add_argument("--tiers", default=",".join(_native.supported()), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    tiers = arguments.tiers.split(",")
    _native.set_threads(arguments.threads)
    print(f"{platform.processor() or platform.machine()}, {platform.system()}, Python {platform.python_version()}, "
          f"NumPy {np.__version__}, {arguments.threads} thread(s); GB/s of float32 (times memcpy)")
    for mib in map(float, arguments.mib.split(",")):
        n = int(mib * 2**20) // 4 // 4096 * 4096
        kernels = workload(n)
        rows: dict[str, list[str]] = {name: [] for name in kernels}
        for tier in tiers:
            _native.use(tier)
            seconds = measure(kernels, max(1, int(16 / mib)), arguments.repeats)
            for name, row in rows.items():
                row.append(f"{n * 4 / seconds[name] / 1e9:7.1f} ({seconds['memcpy'] / seconds[name]:4.2f})")
        print(f"\n{mib:g} MiB".ljust(17) + "".join(f"{tier:>17}" for tier in tiers))
        for name, row in rows.items():
            print(f"{name:16}" + "".join(f"{cell:>17}" for cell in row))


if __name__ == "__main__":
    main()
