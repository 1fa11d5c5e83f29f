"""`tensorwire decode`: decode a stream to a model or to the file that it carries."""

import argparse
import io
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

import tensorwire
from tensorwire.cli.common import PIPE, UsageError, add_limits, binary_stdout, positive_size, reading, verb
from tensorwire.cli.outputs import add_force, check_output
from tensorwire.errors import SchemaError, counted, show
from tensorwire.limits import Limits
from tensorwire.storage import Output, OutputFile, replacing
from tensorwire.storage.parts import scratch
from tensorwire.streams import size_text

_TEXT: Final = """\
OUT, by its name or by --to:
  *.safetensors  all tensors, written slice by slice; the model is never loaded
  *.npz          all tensors, one in memory at a time
  *.npy          the array, of a stream that is a single array
  *.pt, *.pth    everything, with its nesting, as a checkpoint that torch loads with weights_only=True
  any other      the file that the stream carries, under the name you give
OUT appears only when the whole stream is verified. Nothing is written to a pipe before that either: with -,
the result is kept in a temporary file until then.

examples:
  tensorwire decode model.tw restored.safetensors
  tensorwire decode model.tw restored --max-shard-size 5GB
  tensorwire decode checkpoint.tw restored.pt
  nc -l 9000 | tensorwire decode - received.npz
  tensorwire decode folder.tw - | tar x
"""
KINDS: Final = ("safetensors", "npz", "npy", "pt", "file")
_SUFFIXES: Final = {".safetensors": "safetensors", ".npz": "npz", ".npy": "npy", ".pt": "pt", ".pth": "pt"}
_DRIVE: Final = re.compile("[A-Za-z]:")
_NAMES: Final = "*.safetensors, *.npz, *.npy or *.pt"


def add_parser(verbs: Any) -> None:
    """Add this command to the command line."""
    parser = verb(verbs, "decode", _run, summary="decode a stream to a model or a file", text=_TEXT)
    parser.add_argument("input", metavar="IN", help="a .tw file, or - for stdin")
    parser.add_argument("output", metavar="OUT", help="a file, or - for stdout")
    parser.add_argument("--to", choices=KINDS, help="the kind of OUT, whatever its name")
    parser.add_argument(
        "--max-shard-size",
        type=positive_size,
        metavar="SIZE",
        help="make OUT a folder of shards of at most SIZE, such as 5GB",
    )
    add_force(parser)
    add_limits(parser)


def _run(arguments: argparse.Namespace) -> int:
    output = arguments.output
    if arguments.max_shard_size is not None:
        return _decode_shards(arguments)
    check_output(output, inputs=[arguments.input], force=arguments.force)
    kind = arguments.to or kind_of(output)
    with reading(arguments.input) as source:
        if output != PIPE:
            write(iter(source), output, kind, arguments.limits)
            size = os.path.getsize(output)
        else:
            out = binary_stdout()
            with scratch() as path:
                write(iter(source), path, kind, arguments.limits)
                size = os.path.getsize(path)
                with open(path, "rb") as file:
                    shutil.copyfileobj(file, out, 1 << 20)
    print(f"{size_text(source.size)} -> {size_text(size)}", file=sys.stderr)
    return 0


def _decode_shards(arguments: argparse.Namespace) -> int:
    output = arguments.output
    if output == PIPE or arguments.to not in (None, "safetensors"):
        raise UsageError("--max-shard-size makes a folder of .safetensors files: give its name as OUT, without --to")
    with reading(arguments.input) as source:
        tensorwire.safetensors.decode(
            iter(source), output, max_shard_size=arguments.max_shard_size, limits=arguments.limits
        )
    made = [os.path.getsize(entry.path) for entry in os.scandir(output)]
    print(f"{size_text(source.size)} -> {size_text(sum(made))} in {counted(len(made), 'file')}", file=sys.stderr)
    return 0


def kind_of(output: str) -> str:
    """The kind of file that this name stands for: one of `KINDS`."""
    return _SUFFIXES.get(Path(output).suffix.lower(), "file")


def write(source: Iterator[bytes], path: str, kind: str, limits: Limits) -> None:
    """Decode a stream into a file, which appears only when everything is verified."""
    if kind == "safetensors":
        tensorwire.safetensors.decode(source, path, limits=limits)
    elif kind == "npz":
        _decode_npz(source, path, limits)
    elif kind == "npy":
        _decode_npy(source, path, limits)
    elif kind == "pt":
        _decode_pt(source, path, limits)
    else:
        try:
            tensorwire.decode_file(source, path, limits=limits)
        except SchemaError as error:
            what = error.detail.partition(";")[0]
            raise SchemaError(f"{what}: name OUT {_NAMES}, or use --to", item=error.item) from None


def _decode_npz(source: Iterator[bytes], path: str, limits: Limits) -> None:
    keys: set[str] = set()
    with _file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, value in tensorwire.decode(source, limits=limits):
            _check_array(name, value, "npz")
            key = entry_name(name)
            if key in keys:
                raise SchemaError(f"two items would be named {show(key)} in a .npz file; use .pt", item=name)
            keys.add(key)
            with archive.open(f"{key}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, value, allow_pickle=False)


def entry_name(name: str) -> str:
    """The name of an item in a .npz file, which is never a path that leads outside the folder it is unpacked in.

    Characters that would make it one are escaped as in URLs: /a/b is %2Fa/b.
    """
    parts = ["%2E" * len(part) if part in (".", "..") else part for part in name.replace("\\", "%5C").split("/")]
    safe = "/".join(parts)
    if safe.startswith("/"):
        safe = "%2F" + safe[1:]
    if _DRIVE.match(safe):
        safe = safe.replace(":", "%3A", 1)
    return safe or "arr_0"


def _decode_npy(source: Iterator[bytes], path: str, limits: Limits) -> None:
    value = tensorwire.loads(source, limits=limits)
    if isinstance(value, (dict, list, tuple)):
        raise SchemaError(f"a .npy file holds one array, but the stream is a {type(value).__name__}; use .npz or .pt")
    _check_array("", value, "npy")
    with _file(path) as file:
        np.lib.format.write_array(file, value, allow_pickle=False)


def _decode_pt(source: Iterator[bytes], path: str, limits: Limits) -> None:
    try:
        import torch
    except ImportError:
        raise UsageError("writing a torch checkpoint needs torch: pip install torch") from None
    value = tensorwire.torch.loads(source, limits=limits)
    with _file(path) as file:
        torch.save(value, file)


@contextmanager
def _file(path: str) -> Iterator[BinaryIO]:
    """A file to write, which appears under its name when the block ends without an error."""
    with replacing(path) as fd, io.BufferedWriter(OutputFile(Output(fd, path))) as file:
        yield file


def _check_array(name: str, value: Any, kind: str) -> None:
    """Raise SchemaError for a value that a NumPy file cannot hold."""
    if not isinstance(value, np.ndarray):
        raise SchemaError(f"a .{kind} file holds arrays only, not a {type(value).__name__}; use .pt", item=name)
    # .npy has no name for bfloat16 and the like, whether ml_dtypes knows them or not.
    if value.dtype.isbuiltin != 1 or value.dtype.metadata:
        dtype = show(value.dtype.name)
        raise SchemaError(f"a .{kind} file cannot hold {dtype}; use .safetensors or .pt", item=name)
