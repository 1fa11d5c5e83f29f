"""`tensorwire decode`: a stream to a model or to the file it carries."""

import argparse
import io
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

import tensorwire
from tensorwire.cli.common import PIPE, binary_stdout, reading, verb
from tensorwire.errors import SchemaError, show
from tensorwire.storage import Output, OutputFile, replacing
from tensorwire.storage.parts import scratch

_TEXT: Final = """\
what OUT becomes:
  *.safetensors  all tensors, written slice by slice; the model is never loaded
  *.npz          all tensors, one in memory at a time
  any other      the file that the stream carries, under the name you give
--to says so where the name does not. OUT appears only when the whole stream is verified, and nothing is
written to a pipe before that either: on its way to - the result waits in a temporary file.

examples:
  tensorwire decode model.tw model.safetensors
  nc -l 9000 | tensorwire decode - weights.npz
  tensorwire decode folder.tw - | tar x
"""
KINDS: Final = ("safetensors", "npz", "file")


def add_parser(verbs: Any) -> None:
    """Add this verb to the command line."""
    parser = verb(verbs, "decode", _run, summary="decode a stream to a model or a file", text=_TEXT)
    parser.add_argument("input", metavar="IN", help="a .tw file, or - for stdin")
    parser.add_argument("output", metavar="OUT", help="a file, or - for stdout")
    parser.add_argument("--to", choices=KINDS, help="what OUT becomes, whatever its name")


def _run(arguments: argparse.Namespace) -> int:
    output = arguments.output
    kind = arguments.to or kind_of(output)
    with reading(arguments.input) as source:
        if output != PIPE:
            write(source, output, kind)
            return 0
        out = binary_stdout()
        with scratch() as path:
            write(source, path, kind)
            with open(path, "rb") as file:
                shutil.copyfileobj(file, out, 1 << 20)
    return 0


def kind_of(output: str) -> str:
    """What a stream becomes in a file of this name: one of `KINDS`."""
    suffix = Path(output).suffix.lower().removeprefix(".")
    return suffix if suffix in KINDS else "file"


def write(source: Iterator[bytes], path: str, kind: str) -> None:
    """Decode a stream into a file, which appears only when all is verified."""
    if kind == "safetensors":
        tensorwire.safetensors.decode(source, path)
    elif kind == "npz":
        _decode_npz(source, path)
    else:
        tensorwire.decode_file(source, path)


def _decode_npz(source: Iterator[bytes], path: str) -> None:
    with (
        replacing(path) as fd,
        io.BufferedWriter(OutputFile(Output(fd, path))) as file,
        zipfile.ZipFile(file, "w") as archive,
    ):
        for name, value in tensorwire.decode(source):
            if not isinstance(value, np.ndarray):
                raise SchemaError(f"a .npz file holds arrays only, not a {type(value).__name__}", item=name)
            # bfloat16 and the like, whether ml_dtypes knows them here or not: .npy has no name for them.
            if value.dtype.isbuiltin != 1 or value.dtype.metadata:
                raise SchemaError(f"a .npz file cannot hold {show(value.dtype.name)}; use .safetensors", item=name)
            with archive.open(f"{name or 'arr_0'}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, value, allow_pickle=False)
