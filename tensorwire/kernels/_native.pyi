"""The kernels in C++; tensorwire.kernels has their contract."""

def crc32c(data: object, seed: int = 0) -> int: ...
def cast(
    values: object, out: object, crc: object | None = None, *, saturate: bool = False, uncached: bool | None = None
) -> int: ...
def blockwise_absmax(values: object, absmax: object, *, blocksize: int) -> bool: ...
def quantize_4bit(
    values: object, codes: object, absmax: object, crc: object | None = None, *, blocksize: int, quant_type: str
) -> bool: ...
def dequantize_4bit(
    codes: object, absmax: object, out: object, *, blocksize: int, quant_type: str, uncached: bool | None = None
) -> None: ...
def quantize_int8(
    values: object, codes: object, absmax: object, crc: object | None = None, *, blocksize: int
) -> bool: ...
def dequantize_int8(
    codes: object, absmax: object, out: object, *, blocksize: int, uncached: bool | None = None
) -> None: ...
def quantize_linear(
    values: object, codes: object, scales: object, crc: object | None = None, *, blocksize: int
) -> bool: ...
def dequantize_linear(
    codes: object, scales: object, out: object, *, blocksize: int, uncached: bool | None = None
) -> bool: ...
def accumulate(values: object, sums: object, *, weight: float) -> None: ...
def accumulate_4bit(
    codes: object, absmax: object, sums: object, *, weight: float, dtype: str, blocksize: int, quant_type: str
) -> None: ...
def accumulate_int8(
    codes: object, absmax: object, sums: object, *, weight: float, dtype: str, blocksize: int
) -> None: ...
def accumulate_linear(
    codes: object, scales: object, sums: object, *, weight: float, dtype: str, blocksize: int
) -> bool: ...

class default_environment:  # noqa: N801 (it is used as a function is)
    """Round to nearest even and keep subnormals within a `with` block."""

    def __init__(self) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *args: object) -> None: ...

def isa() -> str:
    """The instruction set in use."""

def supported() -> list[str]:
    """The instruction sets that run here, best first."""

def use(tier: str) -> None:
    """Switch to another instruction set; for tests."""

def set_threads(count: int) -> None:
    """Threads a call may use on large arrays, its own included."""

def get_threads() -> int:
    """The number set_threads, or TENSORWIRE_THREADS at import, has set; else 1."""
