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
def nonzero_blocks(values: object, marks: object, *, blocksize: int) -> int: ...
def byte_histogram(values: object, counts: object, *, every: int = 1) -> None: ...
def huffman_encode(values: object, codes: object) -> int: ...
def huffman_decode(codes: object, out: object) -> bool: ...
def difference(base: object, values: object, out: object, *, width: int) -> None: ...
def add_difference(differences: object, values: object, *, width: int) -> None: ...
def encode_changes(base: object, values: object, codes: object, work: object) -> tuple[int, int]: ...
def decode_changes(codes: object, values: object, work: object) -> int: ...
def split_planes(values: object, marks: object, planes: object) -> None: ...
def merge_planes(planes: object, marks: object, out: object) -> None: ...
def select_largest(
    values: object,
    positions: object,
    coefficients: object,
    *,
    width: int,
    rows: int,
    cols: int,
    k: int,
    tables: object | None = None,
) -> float: ...
def decay_and_select(
    kept: object,
    values: object,
    positions: object,
    coefficients: object,
    *,
    beta: float,
    width: int,
    rows: int,
    cols: int,
    k: int,
    tables: object | None = None,
) -> float: ...
def add_selected(
    positions: object,
    coefficients: object,
    sums: object,
    *,
    weight: float,
    width: int,
    rows: int,
    cols: int,
    k: int,
    tables: object | None = None,
) -> bool: ...
def combine_selected(
    positions: object,
    values: object,
    weights: object,
    out: object,
    *,
    divisor: float,
    present: bool,
    signs: bool,
    width: int,
    rows: int,
    cols: int,
    k: int,
    tables: object | None = None,
) -> bool: ...
def encode_positions(
    positions: object, codes: object, *, elements: int, width: int, rows: int, cols: int, k: int
) -> int: ...
def decode_positions(
    codes: object, positions: object, *, elements: int, width: int, rows: int, cols: int, k: int
) -> bool: ...
def sum_magnitudes(values: object) -> tuple[float, int, int]: ...
def pack_values(values: object, steps: object, codes: object, *, bits: int) -> None: ...
def unpack_values(codes: object, steps: object, values: object, *, bits: int) -> bool: ...
def decay_and_add(kept: object, values: object, *, beta: float) -> float: ...
def divide_by_rms(values: object, roots: object, out: object, *, beta: float, scale: float, eps: float) -> None: ...

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
