"""bitsandbytes 0.50.2 and these kernels: decoding gives the same bits, encoding does but for what is listed.

All tensors are 1-D here: its AVX-512 decoder of 4-bit codes reads wrong absmax for many 2-D shapes.
"""

import functools
import platform
from types import ModuleType

import numpy as np
import pytest
from kernel_samples import FLOATS, Array, as_float, bits, blocks, code_count, decode, encode, sample

from tensorwire.kernels import tables

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")
import bnb_compat

pytestmark = pytest.mark.skipif(
    bitsandbytes.__version__ != "0.50.2", reason=f"bitsandbytes is {bitsandbytes.__version__}, not 0.50.2"
)

KINDS = ("normal", "weights", "magnitudes", "bits", "subnormal", "sparse", "zeros", "ties")
LENGTHS = (1, 2, 63, 64, 65, 1000, 4096, 50_001)
CODE = {"nf4": tables.NF4_CODE, "fp4": tables.FP4_CODE, "int8": tables.INT8_CODE}
INFINITY = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
MAGNITUDE = {"float32": 0x7FFFFFFF, "float16": 0x7FFF, "bfloat16": 0x7FFF}
# Beside its CUDA library bitsandbytes has no native code for the CPU, but PyTorch code that rounds float16 twice.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Where it gives zeros for subnormal results: an instruction of its CPU code does, and its CUDA library all of it.
FLUSHED = {
    "cpu": lambda dtype, method: dtype == "bfloat16" and method != "int8",
    "cuda": lambda dtype, method: dtype != "float16",
}
TORCH_DTYPE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module", autouse=True)
def one_quiet_thread():
    """No threads, and no compilation of bitsandbytes' PyTorch code: a compiler run for each length."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
    torch.set_num_threads(threads)


def tensor(values: Array) -> "torch.Tensor":
    if values.dtype == np.uint16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def array(values: "torch.Tensor") -> Array:
    values = values.reshape(-1)
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16)
    return values.numpy()


@functools.cache
def bnb_encode(method: str, kind: str, n: int, blocksize: int, dtype: str) -> tuple[Array, Array, Array]:
    """The input, and bitsandbytes' codes and absmax for it."""
    values = as_float(sample(kind, n, 50), dtype)
    if method == "int8":
        code = torch.from_numpy(CODE[method].copy())
        codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(tensor(values), code, blocksize)
    else:
        codes, absmax = torch.ops.bitsandbytes.quantize_4bit(tensor(values), blocksize, method, torch.uint8)
    return values, array(codes), array(absmax)


@functools.cache
def bnb_decode(method: str, n: int, blocksize: int, dtype: str, exponent: int) -> tuple[Array, Array, Array]:
    """Random codes and absmax around 2**exponent, and what bitsandbytes makes of them."""
    rng = np.random.default_rng([n, blocksize])
    codes = rng.integers(0, 256, code_count(method, n), dtype=np.uint8)
    absmax = (np.abs(rng.standard_normal(blocks(n, blocksize))) * 2.0**exponent).astype(np.float32)
    if method == "int8":
        out = torch.ops.bitsandbytes.dequantize_blockwise(
            tensor(codes).to(DEVICE),
            tensor(absmax).to(DEVICE),
            torch.from_numpy(CODE[method].copy()).to(DEVICE),
            blocksize,
            TORCH_DTYPE[dtype],
        )
    else:
        out = torch.ops.bitsandbytes.dequantize_4bit(
            tensor(codes).to(DEVICE), tensor(absmax).to(DEVICE), blocksize, method, [n], TORCH_DTYPE[dtype]
        )
    return codes, absmax, array(out.cpu())


def unpacked(codes: Array) -> Array:
    return np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)


def normalized(values: Array, absmax: Array, blocksize: int) -> Array:
    inverse = np.float32(1) / np.maximum(absmax, np.float32(1e-38))
    return values * np.repeat(inverse, blocksize)[: values.size]


class TestDecode:
    @pytest.mark.parametrize("exponent", [0, 20, -130])
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("method", CODE)
    def test_same_bits(self, kernels: ModuleType, method: str, dtype: str, exponent: int) -> None:
        for n in LENGTHS:
            for blocksize in (32, 64, 4096):
                codes, absmax, expected = bnb_decode(method, n, blocksize, dtype, exponent)
                found = decode(kernels, method, codes, absmax, n, blocksize, dtype)
                expected, found = bits(expected), bits(found)
                # What is beyond the type becomes infinite there, and the largest finite value here.
                infinity = INFINITY[dtype]
                expected = np.where(expected & MAGNITUDE[dtype] == infinity, expected - 1, expected)
                negative_zero = 0x80000000 if dtype == "float32" else 0x8000
                if method == "fp4":
                    # Code 8 is 0.0 in its table in Python, and -0.0 in the one in C++.
                    expected = np.where(expected == negative_zero, 0, expected)
                    found = np.where(found == negative_zero, 0, found)
                different = expected != found
                if FLUSHED[DEVICE](dtype, method):
                    normal = 0x00800000 if dtype == "float32" else 0x0080
                    different &= ~((found & MAGNITUDE[dtype] < normal) & (expected & MAGNITUDE[dtype] == 0))
                assert not different.any(), (n, blocksize)

    def test_same_as_its_python_formula(self, kernels: ModuleType) -> None:
        # Block sizes of 2048 and more, and odd lengths, go that way on AVX-512; this takes it anywhere.
        from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

        n, blocksize = 1000, 64
        for method in ("nf4", "fp4"):
            codes, absmax, _ = bnb_decode(method, n, blocksize, "float32", 0)
            for dtype in FLOATS:
                code = torch.from_numpy(CODE[method].copy())
                expected = _dequantize_4bit_compute(
                    tensor(codes), tensor(absmax), code, blocksize, (n,), TORCH_DTYPE[dtype]
                )
                found = decode(kernels, method, codes, absmax, n, blocksize, dtype)
                assert (bits(found) == bits(array(expected))).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
class TestTranscription:
    """`bnb_compat` is what the installed bitsandbytes does, so that its list of differences is complete."""

    @pytest.mark.parametrize("method", ["nf4", "fp4"])
    def test_4bit(self, method: str, kind: str, dtype: str) -> None:
        for n in LENGTHS:
            for blocksize in (32, 64, 4096):
                values, codes, absmax = bnb_encode(method, kind, n, blocksize, dtype)
                values = array(tensor(values).float())
                found, found_absmax = bnb_compat.cpu_quantize_4bit(values, CODE[method], blocksize=blocksize)
                assert (found == codes).all()
                assert (bits(found_absmax) == bits(absmax)).all()

    @pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="transcribed from the x86 code")
    def test_int8(self, kind: str, dtype: str) -> None:
        for n in LENGTHS:
            for blocksize in (1, 7, 64, 4096):
                values, codes, absmax = bnb_encode("int8", kind, n, blocksize, dtype)
                values = array(tensor(values).float())
                found, found_absmax = bnb_compat.cpu_quantize_int8(values, CODE["int8"], blocksize=blocksize)
                assert (found == codes).all()
                assert (bits(found_absmax) == bits(absmax)).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
class TestEncode:
    def test_nf4_equals_bitsandbytes_on_the_cpu(self, kernels: ModuleType, kind: str, dtype: str) -> None:
        """All full blocks; in a partial one a quotient takes the place of a product."""
        for n in LENGTHS:
            for blocksize in (32, 64, 4096):
                values, codes, absmax = bnb_encode("nf4", kind, n, blocksize, dtype)
                _, found, found_absmax = encode(kernels, "nf4", values, blocksize)
                full = n - n % blocksize
                assert (found[: full // 2] == codes[: full // 2]).all()
                assert (bits(found_absmax)[: n // blocksize] == bits(absmax)[: n // blocksize]).all()

    def test_int8_differs_by_the_width_of_a_bin(self, kernels: ModuleType, kind: str, dtype: str) -> None:
        for n in LENGTHS:
            for blocksize in (64, 4096):
                values, codes, absmax = bnb_encode("int8", kind, n, blocksize, dtype)
                _, found, found_absmax = encode(kernels, "int8", values, blocksize)
                assert (bits(found_absmax) == bits(absmax)).all()
                # Its reciprocal of a smaller absmax is infinite.
                regular = (np.repeat(absmax, blocksize)[:n] >= 2.0**-126) | (kind == "zeros")
                y = normalized(array(tensor(values).float()), absmax, blocksize).astype(np.float64)
                ours, theirs = (np.abs(tables.INT8_CODE[q].astype(np.float64) - y) for q in (found, codes))
                zero_block = np.repeat(absmax == 0, blocksize)[:n]
                assert (codes[zero_block] == 0).all() and (found[zero_block] == 127).all()
                compared = regular & ~zero_block
                assert (theirs <= ours + 2 / 65535)[compared].all()
                assert (ours <= theirs + 2.0**-24)[compared].all()

    def test_int8_equals_bitsandbytes_on_cuda(self, kernels: ModuleType, kind: str, dtype: str) -> None:
        values, _, absmax = bnb_encode("int8", kind, 50_001, 64, dtype)
        _, found, _ = encode(kernels, "int8", values, 64)
        y = normalized(array(tensor(values).float()), absmax, 64)
        assert (found == bnb_compat.cuda_int8_codes(y, CODE["int8"])).all()

    def test_fp4_equals_bitsandbytes_on_cuda(self, kernels: ModuleType, kind: str, dtype: str) -> None:
        values = as_float(sample(kind, 50_000, 51), dtype)
        _, found, absmax = encode(kernels, "fp4", values, 64)
        y = normalized(array(tensor(values).float()), absmax, 64)
        assert (unpacked(found) == bnb_compat.cuda_fp4_codes(y)).all()


@pytest.mark.parametrize("kind", ["normal", "weights", "magnitudes", "sparse"])
def test_fp4_decodes_to_the_values_of_the_cpu(kernels: ModuleType, kind: str) -> None:
    """Its thresholds are up to 14 ulp away and its codes for small values mirrored, but zero is zero."""
    for n in (64, 4096, 49_984):
        values, codes, absmax = bnb_encode("fp4", kind, n, 64, "float32")
        _, found, _ = encode(kernels, "fp4", values, 64)
        ours, theirs = (decode(kernels, "fp4", q, absmax, n, 64, "float32") for q in (found, codes))
        assert (ours == theirs).all()
