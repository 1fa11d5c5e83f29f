"""What a command reads: a model or any file, identified by its name or by --from, as a container and as a stream."""

import argparse
import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

import tensorwire
from tensorwire import Report, streams
from tensorwire.cli.common import PIPE, CodecArgument, UsageError
from tensorwire.errors import EncodeError, TensorwireError
from tensorwire.files import HEAD, kind_of, safetensors
from tensorwire.limits import Limits
from tensorwire.storage.parts import scratch
from tensorwire.tensor import ViewFront

KINDS: Final = ("safetensors", "npz", "npy", "pt", "file")
HELP: Final = """\
IN, by its name or by --from:
  *.safetensors    tensors, read piece by piece; the model is never loaded
  *.index.json     a sharded checkpoint, given by its index or its folder, as one model
  *.npz, *.npy     arrays
  *.pt, *.pth      a torch checkpoint that loads with weights_only=True
  any other, or -  a file, sent in chunks; codec raw or zstd
"""
_SUFFIXES: Final = {".safetensors": "safetensors", ".npz": "npz", ".npy": "npy", ".pt": "pt", ".pth": "pt"}
_INDEX: Final = ".index.json"
_CHUNK: Final = 1 << 20
_REASON: Final = 160  # characters of another library's error
# How files begin that NumPy and torch read: zip files, .npy files, and pickles as torch once wrote them.
_ARRAYS: Final = (b"PK\x03\x04", b"\x93NUMPY")
_CHECKPOINTS: Final = (b"PK\x03\x04", b"\x80")


@dataclass(frozen=True)
class Input:
    """A file or stdin, its kind (one of `KINDS`), and the codec of its tensors. Raises EncodeError."""

    path: str
    kind: str
    codec: CodecArgument
    limits: Limits

    @property
    def name(self) -> str:
        """The file's name for the receiver, as text even if the system's name is not UTF-8."""
        return os.fsencode(os.path.basename(self.path)).decode("utf-8", "replace")

    @property
    def loads(self) -> bool:
        """Whether the whole file is loaded into memory before it is encoded."""
        return self.kind in ("npz", "npy", "pt")

    @cached_property
    def container(self) -> Any:
        """The content of a file that `loads`. Raises EncodeError if it is broken or would need pickle."""
        if self.kind == "pt":
            return _checkpoint(self.path)
        with _reading(self.path, f"a .{self.kind} file", _ARRAYS):
            loaded = np.load(self.path, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            with loaded:
                return dict(loaded)

    def stream(self, *, at_rest: bool = False, report: Report | None = None) -> Iterator[Any]:
        """The encoded stream. `at_rest`: for a .safetensors file, in the layout of `save_file`."""
        if self.loads:
            return tensorwire.encode(self.container, codec=self.codec, limits=self.limits, report=report)
        if self.kind == "safetensors":
            return safetensors.encode(self.path, codec=self.codec, at_rest=at_rest, limits=self.limits, report=report)
        if not isinstance(self.codec, str):
            raise UsageError(f"{self.path!r} is sent as a file, which takes a single codec: raw or zstd")
        file = sys.stdin.buffer if self.path == PIPE else self.path
        return tensorwire.encode_file(file, codec=self.codec, name=self.name, limits=self.limits, report=report)

    def size(self) -> int | None:
        """Its bytes before they are encoded, roughly; None for stdin."""
        if self.loads:
            return tensorwire.encoded_size(self.container, limits=self.limits)
        return None if self.path == PIPE else sum(map(os.path.getsize, files(self.path)))

    def stream_size(self) -> int | None:
        """The size of its stream in bytes, or an upper bound if the size depends on the values; None for stdin."""
        if self.loads:
            return tensorwire.encoded_size(self.container, codec=self.codec, limits=self.limits)
        if self.kind == "safetensors":
            with safetensors.open_checkpoint(self.path) as file:
                leaves = streams.flatten(dict(file), ViewFront(), streams.rule(self.codec), self.limits)
                return streams.stream_size(leaves, limits=self.limits).total
        return self.size()


def files(path: str) -> list[str]:
    """The files that a command reads when it is given `path`: for a sharded checkpoint, its index and all shards."""
    folder = path if os.path.isdir(path) else os.path.dirname(path) if path.endswith(_INDEX) else None
    if folder is None:
        return [path]
    beside = sorted(os.scandir(folder or os.curdir), key=lambda entry: entry.name)
    return [entry.path for entry in beside if entry.is_file() and entry.name.endswith((".safetensors", _INDEX))]


def add_kind(parser: argparse.ArgumentParser) -> None:
    """The option that gives the kind of the input."""
    parser.add_argument("--from", dest="kind", choices=KINDS, help="the kind of IN, whatever its name")


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[Input]:
    """The `input` of a command line. A model on stdin or in a pipe, which cannot seek, is copied first."""
    path, codec, limits = arguments.input, arguments.codec, arguments.limits
    sharded = os.path.isdir(path) or path.endswith(_INDEX)
    kind = arguments.kind or ("safetensors" if sharded else _SUFFIXES.get(Path(path).suffix.lower(), "file"))
    seekable = path != PIPE and (os.path.isfile(path) or os.path.isdir(path) or not os.path.exists(path))
    if seekable or kind == "file":
        yield Input(path, kind, codec, limits)
        return
    with scratch() as copy:
        with open(copy, "wb") as file, _raw(path) as source:
            shutil.copyfileobj(source, file, _CHUNK)
        yield Input(copy, kind, codec, limits)


def _raw(path: str) -> AbstractContextManager[Any]:
    return nullcontext(sys.stdin.buffer) if path == PIPE else open(path, "rb")


def _checkpoint(path: str) -> Any:
    try:
        import torch
    except ImportError:
        raise UsageError("reading a torch checkpoint needs torch: pip install torch") from None
    with _reading(path, "a torch checkpoint", _CHECKPOINTS):
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _reading(path: str, what: str, expected: Sequence[bytes]) -> Iterator[None]:
    """Turn other libraries' errors, which are undocumented for broken files, into an EncodeError about the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # faults are reported as errors
            yield
    except TensorwireError:
        raise
    except MemoryError as error:
        raise MemoryError(f"{path}: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise EncodeError(f"{path} cannot be read as {what}: {_mistaken(path, expected) or _reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "it holds objects that weights_only=True refuses because they can run code; save its state_dict()"
    reason = str(error).partition("\n")[0]
    # A bare word, such as the key of a KeyError, explains nothing.
    return reason[:_REASON] if " " in reason else f"it is another kind of file, or broken ({type(error).__name__})"


def _mistaken(path: str, expected: Sequence[bytes]) -> str | None:
    """What a file really is, if that can be told by how it begins."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    kind = kind_of(head, *expected)
    return "it is empty" if not head else None if kind is None else f"it is {kind}"
