"""What a step of training sends with compressors: bytes beside whole gradients, what they keep, and at what speed.

Bytes are those of the whole message of one worker, framing included, counted by encoding the model with the codecs that
a method chooses; no memory of its size is taken. What is kept of the energy (the sum of squares) and GB/s of fp32 are
measured on some 64 MiB of its tensors, with one thread: a compressor's whole step, and the addition of a message to
sums. Published: the message of DisTrO's run of 1.2 billion parameters (Peng et al., 2024).
"""

from collections.abc import Callable, Iterator, Mapping
from time import process_time
from typing import Any, Final

import numpy as np

from tensorwire import streams
from tensorwire.bench.models import VIEWS, Model, default, read_all, resolve
from tensorwire.bench.options import BenchError, Note, Options
from tensorwire.bench.tables import Column, Row
from tensorwire.codecs import as_floats
from tensorwire.errors import counted
from tensorwire.tensor import TensorView
from tensorwire.updates import Compressor, combine

DEFAULT_METHODS: Final = (
    "demo:k=4",
    "demo:k=6",
    "demo:k=32",
    "topk:k=64",
    "lowrank:rank=4",
)
PUBLISHED: Final = {"llama-2-1.2b": 2.8e6}
ROUNDS: Final = 7
_SAMPLE: Final = 16 << 20  # elements
_WHOLE: Final = {"fp32 all-reduce": 4, "bf16 all-reduce": 2}  # bytes of a parameter
_TAKEN: Final = ("float32", "float16", "bfloat16")

COLUMNS: Final = (
    Column("method", "method"),
    Column("bits_per_param", "bits/param", ".4f"),
    Column("mb_per_step", "MB/step", ",.3f"),
    Column("times_bf16", "x bf16", ",.1f"),
    Column("energy", "energy", ".4f"),
    Column("compress_gbps", "compress", ".2f"),
    Column("decompress_gbps", "add", ".2f"),
)


def title(rows: list[Row]) -> str:
    """What stands above the table."""
    return f"a step of {rows[0]['model']}, one worker's message; energy kept; GB/s of fp32"


def run(options: Options, note: Note) -> Iterator[Row]:
    """Rows of whole gradients, of what is published, and one a method."""
    model = resolve(options.model or default())
    tensors = {name: view for name, view in model.tensors.items() if view.dtype.name in _TAKEN}
    if not tensors:
        raise BenchError(f"{model.name} has no tensors in {', '.join(_TAKEN)}")
    if len(tensors) < len(model.tensors):
        note(f"left out {counted(len(model.tensors) - len(tensors), 'tensor')}, which no compressor takes")
    if not model.values:
        note(f"energy and speed on seeded normal numbers ({model.name}): of real updates more is kept")
    parameters = sum(view.numel for view in tensors.values())
    sizes = {name: float(width * parameters) for name, width in _WHOLE.items()}
    if model.name in PUBLISHED:
        sizes["DisTrO, published"] = PUBLISHED[model.name]
    for name, size in sizes.items():
        yield _row(model, name, size, parameters)
    sample = _sample(tensors)
    for spec in options.methods or DEFAULT_METHODS:
        yield _row(model, spec, encoded_size(tensors, spec), parameters) | _measured(sample, spec)


def encoded_size(tensors: Mapping[str, TensorView], spec: str) -> int:
    """Bytes of the message that a compressor makes of these tensors in its first step."""
    method = Compressor(spec).method
    buffers = streams.encode(
        dict(tensors), VIEWS, codec=lambda name, view: method.codec(view.shape), frame_size=method.frame_size
    )
    return sum(memoryview(buffer).nbytes for buffer in buffers)


def _row(model: Model, method: str, size: float, parameters: int) -> Row:
    return {
        "suite": "updates",
        "model": model.name,
        "method": method,
        "bits_per_param": 8 * size / parameters,
        "mb_per_step": size / 1e6,
        "times_bf16": 2 * parameters / size,
        "energy": None,
        "compress_gbps": None,
        "decompress_gbps": None,
    }


def _sample(tensors: Mapping[str, TensorView]) -> dict[str, Any]:
    """The tensors that fit, one of each shape before the second of any, the smallest first; at least one."""
    shapes = {view.shape: name for name, view in tensors.items()}
    names: list[str] = []
    left = _SAMPLE
    for name in dict.fromkeys([*sorted(shapes.values(), key=lambda name: tensors[name].numel), *tensors]):
        if not names or tensors[name].numel <= left:
            names.append(name)
            left -= tensors[name].numel
    return {
        name: as_floats(read_all(tensors[name]), tensors[name].dtype).astype(np.float32).reshape(tensors[name].shape)
        for name in names
    }


def _measured(sample: Mapping[str, Any], spec: str) -> Row:
    message = Compressor(spec).compress(sample)
    sent = combine([message.data])
    whole = sum(float(np.vdot(array, array)) for array in sample.values())
    lost = sum(float(np.square(array - sent[name], dtype=np.float64).sum()) for name, array in sample.items())
    size = sum(array.nbytes for array in sample.values())
    compressor = Compressor(spec)
    return {
        "energy": 1 - lost / whole if whole else None,
        "compress_gbps": size / 1e9 / _seconds(lambda: compressor.compress(sample)),
        "decompress_gbps": size / 1e9 / _seconds(lambda: combine([message.data])),
    }


def _seconds(call: Callable[[], Any]) -> float:
    """The least processor time of a few rounds."""
    found = []
    for _ in range(ROUNDS):
        before = process_time()
        call()
        found.append(process_time() - before)
    return max(min(found), 1e-9)
