"""The closed set of element types: a number on the wire, a name, a size. Numbers are never reused."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class DType:
    """An element type."""

    number: int
    """Its number on the wire."""
    name: str
    """As torch and ml_dtypes spell it."""
    itemsize: int
    """Bytes of one element."""

    def __str__(self) -> str:
        return self.name

    @property
    def parts(self) -> int:
        """How many numbers an element is: two of a complex dtype, the real part first."""
        return 2 if self.name.startswith("complex") else 1

    @property
    def part_size(self) -> int:
        """Bytes of one of them."""
        return self.itemsize // self.parts


BOOL: Final = DType(1, "bool", 1)
UINT8: Final = DType(2, "uint8", 1)
INT8: Final = DType(3, "int8", 1)
UINT16: Final = DType(4, "uint16", 2)
INT16: Final = DType(5, "int16", 2)
UINT32: Final = DType(6, "uint32", 4)
INT32: Final = DType(7, "int32", 4)
UINT64: Final = DType(8, "uint64", 8)
INT64: Final = DType(9, "int64", 8)
FLOAT16: Final = DType(16, "float16", 2)
BFLOAT16: Final = DType(17, "bfloat16", 2)
FLOAT32: Final = DType(18, "float32", 4)
FLOAT64: Final = DType(19, "float64", 8)
COMPLEX32: Final = DType(24, "complex32", 4)
COMPLEX64: Final = DType(25, "complex64", 8)
COMPLEX128: Final = DType(26, "complex128", 16)
FLOAT8_E4M3FN: Final = DType(32, "float8_e4m3fn", 1)
FLOAT8_E5M2: Final = DType(33, "float8_e5m2", 1)
FLOAT8_E4M3FNUZ: Final = DType(34, "float8_e4m3fnuz", 1)
FLOAT8_E5M2FNUZ: Final = DType(35, "float8_e5m2fnuz", 1)
FLOAT8_E8M0FNU: Final = DType(36, "float8_e8m0fnu", 1)
# Two values a byte; a shape counts bytes, as in torch.
FLOAT4_E2M1FN_X2: Final = DType(40, "float4_e2m1fn_x2", 1)

INTEGERS: Final = (UINT8, INT8, UINT16, INT16, UINT32, INT32, UINT64, INT64)
ALL: Final[tuple[DType, ...]] = tuple(value for value in globals().values() if isinstance(value, DType))
BY_NUMBER: Final[dict[int, DType]] = {dtype.number: dtype for dtype in ALL}
BY_NAME: Final[dict[str, DType]] = {dtype.name: dtype for dtype in ALL}
