"""Codecs: sequences of stages, which streams use without knowing the stages."""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import Any, Final

import numpy as np

from tensorwire.codecs.floats import add_weighted
from tensorwire.codecs.raw import Raw
from tensorwire.codecs.registry import BUILT_IN, by_id
from tensorwire.codecs.stage import Compressor, Encoded, Packer, Sizes, Stage, Sums, Take, Transform
from tensorwire.dtypes import DType
from tensorwire.errors import EncodeError, FormatError, UnsupportedError
from tensorwire.tensor import Extent, TensorView

MAX_STAGES: Final = 8
_ORDER: Final = (Transform, Packer, Compressor)


@dataclass(frozen=True, repr=False)
class Codec:
    """Transforms, one packer, compressors: one way to encode slices. Codecs with equal stages are equal.

    Its repr is the spec string that `parse` rebuilds it from. Raises EncodeError for stages that are out of order,
    appear twice, or are not registered, because no reader could decode the result.
    """

    pipeline: tuple[Stage, ...]

    def __post_init__(self) -> None:
        ranks = [_rank(stage) for stage in self.pipeline]
        if ranks != sorted(ranks) or ranks.count(1) != 1:
            raise EncodeError(f"stages {self} are not in order: transforms, one packer (raw, nf4, ...), compressors")
        if len({stage.id for stage in self.pipeline}) != len(self.pipeline) or len(self.pipeline) > MAX_STAGES:
            raise EncodeError(f"stages {self}: each may appear once, and there may be at most {MAX_STAGES}")
        for stage in self.pipeline:
            _check_registered(stage)

    # What streams need for every frame is computed once.

    @cached_property
    def transforms(self) -> tuple[Transform, ...]:
        """The stages before the packer."""
        return tuple(stage for stage in self.pipeline if isinstance(stage, Transform))

    @cached_property
    def packer(self) -> Packer:
        """The stage that makes bytes."""
        return next(stage for stage in self.pipeline if isinstance(stage, Packer))

    @cached_property
    def compressors(self) -> tuple[Compressor, ...]:
        """The stages after the packer."""
        return tuple(stage for stage in self.pipeline if isinstance(stage, Compressor))

    @cached_property
    def lossless(self) -> bool:
        """Whether decoding gives back what was encoded, bit for bit."""
        return all(stage.lossless for stage in self.pipeline)

    @cached_property
    def exact_length(self) -> bool:
        """Whether a payload's length follows from its count, and is `bound`; otherwise `bound` is an upper bound."""
        return all(stage.exact_length for stage in self.pipeline)

    @cached_property
    def in_place(self) -> bool:
        """Whether the payload is the tensor's own bytes: it can be received in place and be mapped from a file."""
        return self.packer.in_place and len(self.pipeline) == 1

    @cached_property
    def on_device(self) -> bool:
        """Whether slices of tensors on a CUDA device are encoded and decoded there."""
        return self.packer.on_device and not self.transforms

    @cached_property
    def _lossless_fallback(self) -> "Codec":
        return Codec((Raw(), *self.compressors))

    @cached_property
    def _stages(self) -> tuple[tuple[int, ...], ...]:
        return tuple(stage.to_wire() for stage in self.pipeline)

    def stages(self) -> tuple[tuple[int, ...], ...]:
        """The codec as an item descriptor states it."""
        return self._stages

    def lossless_fallback(self) -> "Codec":
        """The codec for tensors that this one cannot represent: raw, with the compressors of this codec."""
        return self._lossless_fallback

    def accepts(self, dtype: DType) -> bool:
        """Whether tensors of this dtype can be encoded; others are sent losslessly."""
        for transform in self.transforms:
            if not transform.accepts(dtype):
                return False
            dtype = transform.output(dtype)
        return self.packer.accepts(dtype)

    def block(self, dtype: DType) -> int:
        """Elements that cannot be divided between slices."""
        block = 1
        for transform in self.transforms:
            block = lcm(block, transform.block(dtype))
            dtype = transform.output(dtype)
        return lcm(block, self.packer.block(dtype))

    def sizes(self, count: int, dtype: DType) -> Sizes:
        """Bytes that `count` elements take before compressors; an upper bound if a stage has no exact length."""
        for transform in self.transforms:
            dtype = transform.output(dtype)
        return self.packer.sizes(count, dtype)

    def bound(self, count: int, dtype: DType) -> int:
        """The most bytes that a payload of `count` elements can have; with `exact_length`, its exact size."""
        size = self.sizes(count, dtype).total
        for compressor in self.compressors:
            size = compressor.bound(size)
        return size

    def fit(self, budget: int, dtype: DType) -> int:
        """The most elements, in whole blocks, whose payload certainly fits in `budget` bytes; may be 0."""
        for compressor in reversed(self.compressors):
            budget = max(bisect_right(range(budget + 1), budget, key=compressor.bound) - 1, 0)
        block = self.block(dtype)
        return budget // max(self.sizes(block, dtype).total, 1) * block

    def check_length(self, length: int, extent: Extent) -> None:
        """Raise FormatError unless the payload of a slice can have `length` bytes."""
        bound = self.bound(extent.count, extent.dtype)
        if length > bound or (length != bound and self.exact_length):
            must = "must have" if self.exact_length else "can have at most"
            raise FormatError(f"{self} payload of {extent.count} elements has {length} bytes, {must} {bound}")

    def fallback(self, view: TensorView) -> str:
        """Why this tensor's values need a lossless codec under the spec's policy; empty if they do not."""
        return self.packer.fallback(self._transformed(view))

    def ceiling(self, dtype: DType) -> float:
        """The largest magnitude that is never refused; infinity if no finite value is refused."""
        for transform in self.transforms:
            dtype = transform.output(dtype)
        return self.packer.ceiling(dtype)

    def prepare(self, view: TensorView) -> Any:
        """What must be known of the whole tensor before its first slice; handed to `encode` as `context`."""
        return self.packer.prepare(self._transformed(view))

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        """The payload of a slice.

        `data`: the slice's little-endian bytes, or with `on_device` maybe a 1-D device tensor; `take(n)`: a uint8
        array of n bytes to write into. Raises NonFiniteError with the offending element's index in the slice, and
        EncodeError if a stage returns a payload that its own reader would refuse.
        """
        place = extent
        for transform in self.transforms:
            data = transform.encode(data, place)
            place = place._replace(dtype=transform.output(place.dtype))
        encoded = self.packer.encode(data, place, take, context)
        if self.compressors:
            encoded = self._compressed(encoded, place)
        if not self._proven:
            self._check_made(encoded, extent)
        return encoded

    def decode(self, payload: memoryview, extent: Extent, out: Any, uncached: bool | None = None) -> None:
        """Write a slice's elements to `out`.

        `payload` has passed `check_length`. `out`: a flat uint8 array of exactly the elements' bytes, or with
        `on_device` maybe a 1-D device tensor of them. `uncached`: as for kernels. Raises FormatError for a payload that
        no encoder produces; the content of `out` is then undefined.
        """
        packed = self.unpack(payload, extent) if self.compressors else payload
        self._decode_packed(packed, extent, out, uncached)

    def accumulate(self, payload: memoryview, extent: Extent, sums: Sums, weight: float) -> None:
        """Add `weight` times each element of a slice to float64 `sums`: one rounding for a product, one for a sum.

        For complex elements, `sums` has both parts, the real one first. `payload` and errors: as for `decode`; after an
        error the content of `sums` is undefined. Raises EncodeError for elements that are not floats.
        """
        packed = self.unpack(payload, extent) if self.compressors else payload
        if not self.transforms and self.packer.accumulate(packed, extent, sums, weight):
            return
        out = np.empty(extent.count * extent.dtype.itemsize, np.uint8)
        self._decode_packed(packed, extent, out)
        add_weighted(out, extent.dtype, sums, weight)

    def unpack(self, payload: memoryview, extent: Extent) -> memoryview:
        """The payload of a slice, decompressed: what the packer made. Raises FormatError."""
        size, exact = self.sizes(extent.count, extent.dtype).total, self.packer.exact_length
        steps: list[tuple[Compressor, int, bool]] = []
        for compressor in self.compressors:
            steps.append((compressor, size, exact))
            size, exact = compressor.bound(size), exact and compressor.exact_length
        place = self._places(extent)[-1] if self.transforms else extent
        for compressor, size, exact in reversed(steps):
            payload = memoryview(compressor.decode(payload, place, size, exact=exact)).cast("B")
            if len(payload) > size or (exact and len(payload) != size):
                raise FormatError(f"{compressor.name} gives {len(payload)} bytes where {size} belong")
        return payload

    def __repr__(self) -> str:
        return self._spec

    @cached_property
    def _spec(self) -> str:
        return "|".join(map(repr, self.pipeline))

    @cached_property
    def _proven(self) -> bool:
        """Whether all stages are the library's own; their payloads are covered by its tests."""
        return all(type(stage) in BUILT_IN for stage in self.pipeline)

    def _check_made(self, encoded: Encoded, extent: Extent) -> None:
        """Raise EncodeError for a payload that no reader would take."""
        try:
            self.check_length(memoryview(encoded.payload).nbytes, extent)
        except FormatError as error:
            raise EncodeError(f"{error.detail}: a bug in one of its stages") from None

    def _compressed(self, encoded: Encoded, place: Extent) -> Encoded:
        first, *others = self.compressors
        parts = self.packer.parts(place.count, place.dtype)
        data = first.encode_parts(encoded.payload, parts, place) if parts else first.encode(encoded.payload, place)
        for compressor in others:
            data = compressor.encode(data, place)
        return Encoded(data)

    def _places(self, extent: Extent) -> list[Extent]:
        """The extents of a slice for each transform and, last, for the packer."""
        places = [extent]
        for transform in self.transforms:
            places.append(places[-1]._replace(dtype=transform.output(places[-1].dtype)))
        return places

    def _decode_packed(self, payload: memoryview, extent: Extent, out: Any, uncached: bool | None = None) -> None:
        if not self.transforms:
            self.packer.decode(payload, extent, out, uncached)
            return
        *places, packed = self._places(extent)
        data = np.empty(packed.count * packed.dtype.itemsize, np.uint8)
        self.packer.decode(payload, packed, data)
        for transform, place in zip(reversed(self.transforms), reversed(places), strict=True):
            target = out if place is extent else np.empty(place.count * place.dtype.itemsize, np.uint8)
            transform.decode(data, place, target)
            data = target

    def _transformed(self, view: TensorView) -> TensorView:
        """The tensor as the packer sees it."""
        for transform in self.transforms:
            view = _through(transform, view)
        return view


class Readymade(Codec):
    """A codec for slices that are packed already: the data for `encode` is the packer's payload."""

    on_device = False

    def prepare(self, view: TensorView) -> None:
        """Nothing, because the values are not available."""

    def encode(self, data: Any, extent: Extent, take: Take, context: Any = None) -> Encoded:
        """The given payload of the packer, compressed if the codec compresses."""
        return self._compressed(Encoded(data), extent) if self.compressors else Encoded(data)


def _through(transform: Transform, view: TensorView) -> TensorView:
    """The tensor after a transform, read in whole blocks."""
    block, output = transform.block(view.dtype), transform.output(view.dtype)

    def read(start: int, stop: int) -> Any:
        first, last = start - start % block, min(-(-stop // block) * block, view.numel)
        data = transform.encode(view.read(first, last), Extent(view.dtype, view.shape, first, last - first))
        return data[(start - first) * output.itemsize : (stop - first) * output.itemsize]

    return TensorView(output, view.shape, read)


def _rank(stage: Stage) -> int:
    """The position of a stage's kind in the order. Raises EncodeError if it is not a stage."""
    for rank, kind in enumerate(_ORDER):
        if isinstance(stage, kind):
            return rank
    raise EncodeError(f"{stage!r} is not a Transform, Packer or Compressor")


def _check_registered(stage: Stage) -> None:
    """Raise EncodeError unless a reader with the same registrations would find this stage under its id."""
    try:
        known = by_id(stage.id)
    except UnsupportedError:
        raise EncodeError(
            f"{type(stage).__qualname__} is not registered: nobody could read it; call tensorwire.register with it"
        ) from None
    if not isinstance(stage, known):
        raise EncodeError(f"id {stage.id} of {type(stage).__qualname__} already belongs to {known.__qualname__}")
