"""What a patch takes from one version of a model to the next, beside how other projects send what changed.

Versions are the model in bfloat16, before and after real steps of Adam (`finetune`), or where the model cannot be
trained here, one made-up step. All of the stream counts: headers, checksums, descriptions. Weights are the model's
matrices but for its embeddings, of which rows that did not occur stay as they are, and then all of it. GB/s are of
bfloat16 and processor time, the least of some rounds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from time import thread_time
from typing import Any, Final

import numpy as np
import zstandard

import tensorwire
from tensorwire import dtypes, kernels
from tensorwire.bench import finetune
from tensorwire.bench.models import TRAINED, Model, default, read_all, resolve
from tensorwire.bench.options import BenchError, Note, Options
from tensorwire.bench.tables import Column, Row
from tensorwire.codecs import from_floats
from tensorwire.streams import encode_patch
from tensorwire.tensor import TensorView, ViewFront

ROUNDS: Final = 3
WARM_UP: Final = 20  # steps before the first version, so that Adam knows the sizes of gradients
# Learning rate and steps between the versions; and those of weights that are kept in bfloat16 alone.
_MASTERS: Final = ((1e-6, 1), (3e-6, 1), (1e-5, 1), (2e-5, 12))
_PURE: Final = ((1e-5, 1),)
COLUMNS: Final = (
    Column("data", "versions"),
    Column("codec", "codec"),
    Column("changed", "changed", ".2%"),
    Column("bits_per_changed", "bits/changed", ".2f"),
    Column("bits_per_weight", "bits/weight", ".4f"),
    Column("encode_gbps", "encode GB/s", ".2f"),
    Column("apply_gbps", "apply GB/s", ".2f"),
)

Bits = dict[str, Any]  # bfloat16 as uint16, by name


@dataclass(frozen=True, eq=False)
class Change:
    """Two versions of a model."""

    name: str
    old: Bits
    new: Bits

    def part(self, name: str, chosen: Mapping[str, object]) -> "Change":
        """The same of some tensors."""
        return Change(name, {key: self.old[key] for key in chosen}, {key: self.new[key] for key in chosen})


def title(rows: list[Row]) -> str:
    """What stands above the table."""
    return f"patches of {rows[0]['model']} in bf16, one thread, all framing and checksums counted"


def run(options: Options, note: Note) -> Iterator[Row]:
    """Rows of each change: ours, then others by their bytes alone."""
    model = resolve(options.model or default())
    changes = list(_changes(model, note))
    last = changes[-1].old
    changes.append(Change("unchanged", last, {name: bits.copy() for name, bits in last.items()}))
    for change in changes:
        matrices = {name for name, bits in change.old.items() if bits.ndim == 2 and "embed" not in name}
        parts = [change.part(f"{change.name}, matrices", dict.fromkeys(matrices))] if matrices else []
        for part in (*parts, change):
            yield from _rows(model.name, part)


def _changes(model: Model, note: Note) -> Iterator[Change]:
    if model.name == TRAINED:
        try:
            yield from _trained(model)
        except ImportError:
            note("real steps left out: torch is not installed")
        else:
            return
    note(f"the change of {model.name} is made up: one step of 1e-5 in either direction")
    yield _made_up(model)


def _trained(model: Model) -> Iterator[Change]:
    for dtype, settings in (("float32", _MASTERS), ("bfloat16", _PURE)):
        for rate, steps in settings:
            training = finetune.Training(model, dtype)
            training.run(WARM_UP, rate)
            old = _bits(training.weights)
            training.run(steps, rate)
            pure = " in bf16" if dtype == "bfloat16" else ""
            yield Change(f"lr {rate:g} x {steps}{pure}", old, _bits(training.weights))


def _bits(weights: Mapping[str, Any]) -> Bits:
    import torch

    return {
        name: weight.detach().to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).copy()
        for name, weight in weights.items()
    }


def _made_up(model: Model) -> Change:
    drawn = np.random.default_rng(0)
    old: Bits = {}
    new: Bits = {}
    for name, view in model.tensors.items():
        if view.dtype == dtypes.FLOAT32:
            weights = read_all(view).view(np.float32)
            step = drawn.choice(np.array([-1e-5, 1e-5], np.float32), weights.size)
            for bits, floats in ((old, weights), (new, weights + step)):
                bits[name] = from_floats(floats, dtypes.BFLOAT16).view(np.uint16).reshape(view.shape)
    if not old:
        raise BenchError(f"{model.name} has no tensors in float32")
    return Change("made up", old, new)


def _rows(model: str, change: Change) -> Iterator[Row]:
    old, new = _views(change.old), _views(change.new)
    state = {name: bits.copy() for name, bits in change.old.items()}
    before = np.concatenate([bits.reshape(-1) for bits in change.old.values()])
    after = np.concatenate([bits.reshape(-1) for bits in change.new.values()])
    changed = int(np.count_nonzero(before != after))
    patch = b"".join(encode_patch(new, old, ViewFront()))
    apply = partial(_apply, patch, state, change)
    gbps = 2 * before.size / 1e9
    common = {"suite": "patch", "model": model, "data": change.name, "changed": changed / before.size}
    yield (
        common
        | _sizes(patch, changed, before.size)
        | {
            "codec": "patch",
            "impl": kernels.implementation,
            "encode_gbps": gbps
            / min(_seconds(lambda: list(encode_patch(new, old, ViewFront()))) for _ in range(ROUNDS)),
            "apply_gbps": gbps / min(apply() for _ in range(ROUNDS)),
        }
    )
    if changed:
        for codec, content in _others(before, after):
            yield common | _sizes(content, changed, before.size) | {"codec": codec, "impl": "numpy, zstd"}


def _views(bits: Bits) -> dict[str, TensorView]:
    return {name: _view(tensor) for name, tensor in bits.items()}


def _view(bits: Any) -> TensorView:
    flat = bits.reshape(-1)
    return TensorView(dtypes.BFLOAT16, bits.shape, lambda start, stop: flat[start:stop].view(np.uint8))


def _apply(patch: bytes, state: Bits, change: Change) -> float:
    """Seconds of processor time that it takes to apply a patch, from its bytes on."""
    for name, bits in change.old.items():
        state[name][...] = bits
    tensors = {name: bits.view(_BFLOAT16) for name, bits in state.items()}
    seconds = _seconds(lambda: tensorwire.apply(patch, tensors))
    if any(not np.array_equal(state[name], bits) for name, bits in change.new.items()):
        raise BenchError(f"{change.name} is not what the patch makes")
    return seconds


_BFLOAT16: Final = np.dtype(np.uint16, metadata={"tensorwire": "bfloat16"})


def _sizes(content: bytes, changed: int, weights: int) -> Row:
    bits = 8 * len(content)
    return {"bits_per_changed": bits / changed if changed else None, "bits_per_weight": bits / weights}


def _others(before: Any, after: Any) -> Iterator[tuple[str, bytes]]:
    """What other projects send: places and values; places as gaps, and compressed; all bits that differ, compressed."""
    places = np.flatnonzero(before != after)
    values = after[places].tobytes()
    yield "int32 index + value", places.astype(np.int32).tobytes() + values
    gaps = np.diff(places, prepend=-1) - 1
    wide = gaps.astype(np.uint16 if gaps.max() < 1 << 16 else np.uint32).tobytes()
    compress = zstandard.ZstdCompressor(level=1).compress
    yield "gaps + xor, zstd 1", compress(wide) + compress((before ^ after)[places].tobytes())
    yield "xor, zstd 1", compress((before ^ after).tobytes())


def _seconds(call: Any) -> float:
    begin = thread_time()
    call()
    return max(thread_time() - begin, 1e-9)
