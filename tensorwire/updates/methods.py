"""The methods of compressors. Like a codec, a method is written as a name and parameters.

demo:k=4                       momentum, DCT, top-k of each chunk, signs: DeMo (arXiv:2411.19870)
topk:k=64,values=2bit          error feedback, top-k of each chunk: SparseLoCo (arXiv:2508.15706)
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Final

from tensorwire.codecs import Choice, Codec, LowRank, Range, Real, Sparse, Spelled, parameter, spelled
from tensorwire.errors import EncodeError

_BITS: Final = {"sign": 1, "2bit": 2, "4bit": 4, "8bit": 8, "16bit": 16}
_SIDE: Final = 64  # rows and columns of a chunk that is transformed
_WIDEST: Final = 1 << 17  # columns of a matrix that is cut into bands of so many rows


@dataclass(frozen=True, repr=False)
class Method(Spelled):
    """A method. At each step, what is kept is multiplied by `beta`, and `alpha` times what is sent is subtracted.

    `beta` 1 and `alpha` 1 are error feedback; `beta` below 1 is momentum; `beta` 0 keeps nothing.
    """

    beta: float = parameter(1.0, Real(0, 1))
    alpha: float = parameter(1.0, Real(0, 1))

    # Of a message: its slices take four times as much, decoded.
    frame_size: ClassVar[int] = 16 << 20

    def codec(self, shape: tuple[int, ...]) -> Codec:
        """The codec of a tensor of this shape."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class TopK(Method):
    """The `k` largest of each 4096 elements or, with `dct`, of the DCT coefficients of each 64 by 64 chunk.

    A tensor of more than two dimensions is a matrix whose rows are its first dimension; a vector is laid out in rows
    of 64. `scale`: of the values, one for the whole tensor, or a power of two for each chunk.
    """

    k: int = parameter(64, Range(1, 4096))
    values: str = parameter("2bit", Choice(tuple(_BITS)))
    dct: bool = parameter(False, Choice((False, True)))
    scale: str = parameter("tensor", Choice(("tensor", "chunk")))

    name = "topk"

    def codec(self, shape: tuple[int, ...]) -> Codec:
        """The codec of a tensor of this shape: chunks of nearly equal size."""
        bits, scaled = _BITS[self.values], self.scale == "chunk"
        if not self.dct:
            return Codec((Sparse(k=self.k, bits=bits, scaled=scaled),))
        rows, width = _matrix(shape)
        chunk = {"rows": _side(rows), "cols": _side(width), "width": width}
        return Codec((Sparse(k=self.k, bits=bits, dct=True, scaled=scaled, **chunk),))


@dataclass(frozen=True, repr=False)
class Demo(TopK):
    """Momentum, of which the largest DCT coefficients are sent and subtracted."""

    beta: float = parameter(0.999, Real(0, 1))
    k: int = parameter(32, Range(1, 4096))
    values: str = parameter("sign", Choice(tuple(_BITS)))
    dct: bool = parameter(True, Choice((False, True)))

    name = "demo"


@dataclass(frozen=True, repr=False)
class Factors(Method):
    """Two factors of `rank` columns for each matrix; of vectors and small matrices, the `k` largest of each chunk."""

    rank: int = parameter(4, Range(1, 64))
    bits: int = parameter(2, Range(1, 16, power_of_two=True))
    k: int = parameter(64, Range(1, 4096))

    name = "lowrank"
    frame_size = 64 << 20  # each slice repeats a factor

    def codec(self, shape: tuple[int, ...]) -> Codec:
        """The codec of a tensor of this shape."""
        rows, width = _matrix(shape)
        if len(shape) < 2 or self.rank * (rows + width) >= rows * width:
            return Codec((Sparse(k=self.k, bits=self.bits),))
        return Codec((LowRank(rank=self.rank, bits=self.bits, width=width),))


METHODS: Final[dict[str, type[Method]]] = {row.name: row for row in (Demo, TopK, Factors)}


def method(spec: "str | Method") -> Method:
    """The method that a spec string names. Raises EncodeError."""
    if not isinstance(spec, (str, Method)):
        raise EncodeError(f"a method is a spec string, such as 'demo:k=16', not {type(spec).__name__}")
    return spec if isinstance(spec, Method) else spelled(spec, _by_name)


@lru_cache(maxsize=1024)
def codec_for(chosen: Method, shape: tuple[int, ...]) -> Codec:
    """The codec of a tensor, computed once for each shape."""
    return chosen.codec(shape)


def _by_name(name: str) -> type[Method]:
    if name not in METHODS:
        raise EncodeError(f"unknown method {name!r:.40}; known: {', '.join(METHODS)}")
    return METHODS[name]


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor. A matrix that is too wide for bands of 64 rows is a vector as well."""
    total = 1
    for size in shape:
        total *= size
    width = total // shape[0] if len(shape) > 1 and total else 0
    if not 0 < width <= _WIDEST:
        width = min(_SIDE, max(total, 1))
    return max(total // width, 1), width


def _side(length: int) -> int:
    """As few chunks as can be, of nearly equal size."""
    chunks = -(-length // _SIDE)
    return -(-length // chunks)
