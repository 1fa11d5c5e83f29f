"""Versions at rest: the patch between two files, and a file made from another one and its patches.

    for buffer in diff("old.safetensors", "new.safetensors"): ...
    patch("old.safetensors", ["first.tw", "second.tw"], "new.safetensors")

Files are `.safetensors`, sharded checkpoints (their index or folder) and `.tw`. Tensors are read block by block and
never loaded; a patch is held in memory, encoded.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np

from tensorwire.checksum import crc32c
from tensorwire.codecs import CHUNK, Checksums
from tensorwire.errors import ArgumentError, CorruptError, TensorwireError
from tensorwire.files import safetensors
from tensorwire.files.checkpoint import open_checkpoint
from tensorwire.files.source import File, check_paths, is_path, opened, source
from tensorwire.files.tw import TensorFile, save_file
from tensorwire.limits import DEFAULT, Limits
from tensorwire.storage.output import file_name
from tensorwire.streams import Patch, Report, encode_patch
from tensorwire.streams.applying import replaced
from tensorwire.streams.sender import encode
from tensorwire.streams.versions import Sums, checksums, content_digest, version_of
from tensorwire.tensor import Buffer, ByteArray, TensorView, ViewFront
from tensorwire.wire.frames import HEADER_SIZE, MAGIC

_VIEWS: Final = ViewFront()
_STEP: Final = 1 << 20  # bytes that are read of a patch at a time
_FRAME: Final = CHUNK + HEADER_SIZE  # bytes of a frame whose payload is one chunk


class Stored(NamedTuple):
    """The container in a file, its tensors as views, and the file's text metadata."""

    container: Any
    metadata: Mapping[str, str]


def diff(
    old: File,
    new: File,
    *,
    metadata: Mapping[str, str] | None = None,
    limits: Limits = DEFAULT,
    report: Report | None = None,
) -> Iterator[Buffer]:
    """The buffers of the patch from `old` to `new`, two files that are read as it is made.

    `metadata`: of the patch. Raises, before the first buffer, EncodeError for versions that differ in more than values,
    and what opening a file raises.

        transport.send(tensorwire.diff("step-100.safetensors", "step-200.safetensors"))
    """
    with ExitStack() as stack:
        before, after = stack.enter_context(_Opened(old, limits)), stack.enter_context(_Opened(new, limits))
        buffers = encode_patch(
            after.stored.container,
            before.stored.container,
            _VIEWS,
            metadata=metadata,
            limits=limits,
            report=report,
        )
        stream = _closing(stack.pop_all(), buffers)
        next(stream)
        return stream


def patch(
    base: File,
    patches: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | None = None,
    limits: Limits = DEFAULT,
) -> str:
    """Apply patches to `base`, one after the other, write the result, and return its content digest.

    `patches`: paths, sources as for `decode`, or `Patch`es that were read, in the order of their versions. `metadata`:
    text pairs for the new file in addition to those of `base`. `path`: a `.tw` file if it ends so, otherwise
    `.safetensors`; with `max_shard_size`, a folder of shards as `safetensors.decode` makes it. It appears only when
    everything is verified. Raises SchemaError if a patch is not for the version that the patches before it make.

        tensorwire.patch("step-100.safetensors", ["to-200.tw", "to-300.tw"], "step-300.safetensors")
    """
    check_paths(patches)
    with _Opened(base, limits) as file:
        container, target = file.stored.container, ""
        sums: Sums | None = None
        for given in patches:
            read = _read(given, limits)
            try:
                container, sums = read.views(container, _VIEWS, sums=sums, limits=limits)
            except TensorwireError as error:
                error.file = error.file or (os.fspath(given) if isinstance(given, (str, os.PathLike)) else None)
                raise
            target = read.target
        if sums is None:
            raise ArgumentError("give at least one patch")
        checked = {name: _checked(name, view, sums) for name, view in _tensors(container, limits).items()}
        _write(replaced(container, checked), {**file.stored.metadata, **(metadata or {})}, path, max_shard_size, limits)
        return target


def digest(file: File, *, limits: Limits = DEFAULT) -> str:
    """The content digest of the container in a file, as `tensorwire.digest` computes it."""
    with _Opened(file, limits) as opened_file:
        version = version_of(opened_file.stored.container, _VIEWS, limits)
        return content_digest(version, checksums(version)).hex()


class _Opened:
    """A file that is open for reading; a context manager."""

    def __init__(self, file: File, limits: Limits) -> None:
        self._open: Any
        if not _is_stream(file):
            self._open = open_checkpoint(file)
            self.stored = Stored(dict(self._open), self._open.metadata)
        else:
            self._open = TensorFile(file, _VIEWS, limits=limits)
            self.stored = Stored(self._open.views(), self._open.metadata)

    def __enter__(self) -> "_Opened":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()


def _is_stream(file: File) -> bool:
    """Whether a file begins as a `.tw` file does."""
    if is_path(file) and (os.path.isdir(file) or file_name(file).endswith(".json")):
        return False
    looked_at = source(file)
    try:
        return bytes(looked_at.read(0, min(looked_at.size, len(MAGIC)))) == MAGIC
    finally:
        looked_at.close()


def _closing(stack: ExitStack, buffers: Iterator[Buffer]) -> Iterator[Buffer]:
    with stack:
        yield b""  # started here, so that the files are closed even if the stream is never read
        yield from buffers


def _read(given: Any, limits: Limits) -> Patch:
    if isinstance(given, Patch):
        return given
    if not isinstance(given, (str, os.PathLike)):
        return Patch.read(given, limits=limits)
    with opened(given) as file:
        return Patch.read(iter(lambda: file.read(_STEP), b""), limits=limits)


def _tensors(container: Any, limits: Limits) -> dict[str, TensorView]:
    return {name: entry.view for name, entry in version_of(container, _VIEWS, limits).items() if entry.view is not None}


def _checked(name: str, view: TensorView, sums: Sums) -> TensorView:
    """The same tensor, with its elements checked against their checksums as they are read."""
    return replace(view, read=_Checked(name, view, sums[name]).read)


class _Checked:
    """A `TensorView.read` that raises if the file has changed since it was checked. Slices may come in any order."""

    __slots__ = ("_name", "_sums", "_view")

    def __init__(self, name: str, view: TensorView, sums: Checksums) -> None:
        self._name = name
        self._view = view
        self._sums = sums

    def read(self, start: int, stop: int) -> ByteArray:
        """Elements [start, stop), of whole chunks, each of which has a checksum."""
        width = self._view.dtype.itemsize
        low, high = start * width // CHUNK * CHUNK, min(-(-stop * width // CHUNK) * CHUNK, self._view.numel * width)
        data = np.frombuffer(self._view.read(low // width, high // width), np.uint8)
        for place in range(low, high, CHUNK):
            if crc32c(data[place - low : place - low + CHUNK]) != self._sums[place // CHUNK]:
                raise CorruptError("it changed while the patch was applied", item=self._name)
        return data[start * width - low : stop * width - low]


def _write(
    container: Any,
    metadata: Mapping[str, str],
    path: str | os.PathLike[str],
    max_shard_size: int | None,
    limits: Limits,
) -> None:
    if file_name(path).endswith(".tw") and max_shard_size is None:
        save_file(container, path, _VIEWS, metadata=metadata, limits=limits)
        return
    buffers = encode(container, _VIEWS, frame_size=_FRAME, metadata=metadata, limits=limits)
    safetensors.decode(buffers, path, max_shard_size=max_shard_size, limits=limits)
