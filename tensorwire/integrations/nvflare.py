"""NVIDIA FLARE with tensors encoded on the wire: one line behind any recipe.

    recipe = FedAvgRecipe(..., aggregator=WireAggregator())
    add_to(recipe, down="bf16", up="nf4")

Output filters mark tensors with the codec that they are to travel with and change nothing (`WireFilter`). When FLARE
sends a message, the decomposer of marked tensors (`WireDecomposer`) offers all of them as one stream, which FLARE's
download service asks for portion by portion: each is encoded when it is asked for. What arrives is decoded as it
comes; or it is kept as it came, encoded, until it is needed: on the server to be added up, on clients as the base that
their updates are differences to (`BaseFilter`).

`EncodeFilter` and `DecodeFilter` do the same without a decomposer, a whole message at a time.
"""

import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np

import tensorwire
from tensorwire.codecs import Codec, is_calculated
from tensorwire.dtypes import FLOAT32, DType
from tensorwire.errors import ArgumentError, EncodeError, SchemaError
from tensorwire.streams import CodecChoice, EncodedTensor, InMemory, OnDisk, Store, encode, gather, rule
from tensorwire.tensor import TensorView, ViewFront
from tensorwire.updates import Views, arrays, exact_vectors, is_finite, mean_of, subtract, views

try:
    from nvflare.apis.dxo import DXO, DataKind
    from nvflare.apis.dxo_filter import DXOFilter
    from nvflare.apis.fl_constant import FLMetaKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable
    from nvflare.app_common.abstract.fl_model import FLModel
    from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
    from nvflare.fuel.f3.streaming.download_service import (
        Consumer,
        Downloadable,
        DownloadService,
        ProduceRC,
        download_object,
    )
    from nvflare.fuel.utils import fobs
    from nvflare.fuel.utils.fobs.datum import DatumManager
    from nvflare.fuel.utils.fobs.decomposers.via_downloader import ViaDownloaderDecomposer
    from nvflare.fuel.utils.memory_utils import cleanup_memory
    from nvflare.widgets.widget import Widget
except ImportError as error:
    raise ImportError(
        f"tensorwire.integrations.nvflare needs nvflare 2.7.2 or later (pip install tensorwire[nvflare]), and found "
        f"nothing under {error.name}: {error}"
    ) from error

# FLARE knows what a message holds by a number of one byte, its own being small. There is no registry of them.
DOWNLOAD_TYPE: Final = 116
# What FLARE asks for in one request, a round trip each; `wire_download_chunk_size` in its configuration overrides it.
PORTION: Final = 4 << 20

_KINDS: Final = (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF)
_NUMBER, _LIBRARY = "portion", "library"  # in the state that sender and receiver tell one another
_LIBRARIES: Final = ("numpy", "torch")
_OFFLOAD: Final = "tensor_disk_offload"  # FOBSContextKey of FLARE 2.9
_OFFLOAD_FOLDER: Final = "tensor_disk_offload_root_dir"
_MESSAGE: Final = "tensorwire.message"
_OTHERS: Final = "tensorwire.others"
_MESSAGE_PORTION: Final = 64 << 20  # of a whole message: an object of FLARE's must stay below 4 GiB
_ELEMENTS: Final = 1 << 16
_BASE: Final = "tensorwire.base"  # in the context of a task
_WHOLE: Final = frozenset(("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"))
CodecSpec = str | dict[str, str]
Path = tuple[str | int, ...]


class Wire:
    """A tensor and the codec that it is to be sent with: what a `WireFilter` puts in its place.

    `view`: of the tensor, or of what is computed from it as it is read. `library`: torch or numpy, for the receiver,
    who gets a tensor again. Filters behind the `WireFilter` see these.
    """

    __slots__ = ("codec", "library", "name", "view")

    def __init__(self, view: TensorView, codec: str, library: str, name: str = "") -> None:
        self.view = view
        self.codec = codec
        self.library = library
        self.name = name

    def __repr__(self) -> str:
        return f"Wire({self.name!r}, {self.codec!r})"


class WireRef:
    """A tensor as it came, encoded: FLARE calls `materialize` when it adds it up."""

    __slots__ = ("encoded", "library")

    def __init__(self, encoded: EncodedTensor, library: str) -> None:
        self.encoded = encoded
        self.library = library

    def materialize(self) -> Any:
        """The tensor, in memory of its own."""
        return _as_sent(self.library, self.encoded.decode())

    def __repr__(self) -> str:
        return f"WireRef({self.encoded!r})"


def _is_tensor(value: Any) -> bool:
    """Whether a value of a model is one that tensorwire carries, and not FLARE itself."""
    return isinstance(value, np.ndarray) or ("torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor))


def _is_ref(value: Any) -> bool:
    return isinstance(value, WireRef)


def _library(tensor: Any) -> str:
    return "numpy" if isinstance(tensor, np.ndarray) else "torch"


def _as_sent(library: str, tensor: Any) -> Any:
    """A decoded tensor in the library that it was sent from."""
    return arrays({"": tensor})[""] if library == "numpy" and not isinstance(tensor, np.ndarray) else tensor


def _chooser(codec: CodecSpec) -> CodecChoice:
    """What a filter's `codec` means: small and sensitive items go exactly, unless a mapping says otherwise."""
    return exact_vectors(codec) if isinstance(codec, str) else codec


def _is_quantizer(codec: Codec) -> bool:
    """Whether a codec needs less than two bytes an element, which no cast and nothing lossless promises."""
    return codec.bound(_ELEMENTS, FLOAT32) < 2 * _ELEMENTS


def _checked(codec: CodecSpec) -> CodecSpec:
    if not isinstance(codec, (str, dict)):
        raise ArgumentError(
            f"codec is a spec or a dict of name patterns to specs, not {type(codec).__name__}: "
            "FLARE writes it into the configuration of a job"
        )
    for spec in [codec] if isinstance(codec, str) else codec.values():
        tensorwire.codec(spec)
    return codec


def _leaves(data: Any, wanted: Callable[[Any], bool], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """What is wanted of the data of a DXO, nested as it may be, with its paths."""
    if wanted(data):
        yield path, data
    elif isinstance(data, dict):
        for key, value in data.items():
            yield from _leaves(value, wanted, (*path, key))
    elif isinstance(data, (list, tuple)):
        for index, value in enumerate(data):
            yield from _leaves(value, wanted, (*path, index))


def _replaced(data: Any, values: Mapping[int, Any]) -> Any:
    """A copy of the data of a DXO in which tensors stand replaced, by `id`; containers are new, all else is shared."""
    if id(data) in values:
        return values[id(data)]
    if isinstance(data, dict):
        return {key: _replaced(value, values) for key, value in data.items()}
    if type(data) in (list, tuple):
        return type(data)(_replaced(value, values) for value in data)
    return data


def _named(data: Any) -> dict[str, Any]:
    return {tensorwire.name_of(path): tensor for path, tensor in _leaves(data, _is_tensor)}


def _marked(data: Any, codec: CodecSpec, ties: "_Ties", base: Mapping[str, EncodedTensor] | None = None) -> Any:
    """The data of a DXO with a `Wire` in place of every tensor, and one for those that are tied.

    `base`: send differences to it.
    """
    tensors = _named(data)
    described = views(tensors)
    changes = described if base is None else _differences(described, base)
    choose = rule(_chooser(codec))
    for name, view in described.items():
        choose.notice(name, view)
    wires = {}
    for name, *others in ties.groups(described):
        chosen = choose(name, tensors[name], changes[name], others=others)
        if _is_quantizer(chosen) and not is_finite(described[name]):
            raise EncodeError(f"holds NaN or an infinity, which {chosen} cannot carry", item=name)
        wire = Wire(changes[name], repr(chosen), _library(tensors[name]), name)
        wires.update({id(tensors[each]): wire for each in (name, *others)})
    choose.finish()
    return _replaced(data, wires)


class _Ties:
    """Which tensors of a model are one, under several names.

    FLARE adds differences name by name, which leaves tied tensors equal and no longer the same. Those that were the
    same once and are equal now count as tied still; that others are equal means nothing.
    """

    def __init__(self) -> None:
        self._first: dict[str, str] = {}  # of each name that was another tensor's: under which name that was found

    def groups(self, described: Views) -> list[list[str]]:
        """The names of a model, those of one tensor together."""
        groups: dict[Any, list[str]] = {}
        for name, view in described.items():
            key: Any = name if view.identity is None else view.identity
            first = described.get(self._first.get(name, ""))
            if key not in groups and first is not None and _equal(view, first):
                key = self._first[name] if first.identity is None else first.identity
            group = groups.setdefault(key, [])
            if group:
                self._first[name] = group[0]
            group.append(name)
        return list(groups.values())


def _equal(one: TensorView, other: TensorView) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and all(
        np.array_equal(_bytes(one, start), _bytes(other, start)) for start in range(0, one.numel, _ELEMENTS)
    )


def _bytes(view: TensorView, start: int) -> Any:
    return np.frombuffer(view.read(start, min(start + _ELEMENTS, view.numel)), np.uint8)


def _differences(new: Views, base: Mapping[str, EncodedTensor]) -> Views:
    """What FLARE is to add to the base, tensor by tensor, to get `new`.

    Of bools it can add nothing. Raises EncodeError for one that has changed, and what is missing in the base.
    """
    floats = {name: view for name, view in new.items() if is_calculated(view.dtype)}
    changes = {}
    for name, view in new.items():
        if name not in base or base[name].shape != view.shape:
            raise EncodeError("no tensor of this name and shape was received: there is no difference to it", item=name)
        was = _in_dtype(base[name].view(), view.dtype)
        if name in floats:
            changes[name] = subtract({name: view}, {name: was})[name]
        elif view.dtype.name in _WHOLE:
            changes[name] = _whole_difference(view, was)
        elif bytes(view.read(0, view.numel)) == bytes(was.read(0, view.numel)):
            changes[name] = TensorView(view.dtype, view.shape, partial(_zeros, view.dtype), identity=view.identity)
        else:
            raise EncodeError(
                f"{view.dtype} has changed, and FLARE cannot add such a difference: send weights (difference=False)",
                item=name,
            )
    return changes


def _in_dtype(view: TensorView, dtype: DType) -> TensorView:
    """The base in the dtype that a client has the tensor in: FLARE makes float32 of integers that it has averaged."""
    if view.dtype != FLOAT32 or dtype.name not in (*_WHOLE, "bool"):
        return view

    def read(start: int, stop: int) -> Any:
        values = np.frombuffer(view.read(start, stop), np.float32)
        return values.astype(dtype.name).view(np.uint8)  # cut off, as `load_state_dict` does

    return TensorView(dtype, view.shape, read)


def _whole_difference(new: TensorView, was: TensorView) -> TensorView:
    """Of integers, which wrap around as those do that it is added to."""
    unsigned = np.dtype(f"u{new.dtype.itemsize}")

    def read(start: int, stop: int) -> Any:
        return (np.frombuffer(new.read(start, stop), unsigned) - np.frombuffer(was.read(start, stop), unsigned)).view(
            np.uint8
        )

    return TensorView(new.dtype, new.shape, read, identity=new.identity)


def _zeros(dtype: DType, start: int, stop: int) -> Any:
    return np.zeros((stop - start) * dtype.itemsize, np.uint8)


class WireFilter(DXOFilter):  # type: ignore[misc]  # FLARE has no types
    """Marks tensors that leave with the codec they are to travel with: for the output of server or clients.

    `codec`: a spec for all tensors, or a dict of name patterns to specs as in `tensorwire.encode`. Under a spec for
    all, statistics of norms, scalars and vectors of up to 16,384 elements travel exactly. `difference`: of weights
    that answer a task, send what is to be added to those that a `BaseFilter` received with it. Weights and differences
    are marked, everything else stays as it is; nothing is encoded yet, and no tensor or dict of the caller's changed.
    NaN and infinities that a quantizer cannot carry are an EncodeError here, which FLARE reports.
    """

    def __init__(self, codec: CodecSpec = "bf16", difference: bool = False) -> None:
        DXOFilter.__init__(self, list(_KINDS), None)
        self.codec = _checked(codec)
        self.difference = difference
        self._ties = _Ties()

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """A new DXO with `Wire`s."""
        if not self.difference or dxo.data_kind != DataKind.WEIGHTS:
            return DXO(dxo.data_kind, _marked(dxo.data, self.codec, self._ties), dict(dxo.meta or {}))
        base = fl_ctx.get_prop(_BASE)
        if base is None:
            raise EncodeError("no weights came with the task that these answer: is there a BaseFilter at the input?")
        return DXO(DataKind.WEIGHT_DIFF, _marked(dxo.data, self.codec, self._ties, base), dict(dxo.meta or {}))


class BaseFilter(DXOFilter):  # type: ignore[misc]  # FLARE has no types
    """Gives tensors for what was kept encoded, and remembers it as the base of differences: for the input of clients.

    What it remembers is what came, whatever becomes of the tensors, in the memory that it took on the wire.
    """

    def __init__(self) -> None:
        DXOFilter.__init__(self, list(_KINDS), None)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """A new DXO with tensors."""
        cleanup_memory()  # of the round before
        refs = {tensorwire.name_of(path): ref for path, ref in _leaves(dxo.data, _is_ref)}
        fl_ctx.set_prop(_BASE, {name: ref.encoded for name, ref in refs.items()}, private=True, sticky=False)
        tensors = {id(ref): ref.materialize() for ref in {id(ref): ref for ref in refs.values()}.values()}
        return DXO(dxo.data_kind, _replaced(dxo.data, tensors), dict(dxo.meta or {}))


class _Outgoing(Downloadable):  # type: ignore[misc]  # FLARE has no types
    """The tensors of one message, encoded as they are asked for.

    For one receiver only the last portion is kept, for whoever asks again; for several each until all have it.
    """

    def __init__(self, wires: dict[str, Wire], size: int) -> None:
        Downloadable.__init__(self, wires)
        self._size = size
        self._lock = threading.Lock()
        self._receivers = 1
        self._asked: dict[str, int] = {}
        self._begin()

    def _begin(self) -> None:
        self._portions = gather(_encode(self.base_obj), self._size)
        self._kept: dict[int, bytes] = {}
        self._made = 0

    def set_transaction(self, tx_id: str, ref_id: str) -> None:
        """How many receivers there are."""
        info = DownloadService.get_transaction_info(tx_id)
        self._receivers = info.num_receivers if info is not None else 1

    def produce(self, state: dict[str, Any], requester: str) -> tuple[str, Any, dict[str, Any]]:
        """The portion behind the one that `state` is about, or the end."""
        number = state[_NUMBER] + 1 if state else 0
        with self._lock:
            self._asked[requester] = number
            portion = self._portion(number)
            if len(self._asked) >= self._receivers:
                self._forget(min(self._asked.values()))
        if portion is None:
            return ProduceRC.EOF, None, {}
        return ProduceRC.OK, portion, {_NUMBER: number, _LIBRARY: _main_library(self.base_obj)}

    def _portion(self, number: int) -> bytes | None:
        if number < self._made and number not in self._kept:
            self._begin()  # the same input makes the same bytes
        while self._made <= number:
            portion = next(self._portions, None)
            if portion is None:
                return None
            self._kept[self._made] = portion
            self._made += 1
            self._forget(number if self._receivers == 1 else 0)
        return self._kept[number]

    def _forget(self, before: int) -> None:
        for number in [number for number in self._kept if number < before]:
            del self._kept[number]

    def release(self) -> None:
        """Let go of the tensors."""
        with self._lock:
            self.base_obj: dict[str, Wire] = {}
            self._begin()


def _main_library(wires: Mapping[str, Wire]) -> str:
    """The library that decodes a message: torch, if any of its tensors is torch's."""
    return "torch" if any(wire.library == "torch" for wire in wires.values()) else "numpy"


def _encode(wires: Mapping[str, Wire]) -> Iterator[Any]:
    """The buffers of a stream of tensors, each under the library it is of and the number that FLARE gives it."""
    sent = {f"{wire.library}.{number}": wire for number, wire in wires.items()}
    try:
        yield from encode(
            {key: wire.view for key, wire in sent.items()}, ViewFront(), codec=lambda key, _: sent[key].codec
        )
    except EncodeError as error:
        if error.item in sent:
            error.item = sent[str(error.item)].name
        raise


def _received(items: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """(number, tensor or reference) of decoded items. Raises SchemaError for names that no `_encode` gives."""
    for key, value in items:
        library, _, number = key.partition(".")
        if library not in _LIBRARIES or not number:
            raise SchemaError("no message of tensorwire.integrations.nvflare has an item of this name", item=key)
        yield number, WireRef(value, library) if isinstance(value, EncodedTensor) else _as_sent(library, value)


def _module(library: Any) -> Any:
    """`tensorwire.torch` or `tensorwire.numpy`, whichever the sender's tensors are of."""
    if library not in _LIBRARIES:
        raise SchemaError(f"the sender's tensors are of {library!r:.40}, not of torch or NumPy")
    return tensorwire.torch if library == "torch" else tensorwire.numpy


class _Incoming(Consumer):  # type: ignore[misc]  # FLARE has no types
    """Decodes a message as its portions come. `store`: where tensors are kept, encoded; None: decode them."""

    supports_pipelining = True

    def __init__(self, store: Store | None) -> None:
        Consumer.__init__(self)
        self.error: str | None = None
        self.items: dict[str, Any] = {}
        self._store = store
        self._decoder: tensorwire.Decoder | None = None

    def consume(self, ref_id: str, state: dict[str, Any], data: Any) -> dict[str, Any]:
        """Decode a portion."""
        if self._decoder is None:
            self._decoder = _module(state.get(_LIBRARY)).decoder(keep_encoded=self._store)
        self.items.update(_received(self._decoder.feed(data)))
        return state

    def download_completed(self, ref_id: str) -> None:
        """Check that all has come."""
        if self._decoder is None:
            raise SchemaError("the sender had nothing to send")
        self._decoder.finish()

    def download_failed(self, ref_id: str, reason: str) -> None:
        """Drop what has come."""
        self.error, self.items, self._decoder = reason, {}, None


class WireDecomposer(ViaDownloaderDecomposer):  # type: ignore[misc]  # FLARE has no types
    """Sends `Wire`s as one stream a message, encoded while it is downloaded, and gives tensors.

    `lazy`: give `WireRef`s in place of tensors, encoded as they came: for a receiver that adds them up. Where FLARE's
    tensor disk offload is on, it does so in any case, with the payloads on disk.
    """

    def __init__(self, lazy: bool = False) -> None:
        ViaDownloaderDecomposer.__init__(self, PORTION, "wire_")
        self.lazy = lazy

    def supported_type(self) -> type[Wire]:
        """`Wire`."""
        return Wire

    def get_download_dot(self) -> int:
        """`DOWNLOAD_TYPE`."""
        return DOWNLOAD_TYPE

    def to_downloadable(self, items: dict[str, Wire], max_chunk_size: int, fobs_ctx: dict[str, Any]) -> Downloadable:
        """The tensors of a message, to be encoded portion by portion."""
        return _Outgoing(items, max_chunk_size)

    def _get_download_kwargs(self, fobs_ctx: dict[str, Any]) -> dict[str, Any]:
        return {"fobs_ctx": fobs_ctx}

    def download(
        self,
        from_fqcn: str,
        ref_id: str,
        per_request_timeout: float,
        cell: Any,
        secure: bool = False,
        optional: bool = False,
        abort_signal: Any = None,
        fobs_ctx: dict[str, Any] | None = None,
        **options: Any,
    ) -> tuple[str | None, dict[str, Any]]:
        """(error, tensors by their numbers) of a message of another cell. `options`: what versions of FLARE add."""
        consumer = _Incoming(self._store({**cell.get_fobs_context(), **(fobs_ctx or {})}))
        download_object(
            from_fqcn=from_fqcn,
            ref_id=ref_id,
            consumer=consumer,
            per_request_timeout=per_request_timeout,
            cell=cell,
            secure=secure,
            optional=optional,
            abort_signal=abort_signal,
            **options,
        )
        return consumer.error, consumer.items

    def _store(self, context: Mapping[str, Any]) -> Store | None:
        if context.get(_OFFLOAD):
            return OnDisk(context.get(_OFFLOAD_FOLDER))
        return InMemory() if self.lazy else None

    def native_decompose(self, target: Wire, manager: DatumManager | None = None) -> bytes:
        """One tensor as a message of its own, where there is nobody to download from."""
        return target.library.encode() + b"\n" + b"".join(_encode({"T": target}))

    def native_recompose(self, data: bytes, manager: DatumManager | None = None) -> Any:
        """The tensor in such a message."""
        library, _, message = data.partition(b"\n")
        ((_, tensor),) = _received(list(_module(library.decode(errors="replace")).decode(message)))
        return tensor


class WireRegister(Widget):  # type: ignore[misc]  # FLARE has no types
    """Registers the decomposer on the site that it is a component of. `lazy`: as in `WireDecomposer`."""

    def __init__(self, lazy: bool = False) -> None:
        Widget.__init__(self)
        self.lazy = lazy
        register(lazy=lazy)


def register(*, lazy: bool = False) -> None:
    """Let this process send and receive `Wire`s; what `WireRegister` does where FLARE builds components.

    Called by the training script where FLARE launches it as a process of its own. Raises RuntimeError where another
    decomposer has the number of ours.
    """
    tensorwire.set_spare_memory(0)  # a model's worth that nobody uses while there is no message, in each process
    fobs.register(WireDecomposer(lazy))
    handler = fobs.get_dot_handler(DOWNLOAD_TYPE)
    if not isinstance(handler, WireDecomposer):
        raise RuntimeError(
            f"download type {DOWNLOAD_TYPE} of FLARE is taken by {type(handler).__name__}: "
            "two packages cannot be used in one job that chose the same"
        )
    handler.lazy = lazy


class EncodeFilter(DXOFilter):  # type: ignore[misc]  # FLARE has no types
    """Replaces the tensors of a DXO by one encoded message: for outputs, with `DecodeFilter` at the other end.

    For jobs that can have filters but no decomposer: it takes the memory of a whole encoded model on either side.
    `codec`: as in `WireFilter`. The caller's dict stays as it is.
    """

    def __init__(self, codec: CodecSpec = "bf16") -> None:
        DXOFilter.__init__(self, list(_KINDS), None)
        self.codec = _checked(codec)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """A new DXO with the message in it; one that has a message already stays as it is."""
        if _MESSAGE in dxo.data:
            return dxo
        tensors = _named(dxo.data)
        buffers = tensorwire.encode(tensors, codec=_chooser(self.codec))
        library = "torch" if any(_library(tensor) == "torch" for tensor in tensors.values()) else "numpy"
        data = {
            _MESSAGE: list(gather(buffers, _MESSAGE_PORTION)),
            _LIBRARY: library,
            _OTHERS: _replaced(dxo.data, {id(tensor): None for tensor in tensors.values()}),
        }
        return DXO(dxo.data_kind, data, dict(dxo.meta or {}))


class DecodeFilter(DXOFilter):  # type: ignore[misc]  # FLARE has no types
    """Makes tensors again of what an `EncodeFilter` sent: for inputs. Everything else passes."""

    def __init__(self) -> None:
        DXOFilter.__init__(self, list(_KINDS), None)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """A new DXO with the tensors in it."""
        if _MESSAGE not in dxo.data:
            return dxo
        tensors = _module(dxo.data[_LIBRARY]).loads(iter(dxo.data[_MESSAGE]))
        return DXO(dxo.data_kind, _refilled(dxo.data[_OTHERS], tensors, ()), dict(dxo.meta or {}))


def _refilled(data: Any, tensors: Mapping[str, Any], path: Path) -> Any:
    """The data of a DXO with its tensors in their places again."""
    if path and data is None:
        return tensors.get(tensorwire.name_of(path))
    if isinstance(data, dict):
        return {key: _refilled(value, tensors, (*path, key)) for key, value in data.items()}
    if type(data) in (list, tuple):
        return type(data)(_refilled(value, tensors, (*path, index)) for index, value in enumerate(data))
    return data


class WireAggregator(ModelAggregator):  # type: ignore[misc]  # FLARE has no types
    """The weighted mean of what clients send, added up slice by slice when all have answered.

    Replies stay as they came until then, which with `lazy=True` is encoded: the memory of an encoded model each, or of
    none with FLARE's tensor disk offload. The mean is that of `tensorwire.updates.mean_of`, in the order of the
    clients' names: the same bits whoever answers first, in the dtypes that were sent, with tied tensors still tied. A
    client counts its number of steps, times its factor in `aggregation_weights`. The tensors of a mean are there until
    the next round begins: copy what is to be kept for longer.
    """

    def __init__(self, aggregation_weights: dict[str, float] | None = None) -> None:
        ModelAggregator.__init__(self)
        self.aggregation_weights = aggregation_weights
        self._models: dict[str, FLModel] = {}
        self._result: FLModel | None = None

    def reset_stats(self) -> None:
        """Forget what has come, and drop the tensors of the mean before, which FLARE keeps without using them."""
        self._models = {}
        if self._result is not None:
            self._result.params = {}
        cleanup_memory()

    def accept_model(self, model: FLModel) -> None:
        """Keep a reply. Raises SchemaError for one that does not go with those that are here, which then stay."""
        client = str((model.meta or {}).get("client_name", len(self._models)))
        if client in self._models:
            raise SchemaError(f"client {client!r} has answered already in this round")
        first = next(iter(self._models.values()), model)
        if list(first.params) != list(model.params) or first.params_type != model.params_type:
            raise SchemaError(f"client {client!r} sends other tensors, or in another order, than those before it")
        for name, value in model.params.items():
            _check_addable(name, _plain(value), _plain(first.params[name]))
        self._models[client] = model

    def aggregate_model(self) -> FLModel:
        """The mean of what has come, as the update of the global model."""
        models = [self._models[client] for client in sorted(self._models)]
        if not models:
            raise SchemaError("no client has sent a model in this round: there is no mean")
        weights = [self._weight(client) for client in sorted(self._models)]
        params: dict[str, Any] = {}
        means: dict[tuple[int, ...], Any] = {}  # of tensors that are the same objects in every reply
        for name in models[0].params:
            values = [model.params[name] for model in models]
            key = tuple(map(id, values))
            if key not in means:
                means[key] = _mean(name, values, weights)
            params[name] = means[key]
        self._models = {}
        self._result = FLModel(params=params, params_type=models[0].params_type, metrics=_metrics(models, weights))
        return self._result

    def _weight(self, client: str) -> float:
        steps = (self._models[client].meta or {}).get(FLMetaKey.NUM_STEPS_CURRENT_ROUND)
        if not isinstance(steps, (int, float)) or isinstance(steps, bool) or not 0 < steps < math.inf:
            steps = 1  # as FLARE counts a client that does not say
        return float(steps) * (self.aggregation_weights or {}).get(client, 1.0)


def _mean(name: str, values: list[Any], weights: list[float]) -> Any:
    try:
        mean = mean_of([_plain(value) for value in values], weights)
    except SchemaError as error:
        error.item = name
        raise
    return _as_sent(values[0].library, mean) if isinstance(values[0], WireRef) else mean


def _plain(value: Any) -> Any:
    """What `mean_of` takes."""
    return value.encoded if isinstance(value, WireRef) else value


def _check_addable(name: str, value: Any, first: Any) -> None:
    """Raise SchemaError for a tensor that is another than the first client's, or that would spoil the mean."""
    if (value.dtype, tuple(value.shape)) != (first.dtype, tuple(first.shape)):
        raise SchemaError(
            f"{value.dtype} {list(value.shape)}, where the first client sent {first.dtype} {list(first.shape)}",
            item=name,
        )
    if not is_finite(value):
        raise SchemaError("NaN or an infinity, which would be all that is left of the mean", item=name)


def _metrics(models: list[FLModel], weights: list[float]) -> dict[str, float] | None:
    """The weighted means of the metrics that all clients report as finite numbers."""
    if any(model.metrics is None for model in models):
        return None
    means = {}
    for name in models[0].metrics:
        values = [model.metrics.get(name, math.nan) for model in models]
        if all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            means[name] = math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / math.fsum(
                weights
            )
    return means or None


def add_to(
    recipe: Any,
    *,
    down: CodecSpec = "bf16",
    up: CodecSpec = "nf4",
    difference: bool | None = None,
    lazy: bool | None = None,
    tasks: Sequence[str] = ("train",),
) -> None:
    """Let a recipe's job send models under `down` and take updates under `up`.

    Call it last, behind filters of your own. `difference`: let clients send what has changed in place of whole
    weights, for FLARE to add to the global model; None: where the recipe lets one choose (`params_transfer_type`), as
    those for FedAvg do. `lazy`: whether the server keeps replies encoded until they are added up, which an aggregation
    must know to `materialize`; None: where the recipe's aggregator is a `WireAggregator`. `tasks`: whose data and
    results these are.

        recipe = FedAvgRecipe(..., aggregator=WireAggregator())
        tensorwire.integrations.nvflare.add_to(recipe)

    Raises ArgumentError for a quantizer `up` where whole weights would travel: training would start from rounded
    weights each round.
    """
    transfer = getattr(recipe, "params_transfer_type", None)
    if difference is None:
        difference = transfer is not None
    if not difference and str(getattr(transfer, "value", transfer)) != "DIFF":
        _check_carries_weights(up)
    if lazy is None:
        lazy = isinstance(getattr(recipe, "aggregator", None), WireAggregator)
    job = getattr(recipe, "_job", None) or recipe.job
    job.job.set_app_packages([*job.job.app_packages, "tensorwire"])  # which sites have: no job is to bring it along
    named = list(tasks)
    recipe.add_server_output_filter(WireFilter(down), tasks=named)
    recipe.add_client_output_filter(WireFilter(up, difference), tasks=named)
    if difference:
        recipe.add_client_input_filter(BaseFilter(), tasks=named)
    job.to_server(WireRegister(lazy), id="tensorwire")
    add: Callable[..., Any] = getattr(recipe, "_add_to_client_apps", job.to_clients)  # keeps what sites have apart
    add(WireRegister(difference), id="tensorwire")


def _check_carries_weights(up: CodecSpec) -> None:
    for spec in [up] if isinstance(up, str) else up.values():
        codec = tensorwire.codec(spec)
        if _is_quantizer(codec):
            raise ArgumentError(f"up={spec!r} is for differences, and whole weights would travel: see difference=")
