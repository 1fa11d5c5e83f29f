"""Drive every float32 through the native kernels and count what differs from the definition; it must be nothing.

    python bench/exhaustive.py [--tiers avx512,avx2,portable] [--only narrow,widen,nf4,fp4,int8] [--every N]

narrow: all 2**32 float32 patterns to float16 and bfloat16, saturating and not, against the NumPy twin.
widen: all 2**16 patterns of both half types.
nf4, fp4, int8: every float32 from 2**-31 to 1, of both signs, against the thresholds. A 1.0 at the head of each block
makes its absmax 1, so that the normalised value is the value itself. Half-precision inputs follow by widening them.

Takes minutes a tier; --every N does only each Nth of the chunks of 4 Mi values. Prints one line a check, progress goes
to stderr; exits 1 after a mismatch.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

from tensorwire.kernels import _native, _numpy, tables

CHUNK = 1 << 22
BLOCKSIZE = 64
HALVES = {"float16": np.float16, "bfloat16": np.uint16}


def progress(what: str, done: int, total: int) -> None:
    if not sys.stderr.isatty():
        return
    print(f"\r{what}: {done / total:6.1%}", end="" if done < total else "\n", file=sys.stderr, flush=True)


def differences(a: np.ndarray, b: np.ndarray) -> int:
    """How many elements differ in any bit."""
    bits = f"u{a.dtype.itemsize}"
    return int(np.count_nonzero(a.view(bits) != b.view(bits)))


def narrow(tiers: list[str], every: int) -> Iterator[tuple[str, int]]:
    for name, dtype in HALVES.items():
        for saturate in (False, True):
            wrong = dict.fromkeys(tiers, 0)
            expected, out = np.empty(CHUNK, dtype), np.empty(CHUNK, dtype)
            for start in range(0, 1 << 32, every * CHUNK):
                values = np.arange(start, start + CHUNK, dtype=np.uint32).view(np.float32)
                overflows = _numpy.cast(values, expected, saturate=saturate)
                for tier in tiers:
                    _native.use(tier)
                    counted = _native.cast(values, out, saturate=saturate)
                    wrong[tier] += differences(out, expected) + (counted != overflows)
                progress(f"float32 to {name}, saturate={saturate}", start + CHUNK, 1 << 32)
            yield from ((f"{tier} float32 to {name} saturate={saturate}", count) for tier, count in wrong.items())


def widen(tiers: list[str], every: int) -> Iterator[tuple[str, int]]:
    for name, dtype in HALVES.items():
        values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
        expected, out = np.empty(values.size, np.float32), np.empty(values.size, np.float32)
        _numpy.cast(values, expected)
        for tier in tiers:
            _native.use(tier)
            _native.cast(values, out)
            yield f"{tier} {name} to float32", differences(out, expected)


def ranks(ascending: np.ndarray, thresholds: np.ndarray, side: str) -> np.ndarray:
    """The number of thresholds below each value; with side="left" also of those equal to it."""
    ends = np.searchsorted(ascending, thresholds, side)
    return np.repeat(np.arange(thresholds.size + 1), np.diff(ends, prepend=0, append=ascending.size))


def nf4_codes(ascending: np.ndarray) -> np.ndarray:
    return ranks(ascending, tables.NF4_THRESHOLDS, "right")


def fp4_codes(ascending: np.ndarray) -> np.ndarray:
    if ascending[0] >= 0:
        return tables.FP4_CODE_OF_LEVEL[ranks(ascending, tables.FP4_THRESHOLDS, "right")]
    return fp4_codes(-ascending[::-1])[::-1] + 8


def int8_codes(ascending: np.ndarray) -> np.ndarray:
    below = ranks(ascending, tables.INT8_THRESHOLDS, "right")
    not_above = ranks(ascending, tables.INT8_THRESHOLDS, "left")
    return np.where(below % 2 == 0, below, not_above)


def in_blocks(values: np.ndarray, one: np.generic) -> np.ndarray:
    """Values in blocks that each begin with 1.0; padded with the last value."""
    rows = -(-values.size // (BLOCKSIZE - 1))
    blocks = np.empty((rows, BLOCKSIZE), values.dtype)
    blocks[:, 0] = one
    padded = np.pad(values, (0, rows * (BLOCKSIZE - 1) - values.size), mode="edge")
    blocks[:, 1:] = padded.reshape(rows, BLOCKSIZE - 1)
    return blocks.reshape(-1)


def native_codes(blocks: np.ndarray, quant_type: str) -> np.ndarray:
    absmax = np.empty(blocks.size // BLOCKSIZE, np.float32)
    if quant_type == "int8":
        codes = np.empty(blocks.size, np.uint8)
        _native.quantize_int8(blocks, codes, absmax, blocksize=BLOCKSIZE)
    else:
        packed = np.empty(blocks.size // 2, np.uint8)
        _native.quantize_4bit(blocks, packed, absmax, blocksize=BLOCKSIZE, quant_type=quant_type)
        codes = np.stack([packed >> 4, packed & 15], axis=1)
    if not (absmax == 1).all():
        raise AssertionError("the design failed: an absmax is not 1")
    return codes.reshape(-1, BLOCKSIZE)[:, 1:].reshape(-1)


def quantize(
    quant_type: str, expected_codes: Callable[[np.ndarray], np.ndarray], tiers: list[str], every: int
) -> Iterator[tuple[str, int]]:
    first, last = np.array([2.0**-31, 1], np.float32).view(np.uint32).tolist()
    wrong = dict.fromkeys(tiers, 0)
    for sign in (0, 0x80000000):
        for start in range(first, last + 1, every * CHUNK):
            bits = np.arange(start, min(start + CHUNK, last + 1), dtype=np.uint32) | np.uint32(sign)
            ascending = (bits[::-1] if sign else bits).view(np.float32)
            expected = expected_codes(ascending).astype(np.uint8)
            blocks = in_blocks(ascending, np.float32(1))
            for tier in tiers:
                _native.use(tier)
                wrong[tier] += differences(native_codes(blocks, quant_type)[: ascending.size], expected)
            progress(f"{quant_type}, sign {sign >> 31}", bits.size + start - first, last + 1 - first)
    yield from ((f"{tier} {quant_type} float32", count) for tier, count in wrong.items())

    for name, dtype in HALVES.items():
        values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
        wide = np.empty(values.size, np.float32)
        _numpy.cast(values, wide)
        inside = np.abs(wide) <= 1
        values, wide = values[inside], wide[inside]
        order = np.argsort(wide, kind="stable")
        one = np.array([1], np.float32)
        narrow_one = np.empty(1, dtype)
        _numpy.cast(one, narrow_one)
        blocks, wide_blocks = in_blocks(values[order], narrow_one[0]), in_blocks(wide[order], one[0])
        for tier in tiers:
            _native.use(tier)
            count = differences(native_codes(blocks, quant_type), native_codes(wide_blocks, quant_type))
            yield f"{tier} {quant_type} {name}", count


CHECKS: dict[str, Callable[[list[str], int], Iterator[tuple[str, int]]]] = {
    "widen": widen,
    "nf4": lambda tiers, every: quantize("nf4", nf4_codes, tiers, every),
    "fp4": lambda tiers, every: quantize("fp4", fp4_codes, tiers, every),
    "int8": lambda tiers, every: quantize("int8", int8_codes, tiers, every),
    "narrow": narrow,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiers", default=",".join(_native.supported()), help="default: %(default)s")
    parser.add_argument("--only", default=",".join(CHECKS), help="default: %(default)s")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="do each Nth chunk only; default: all")
    arguments = parser.parse_args()
    mismatches = 0
    for check in arguments.only.split(","):
        began = time.perf_counter()
        for what, count in CHECKS[check](arguments.tiers.split(","), arguments.every):
            print(f"{what}: {count} mismatches", flush=True)
            mismatches += count
        print(f"{check}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return 1 if mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
