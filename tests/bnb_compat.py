"""How bitsandbytes 0.50.2 encodes, transcribed to NumPy from its behaviour: test-only, finite float32 input.

Two encoders of bitsandbytes differ from `tensorwire.kernels` on purpose, and from each other. The CPU one
(backends/default/ops.py, csrc/cpu_ops.cpp) runs wherever the tests do, so `cpu_quantize_*` prove that every
bit of difference is one of those listed here:

- 4 bits: a last partial block is divided by its absmax, and its stored absmax is at least 1e-38;
- fp4: midpoints of the code table as thresholds; 0 < y <= 0.0026 is code 8, -0.0026 < y <= 0 is code 0;
- int8: y is looked up in 65536 uniform bins, and a zero block is code 0.

The CUDA one (csrc/kernels.cu) does not run here: `cuda_*_codes` are its searches, of a normalized y.
"""

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

TINY = np.float32(1e-38)
ONE = np.float32(1)


def _absmax(values: Float32, blocksize: int) -> Float32:
    return np.array([np.abs(values[i : i + blocksize]).max() for i in range(0, values.size, blocksize)], np.float32)


def cpu_quantize_4bit(values: Float32, code: Float32, *, blocksize: int) -> tuple[Codes, Float32]:
    """Packed codes and absmax of the PyTorch encoder; `code` is the table of nf4 or fp4."""
    order = np.argsort(code, kind="stable")
    thresholds = (code[order][:-1] + code[order][1:]) / np.float32(2)
    full = values.size - values.size % blocksize
    absmax = _absmax(values, blocksize)
    inverse = ONE / np.maximum(absmax[: full // blocksize], TINY)
    y = np.concatenate([values[:full] * np.repeat(inverse, blocksize), values[full:]])
    if full < values.size:
        absmax[-1] = max(absmax[-1], TINY)
        y[full:] /= absmax[-1]
    if y.size % 2:
        y = np.append(y, np.float32(0))
    q = order[np.searchsorted(thresholds, np.clip(y, -ONE, ONE), side="left")].astype(np.uint8)
    return q[0::2] << 4 | q[1::2], absmax


def _cpu_int8_bins(code: Float32) -> Codes:
    midpoints = np.float32(0.5) * (code[:-1] + code[1:])
    centres = -ONE + np.arange(65536, dtype=np.float32) * np.float32(2) / np.float32(65535)
    return np.searchsorted(midpoints, centres, side="left").astype(np.uint8)


def cpu_quantize_int8(values: Float32, code: Float32, *, blocksize: int) -> tuple[Codes, Float32]:
    """Codes and absmax of the C++ encoder on x86; `code` is the dynamic map."""
    absmax = _absmax(values, blocksize)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        # Infinite for an absmax below 2**-128; then every y but 0 * inf is clamped to an end.
        y = values * np.repeat(ONE / absmax, blocksize)[: values.size]
        # The compiler contracts (clamp(y) + 1) * 0.5 * 65535 + 0.5 to a fused multiply-add. In float64 its
        # product and sum are exact, and the conversion is its one rounding.
        half = (np.clip(y, -ONE, ONE) + ONE) * np.float32(0.5)
        position = (half.astype(np.float64) * 65535 + 0.5).astype(np.float32)
    position[np.isnan(position)] = 0
    q = _cpu_int8_bins(code)[position.astype(np.uint16)]
    q[np.repeat(absmax == 0, blocksize)[: values.size]] = 0
    return q, absmax


def cuda_fp4_codes(y: Float32) -> Codes:
    """A tree of strict comparisons of the magnitude; the sign bit is that of a y below zero."""
    magnitude = np.abs(y)

    def above(literal: float) -> npt.NDArray[np.bool_]:
        return magnitude > np.float32(literal)

    upper = np.where(above(0.583333), np.where(above(0.8333333), 3, 2), np.where(above(0.4166667), 5, 4))
    middle = np.where(above(0.20833333), 7, 6)
    lower = np.where(above(0.00260417), 1, 0)
    level = np.where(above(0.29166667), upper, np.where(above(0.0859375), middle, lower))
    return (level + np.where(y < 0, 8, 0)).astype(np.uint8)


def cuda_int8_codes(y: Float32, code: Float32) -> Codes:
    """A binary search for a pivot next to y, then a comparison with the midpoint on y's side of the pivot."""
    pivot, lower, upper = np.full(y.shape, 127), np.zeros(y.shape, int), np.full(y.shape, 255)
    for step in (64, 32, 16, 8, 4, 2, 1):
        above = y > code[pivot]
        lower, upper = np.where(above, pivot, lower), np.where(above, upper, pivot)
        pivot = np.where(above, pivot + step, pivot - step)
    above = y > code[pivot]
    to_upper = y > (code[upper] + code[pivot]) * np.float32(0.5)
    to_lower = y < (code[lower] + code[pivot]) * np.float32(0.5)
    return np.where(above, np.where(to_upper, upper, pivot), np.where(to_lower, lower, pivot)).astype(np.uint8)
