"""Checkpoints at rest: `.safetensors` files and folders of them, as mappings of names to views that read from them."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any, Final

from tensorwire import dtypes
from tensorwire.dtypes import DType
from tensorwire.errors import FormatError, LimitError, TruncatedError, UnsupportedError, WireError, counted, show
from tensorwire.files.source import HEAD, File, OneOfMany, OpenFiles, Source, is_path, name_error, source
from tensorwire.limits import DEFAULT
from tensorwire.memory import Pool
from tensorwire.storage.output import file_name, name_of, open_to_read, storing
from tensorwire.tensor import ByteArray, TensorView

# The safetensors library's own ceiling.
MAX_HEADER: Final = 100_000_000
# Larger models have several files. A header takes up to thirty times its bytes once Python has parsed it.
MAX_TENSORS: Final = 1 << 19
_MAX_PARTS: Final = 16 * MAX_TENSORS  # a tensor of four dimensions has ten; text of the metadata may hold some too
_MOST_OPEN: Final = 64  # shards: most systems let a process open 256 to 1,024 files, of which the program needs some
METADATA: Final = "__metadata__"
NAMES: Final = {
    dtypes.BOOL: "BOOL",
    dtypes.UINT8: "U8",
    dtypes.INT8: "I8",
    dtypes.UINT16: "U16",
    dtypes.INT16: "I16",
    dtypes.UINT32: "U32",
    dtypes.INT32: "I32",
    dtypes.UINT64: "U64",
    dtypes.INT64: "I64",
    dtypes.FLOAT16: "F16",
    dtypes.BFLOAT16: "BF16",
    dtypes.FLOAT32: "F32",
    dtypes.FLOAT64: "F64",
    dtypes.COMPLEX64: "C64",
    dtypes.FLOAT8_E4M3FN: "F8_E4M3",
    dtypes.FLOAT8_E5M2: "F8_E5M2",
    dtypes.FLOAT8_E4M3FNUZ: "F8_E4M3FNUZ",
    dtypes.FLOAT8_E5M2FNUZ: "F8_E5M2FNUZ",
    dtypes.FLOAT8_E8M0FNU: "F8_E8M0",
    dtypes.FLOAT4_E2M1FN_X2: "F4",
}
DTYPES: Final = {name: dtype for dtype, name in NAMES.items()}
# Bits per element of dtypes that are not whole bytes; shapes count elements.
BITS: Final = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
PACKED: Final = "tensorwire.safetensors"
INDEX: Final = "model.safetensors.index.json"


class Checkpoint(Mapping[str, TensorView]):
    """Tensors at rest as a mapping of names to views that read from them; a context manager. See `open_checkpoint`."""

    metadata: dict[str, str]
    _file: File
    _views: dict[str, TensorView]

    def __reduce__(self) -> tuple[Any, ...]:
        return open_checkpoint, (self._file,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({name_of(self._file)!r}, {counted(len(self), 'tensor')})"

    def __getitem__(self, name: str) -> TensorView:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; views can no longer be read."""
        raise NotImplementedError


def open_checkpoint(file: File) -> Checkpoint:
    """Open a `.safetensors` file, or a sharded checkpoint (its `.index.json` or folder), as names mapped to views.

    with tensorwire.safetensors.open_checkpoint("checkpoint/") as tensors:
        print(len(tensors), tensors["lm_head.weight"].shape)
    """
    if is_path(file):
        path = file_name(file)
        if os.path.isdir(path):
            indexes = [name for name in _names_in(path) if name.endswith(".safetensors.index.json")]
            return SafetensorsShards(os.path.join(path, indexes[0]) if len(indexes) == 1 else path)
        if path.endswith(".json"):
            return SafetensorsShards(path)
    return SafetensorsFile(file)


class SafetensorsShards(Checkpoint):
    """A sharded checkpoint: the files that an index lists, or all `.safetensors` files of a folder.

    At most 64 of them are open at once, the last that were read; of more, one that has changed meanwhile is a
    CorruptError.

    Raises FormatError where the index and the files disagree, or two files have a tensor of one name.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.metadata = {}
        self._views = {}
        self._files: list[SafetensorsFile] = []
        self._file = self._path = os.path.abspath(file_name(path))
        wanted = None if os.path.isdir(self._path) else self._read_index()
        folder = self._path if wanted is None else os.path.dirname(self._path)
        names = set(wanted.values()) if wanted is not None else _shards_in(folder)
        packed: dict[str, Any] = {}
        self._open = OpenFiles(_MOST_OPEN) if len(names) > _MOST_OPEN else None
        try:
            for name in sorted(names):
                file = SafetensorsFile(os.path.join(folder, name), files=self._open)
                self._files.append(file)
                packed |= file.packed
                self._add(file)
            self._check(wanted)
        except BaseException:
            self.close()
            raise
        self.metadata |= _packed_metadata(packed)

    def close(self) -> None:
        """Close all files; views can no longer be read."""
        for file in self._files:
            file.close()
        if self._open is not None:
            self._open.close()

    def _read_index(self) -> dict[str, str]:
        """File names by tensor. Raises FormatError, also for a name that leads out of the folder."""
        with open_to_read(self._path) as file:
            text = file.read(MAX_HEADER + 1)
        if len(text) > MAX_HEADER:
            raise self._wrong(f"the index has more than {MAX_HEADER} bytes")
        try:
            index = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._wrong(f"the index is not JSON: {error}") from None
        names = index.get("weight_map") if type(index) is dict else None
        if not names or not _is_text_map(names):
            raise self._wrong("the index has no weight_map of tensors to files")
        for name in names.values():
            if os.path.basename(name) != name or name in ("", os.curdir, os.pardir) or "\\" in name or "\0" in name:
                raise self._wrong(f"the index names {show(name)}, which cannot be a file in its folder")
        return names  # type: ignore[no-any-return]  # which has just been checked

    def _add(self, file: "SafetensorsFile") -> None:
        for name in file.keys() & self._views.keys():
            other = next(each.name for each in self._files if name in each)
            both = f"{show(os.path.basename(other))} and {show(os.path.basename(file.name))}"
            raise self._wrong(f"two files have a tensor of this name, {both}", item=name)
        self._views |= file
        for key, text in file.own_metadata.items():
            if self.metadata.setdefault(key, text) != text:
                raise self._wrong(f"the files differ in their metadata {show(key)}: make it equal, or remove it")

    def _check(self, wanted: Mapping[str, str] | None) -> None:
        if wanted is None:
            return
        for file in self._files:
            for name in file:
                if wanted.get(name) != os.path.basename(file.name):
                    raise self._wrong("the index does not place this tensor in the file that has it", item=name)
        for name in wanted.keys() - self._views.keys():
            raise self._wrong(
                f"the index places this tensor in {show(wanted[name])}, which does not have it", item=name
            )

    def _wrong(self, detail: str, item: str | None = None) -> FormatError:
        error = FormatError(detail, item=item)
        error.file = self._path
        return error


def _shards_in(folder: str) -> list[str]:
    names = [name for name in _names_in(folder) if name.endswith(".safetensors")]
    if not names:
        error = FormatError("not a checkpoint: the folder has no .safetensors files")
        error.file = folder
        raise error
    return names


def _names_in(folder: str) -> list[str]:
    with storing(folder, "read"):
        return os.listdir(folder)


class SafetensorsFile(Checkpoint):
    """A `.safetensors` file, by its path or as a seekable file object.

    Offsets, sizes and dtypes are checked against the file before anything is read through them. `own_metadata`: as it
    stands in the file; `metadata`: with what `packed` says of tensors that travel as bytes, by name: dtype and shape.
    `files`: of which this is one, a path, and which closes it while others are read.
    """

    def __init__(self, file: File, *, files: OpenFiles | None = None) -> None:
        self._file = os.path.abspath(file_name(file)) if is_path(file) else file
        self._source = OneOfMany(os.fspath(file), files) if files is not None and is_path(file) else source(file)
        self.name = self._source.name
        self.packed: dict[str, Any] = {}
        try:
            header, begin, size = self._read_header()
            metadata = header.pop(METADATA, {})
            if not _is_text_map(metadata):
                raise FormatError("safetensors metadata must map text to text")
            self.own_metadata: dict[str, str] = metadata
            self._views = self._make_views(header, begin, size)
            self.metadata = metadata | _packed_metadata(self.packed)
        except WireError as error:
            head = bytes(self._source.read(0, min(HEAD, self._source.size)))
            self.close()
            name_error(error, self.name, head, b"")
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; views can no longer be read."""
        self._source.close()

    def _read_header(self) -> tuple[dict[str, Any], int, int]:
        size = self._source.size
        if size < 8:
            raise TruncatedError("too short for a safetensors file", offset=size)
        length = int.from_bytes(self._source.read(0, 8), "little")
        if size > 8 and bytes(self._source.read(8, 1)) != b"{":
            raise FormatError("not a .safetensors file: its header is not JSON", offset=8)
        if length > MAX_HEADER:
            raise LimitError("safetensors header", MAX_HEADER, length, field=None)
        if 8 + length > size:
            raise TruncatedError("the safetensors header reaches beyond the end of the file", offset=size)
        text = bytes(self._source.read(8, length))
        _check_parts(text)
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"the safetensors header is not JSON: {error}") from None
        if type(header) is not dict:
            raise FormatError("the safetensors header is not a JSON object")
        if len(header) > MAX_TENSORS + 1:  # one is the metadata
            raise LimitError("tensors of a safetensors file", MAX_TENSORS, len(header), field=None)
        return header, 8 + length, size - 8 - length

    def _make_views(self, header: dict[str, Any], begin: int, size: int) -> dict[str, TensorView]:
        entries = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda entry: entry[3:])
        views = {}
        pool = Pool()  # shared by all tensors, which are read one after the other
        end = 0
        for name, stored, shape, start, stop in entries:
            if start != end:
                raise FormatError("tensors overlap or leave holes", item=name)
            end = stop
            dtype, unpacked = _as_sent(stored, shape, stop - start)
            if dtype == dtypes.UINT8 and stored != "U8":
                self.packed[name] = [stored, list(shape)]
            views[name] = TensorView(dtype, unpacked, _reader(self._source, begin + start, dtype.itemsize, pool))
        if end != size:
            hint = ": it was cut short" if end > size else ""
            raise FormatError(f"tensors take {end} bytes, the file has {size}{hint}")
        return views


def _check_parts(header: bytes) -> None:
    """Refuse, before parsing it, a header that would become too many Python objects (up to thirty times its bytes)."""
    parts = sum(map(header.count, (b",", b"[", b"{")))
    if parts > _MAX_PARTS:
        raise LimitError("parts of the safetensors header", _MAX_PARTS, parts, field=None)


def _reader(source: Source, offset: int, itemsize: int, pool: Pool) -> Callable[[int, int], ByteArray]:
    """`TensorView.read` over bytes of a file from `offset` on, through pooled memory."""

    def read(start: int, stop: int) -> ByteArray:
        buffer = pool.take((stop - start) * itemsize)
        source.read_into(offset + start * itemsize, buffer.data)
        return buffer

    return read


def _as_sent(stored: str, shape: tuple[int, ...], size: int) -> tuple[DType, tuple[int, ...]]:
    """The dtype and shape with which a tensor of the file is sent."""
    if stored not in BITS:
        return DTYPES[stored], shape
    if stored in DTYPES and shape and shape[-1] % 2 == 0:
        return DTYPES[stored], (*shape[:-1], shape[-1] // 2)
    return dtypes.UINT8, (size,)


def _packed_metadata(packed: Mapping[str, Any]) -> dict[str, str]:
    return {PACKED: json.dumps(packed, separators=(",", ":"), sort_keys=True)} if packed else {}


def unpacked(text: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape, in a file, of tensors that are sent as bytes. Raises FormatError."""
    try:
        packed = json.loads(text)
        found = {name: (dtype, tuple(shape)) for name, (dtype, shape) in packed.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise FormatError(f"the metadata {PACKED} must map names of tensors to dtype and shape, as JSON") from None
    for name, (dtype, shape) in found.items():
        if dtype not in BITS or any(type(n) is not int or n < 0 for n in shape):
            raise FormatError(f"the metadata {PACKED} has no valid dtype and shape for this tensor", item=name)
    return found


def _entry(name: str, entry: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("a safetensors entry must have dtype, shape and data_offsets", item=name)
    if type(entry["dtype"]) is not str:
        raise FormatError("dtype must be text", item=name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES and dtype not in BITS:
        raise UnsupportedError(f"unknown safetensors dtype {show(dtype)}", item=name)
    for numbers in (shape, offsets):
        if type(numbers) is not list or any(type(n) is not int or n < 0 for n in numbers):
            raise FormatError("shape and data_offsets must be lists of non-negative integers", item=name)
    if len(shape) > DEFAULT.ndim:
        raise LimitError("ndim", DEFAULT.ndim, len(shape), field=None, item=name)
    bits = BITS[dtype] if dtype in BITS else DTYPES[dtype].itemsize * 8
    if len(offsets) != 2 or (offsets[1] - offsets[0]) * 8 != prod(shape) * bits:
        raise FormatError("data_offsets do not match dtype and shape", item=name)
    return name, dtype, tuple(shape), *offsets


def _is_text_map(value: Any) -> bool:
    return type(value) is dict and all(type(text) is str for text in value.values())
