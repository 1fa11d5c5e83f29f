"""`tensorwire encode`: a model or any file to a stream."""

import argparse
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

import tensorwire
from tensorwire import codecs
from tensorwire.cli.common import PIPE, UsageError, codec_spec, verb, write_stream
from tensorwire.errors import EncodeError
from tensorwire.files import safetensors

_TEXT: Final = f"""\
what IN is:
  *.safetensors    tensors, read piece by piece; the model is never loaded
  *.npz, *.npy     arrays
  *.pt, *.pth      a torch checkpoint that loads with weights_only=True
  any other, or -  a file, sent in chunks; codec raw or zstd

codecs, with their parameters as in nf4:blocksize=128,double_quant=true; zstd may stand behind any of them:
{codecs.describe()}
Tensors that a codec cannot represent (integers, for example) travel losslessly beside the others.

examples:
  tensorwire encode model.safetensors model.tw --codec nf4:double_quant=true
  tensorwire encode weights.npz - --codec 'bf16|zstd' | nc host 9000
  tar c folder | tensorwire encode - folder.tw --codec zstd
"""
_CHECKPOINTS: Final = (".pt", ".pth")
_ARRAYS: Final = (".npz", ".npy")


def add_parser(verbs: Any) -> None:
    """Add this verb to the command line."""
    parser = verb(verbs, "encode", _run, summary="encode a model or a file as a stream", text=_TEXT)
    parser.add_argument("input", metavar="IN", help="a file, or - for stdin")
    parser.add_argument("output", metavar="OUT", help="a .tw file, or - for stdout")
    parser.add_argument("--codec", type=codec_spec, default="raw", metavar="SPEC", help="how to encode (raw)")


def _run(arguments: argparse.Namespace) -> int:
    path, output, codec = arguments.input, arguments.output, arguments.codec
    suffix = Path(path).suffix.lower()
    if suffix in _ARRAYS + _CHECKPOINTS and output != PIPE:
        tensorwire.save_file(_container(path, suffix), output, codec=codec)
        return 0
    write_stream(output, stream(path, codec, at_rest=output != PIPE), expected_size(path, codec))
    return 0


def stream(path: str, codec: str, *, at_rest: bool = False) -> Iterator[Any]:
    """The stream that a file becomes, by its name. `at_rest`: of a .safetensors file, laid out as `save_file` does."""
    suffix = Path(path).suffix.lower()
    if suffix in _ARRAYS + _CHECKPOINTS:
        return tensorwire.encode(_container(path, suffix), codec=codec)
    if suffix == ".safetensors":
        return safetensors.encode(path, codec=codec, at_rest=at_rest)
    return tensorwire.encode_file(sys.stdin.buffer if path == PIPE else path, codec=codec)


def expected_size(path: str, codec: str) -> int | None:
    """Bytes of the stream, where they are nearly those of the input."""
    return os.path.getsize(path) if codec == "raw" and path != PIPE and Path(path).suffix else None


def _container(path: str, suffix: str) -> Any:
    return _arrays(path) if suffix in _ARRAYS else _checkpoint(path)


def _arrays(path: str) -> Any:
    try:
        loaded = np.load(path, allow_pickle=False)
        return dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
    except ValueError as error:
        raise EncodeError(f"{path} does not load without pickle: {error}") from None


def _checkpoint(path: str) -> Any:
    try:
        import torch
    except ImportError:
        raise UsageError("reading a torch checkpoint takes torch: pip install 'tensorwire[torch]'") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise EncodeError(f"{path} does not load with weights_only=True: {reason}") from None
