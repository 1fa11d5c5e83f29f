"""Throughput of the native kernels, in GB/s of float32, beside a memcpy of the float32 in the same run.

    python bench/kernels.py [--mib 0.25,64,512] [--tiers avx512,avx2,portable] [--threads 1] [--repeats 9] [--limits]

One warm output per kernel, medians, all kernels taking turns so that a busy moment hits them alike.

--limits: beside each kernel the bytes of memory it touches per element, what bare loops of loads and non-temporal
stores reach at that ratio over the same buffers (limits.c, compiled when asked for; AVX-512), and the share reached.

--checksums: instead, each encoder in frames of 1 MiB as streams make them, without and with the CRC32C of each.
"""

import argparse
import ctypes
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tensorwire.kernels import _native

BLOCKSIZE = {"4bit": 64, "int8": 4096, "linear": 256}
# Bytes read and written per float32 element, as lines of the bare loop that comes nearest.
LINES = {
    "memcpy": (1, 1),
    "crc32c": (1, 0),
    "absmax": (1, 0),
    "nf4 encode": (7, 1),
    "nf4 decode": (1, 7),
    "fp4 encode": (7, 1),
    "fp4 decode": (1, 7),
    "int8 encode": (4, 1),
    "int8 decode": (1, 4),
    "linear encode": (4, 1),
    "linear decode": (1, 4),
    "float16 encode": (2, 1),
    "float16 decode": (1, 2),
    "bfloat16 encode": (2, 1),
    "bfloat16 decode": (1, 2),
}
BYTES = {(1, 1): 8, (1, 0): 4, (7, 1): 4.5625, (1, 7): 4.5625, (4, 1): 5, (1, 4): 5, (2, 1): 6, (1, 2): 6}
FRAME = 1 << 20
LINE = 64


def warm(size: int, dtype: type[np.generic]) -> np.ndarray:
    array = np.empty(size, dtype)
    array.fill(0)
    return array


def workload(n: int, loops: ctypes.CDLL | None) -> dict[str, Callable[[], object]]:
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
    kernels: dict[str, Callable[[], object]] = {
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
    if loops:
        for reads, writes in BYTES:
            for ahead in (0, 4096, 8192):
                kernels[loop_name(reads, writes, ahead)] = bare_loop(loops, x, y, reads, writes, ahead)
    return kernels


def loop_name(reads: int, writes: int, ahead: int) -> str:
    return f"{reads}:{writes} ahead {ahead}"


def bare_loop(
    loops: ctypes.CDLL, x: np.ndarray, y: np.ndarray, reads: int, writes: int, ahead: int
) -> Callable[[], object]:
    """A loop whose larger side has the bytes of the float32 array."""
    steps = x.nbytes // LINE // max(reads, writes) - 1
    call = getattr(loops, f"loop_{reads}_{writes}")
    out = y.ctypes.data + -y.ctypes.data % LINE
    arguments = (ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out), ctypes.c_size_t(steps), ctypes.c_size_t(ahead))

    def run(keep: tuple[np.ndarray, np.ndarray] = (x, y)) -> object:
        return call(*arguments)

    return run


def compiled_loops() -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or "avx512" not in _native.supported():
        raise SystemExit("--limits needs a C compiler and AVX-512")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limits.so"
        source = Path(__file__).with_name("limits.c")
        subprocess.run([compiler, "-O3", "-mavx512f", "-shared", "-fPIC", "-o", library, source], check=True)
        return ctypes.CDLL(str(library))


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


def print_limits(mib: float, n: int, repeats: int) -> None:
    """The best tier beside what bare loops reach."""
    seconds = measure(workload(n, compiled_loops()), max(1, int(16 / mib)), repeats)
    rate = {name: n * 4 / time / 1e9 for name, time in seconds.items()}
    print(f"\n{mib:g} MiB".ljust(17) + "  GB/s  of memcpy  bytes/element  limit  of it")
    for name, lines in LINES.items():
        limit = max(rate[loop_name(*lines, ahead)] for ahead in (0, 4096, 8192))
        print(
            f"{name:16}{rate[name]:7.1f}{rate[name] / rate['memcpy']:11.2f}{BYTES[lines]:15.4g}{limit:7.1f}"
            f"{rate[name] / limit:7.0%}"
        )


def encode_frame(codec: str, x: np.ndarray, payload: np.ndarray, crc: np.ndarray | None) -> None:
    """One frame as `codec` encodes it: absmax or scales, then codes."""
    k = _native
    if codec in ("fp16", "bf16"):
        k.cast(x, payload[: 2 * x.size].view(np.float16 if codec == "fp16" else np.uint16), crc)
    elif codec == "int8-linear":
        stats, codes = np.split(payload, [2 * (x.size // BLOCKSIZE["linear"])])
        k.quantize_linear(x, codes[: x.size].view(np.int8), stats.view(np.uint16), crc, blocksize=BLOCKSIZE["linear"])
    elif codec == "int8":
        stats, codes = np.split(payload, [4 * (x.size // BLOCKSIZE["int8"])])
        k.quantize_int8(x, codes[: x.size], stats.view(np.float32), crc, blocksize=BLOCKSIZE["int8"])
    else:
        stats, codes = np.split(payload, [4 * (x.size // BLOCKSIZE["4bit"])])
        options = {"blocksize": BLOCKSIZE["4bit"], "quant_type": codec}
        k.quantize_4bit(x, codes[: x.size // 2], stats.view(np.float32), crc, **options)


def print_checksums(mib: float, n: int, repeats: int) -> None:
    """Encoding frame by frame into one warm buffer, without and with the checksum of each payload."""
    # Elements a frame.
    sizes = {"nf4": 1 << 20, "fp4": 1 << 20, "int8": 1 << 20, "int8-linear": 1 << 20, "fp16": 1 << 19, "bf16": 1 << 19}
    values = np.resize(np.random.default_rng(0).standard_normal(min(n, 1 << 22), dtype=np.float32), n)
    payload, crc = warm(2 * FRAME, np.uint8), warm(1, np.uint32)
    contenders: dict[str, Callable[[], object]] = {}

    def encode(codec: str, crc: np.ndarray | None) -> None:
        for start in range(0, n, sizes[codec]):
            encode_frame(codec, values[start : start + sizes[codec]], payload, crc)

    for name in sizes:
        contenders[name] = lambda c=name: encode(c, None)
        contenders[f"{name} with crc"] = lambda c=name: encode(c, crc)
    copied = warm(n, np.float32)
    contenders["raw"] = lambda: np.copyto(copied, values)
    contenders["crc32c"] = lambda: [_native.crc32c(values[i : i + FRAME]) for i in range(0, n, FRAME)]
    seconds = measure(contenders, max(1, int(16 / mib)), repeats)
    # Raw encoding hands out the tensor's own memory; its checksum is set beside a copy.
    seconds["raw with crc"] = seconds["raw"] + seconds["crc32c"]
    print(f"\n{mib:g} MiB".ljust(15) + " encode  with CRC32C  it costs")
    for name in (*sizes, "raw"):
        plain, checked = seconds[name], seconds[f"{name} with crc"]
        rates = [n * 4 / time / 1e9 for time in (plain, checked)]
        print(f"{name:14}{rates[0]:8.1f}{rates[1]:13.1f}{checked / plain - 1:10.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", default="0.25,64,512", help="sizes of the float32 input; default: %(default)s")
    parser.add_argument("--tiers", default=",".join(_native.supported()), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--limits", action="store_true")
    parser.add_argument("--checksums", action="store_true")
    arguments = parser.parse_args()
    tiers = arguments.tiers.split(",")
    _native.set_threads(arguments.threads)
    print(
        f"{platform.processor() or platform.machine()}, {platform.system()}, Python {platform.python_version()}, "
        f"NumPy {np.__version__}, {arguments.threads} thread(s); GB/s of float32 (times memcpy)"
    )
    for mib in map(float, arguments.mib.split(",")):
        n = int(mib * 2**20) // 4 // 4096 * 4096
        if arguments.limits or arguments.checksums:
            (print_limits if arguments.limits else print_checksums)(mib, n, arguments.repeats)
            continue
        kernels = workload(n, None)
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
