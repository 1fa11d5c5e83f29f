"""What a command reads: a model or any file, told by its name or by --from, as a container and as a stream."""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

import tensorwire
from tensorwire import streams
from tensorwire.cli.common import PIPE, CodecArgument, UsageError
from tensorwire.errors import EncodeError, TensorwireError
from tensorwire.files import safetensors
from tensorwire.limits import DEFAULT
from tensorwire.storage.parts import scratch
from tensorwire.tensor import ViewFront

KINDS: Final = ("safetensors", "npz", "npy", "pt", "file")
HELP: Final = """\
what IN is, by its name or by --from:
  *.safetensors    tensors, read piece by piece; the model is never loaded
  *.npz, *.npy     arrays
  *.pt, *.pth      a torch checkpoint that loads with weights_only=True
  any other, or -  a file, sent in chunks; codec raw or zstd
"""
_SUFFIXES: Final = {".safetensors": "safetensors", ".npz": "npz", ".npy": "npy", ".pt": "pt", ".pth": "pt"}
_CHUNK: Final = 1 << 20
_HEAD: Final = 64
# How files begin that stand where another was meant to be.
_MISTAKEN: Final = {
    b"version https://git-lfs.github.com/spec/": "a git-lfs pointer, which stands for the file; run `git lfs pull`",
    b"<!doctype html": "a web page, not what was to be downloaded",
    b"<html": "a web page, not what was to be downloaded",
}


@dataclass(frozen=True)
class Input:
    """A file, or stdin, what it is (one of `KINDS`), and how its tensors are to be encoded. Raises EncodeError."""

    path: str
    kind: str
    codec: CodecArgument

    @property
    def loads(self) -> bool:
        """Whether it is in memory as a whole when it is encoded."""
        return self.kind in ("npz", "npy", "pt")

    @cached_property
    def container(self) -> Any:
        """What is in a file that `loads`. Raises EncodeError for what is broken or would need pickle."""
        if self.kind == "pt":
            return _checkpoint(self.path)
        with _reading(self.path, f".{self.kind} file"):
            loaded = np.load(self.path, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            with loaded:
                return dict(loaded)

    def stream(self, *, at_rest: bool = False) -> Iterator[Any]:
        """The stream that it becomes. `at_rest`: of a .safetensors file, laid out as `save_file` does."""
        if self.loads:
            return tensorwire.encode(self.container, codec=self.codec)
        if self.kind == "safetensors":
            return safetensors.encode(self.path, codec=self.codec, at_rest=at_rest)
        if not isinstance(self.codec, str):
            raise UsageError(f"{self.path} is sent as a file, which takes one codec: raw or zstd")
        return tensorwire.encode_file(sys.stdin.buffer if self.path == PIPE else self.path, codec=self.codec)

    def size(self, *, at_rest: bool = False) -> int | None:
        """The bytes of that stream, or what they are at most where values decide; None for stdin."""
        if self.loads:
            return tensorwire.encoded_size(self.container, codec=self.codec, at_rest=at_rest)
        if self.kind == "safetensors":
            with safetensors.SafetensorsFile(self.path) as file:
                leaves = streams.flatten(dict(file), ViewFront(), streams.rule(self.codec), DEFAULT)
                return streams.stream_size(leaves, at_rest=at_rest).total
        return None if self.path == PIPE else os.path.getsize(self.path)


def add_kind(parser: argparse.ArgumentParser) -> None:
    """The option that says what the name does not."""
    parser.add_argument("--from", dest="kind", choices=KINDS, help="what IN is, whatever its name")


@contextmanager
def opened(path: str, kind: str | None, codec: CodecArgument) -> Iterator[Input]:
    """What a command line names as IN. A model on stdin, which takes seeking, waits in a temporary file."""
    kind = kind or _SUFFIXES.get(Path(path).suffix.lower(), "file")
    if path != PIPE or kind == "file":
        yield Input(path, kind, codec)
        return
    with scratch() as copy:
        with open(copy, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, _CHUNK)
        yield Input(copy, kind, codec)


def _checkpoint(path: str) -> Any:
    try:
        import torch
    except ImportError:
        raise UsageError("reading a torch checkpoint takes torch: pip install 'tensorwire[torch]'") from None
    with _reading(path, "checkpoint that torch loads with weights_only=True"):
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _reading(path: str, what: str) -> Iterator[None]:
    """Errors of others' readers blame the file: which ones they raise for a broken file is written down nowhere."""
    try:
        yield
    except (TensorwireError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = _mistaken(path) or str(error).partition("\n")[0] or type(error).__name__
        raise EncodeError(f"{path} is no whole {what}: {reason}") from error


def _mistaken(path: str) -> str | None:
    """What a file is that is not what its name says."""
    if os.path.getsize(path) == 0:
        return "it is empty"
    with open(path, "rb") as file:
        head = file.read(_HEAD).lstrip().lower()
    return next((f"it is {what}" for begin, what in _MISTAKEN.items() if head.startswith(begin)), None)
