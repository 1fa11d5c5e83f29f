"""Messages of FLARE: marked tensors as one stream, encoded while it is downloaded."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import tensorwire
from tensorwire.errors import EncodeError, SchemaError
from tensorwire.integrations.nvflare.flare import (
    Consumer,
    DatumManager,
    Downloadable,
    DownloadService,
    EventType,
    FLContext,
    ProduceRC,
    ViaDownloaderDecomposer,
    Widget,
    cleanup_memory,
    download_object,
    fobs,
)
from tensorwire.integrations.nvflare.model import as_sent
from tensorwire.streams import EncodedTensor, InMemory, OnDisk, Store, encode, gather
from tensorwire.tensor import TensorView, ViewFront

# FLARE identifies the content of a message by a number of one byte; its own are small. There is no registry.
DOWNLOAD_TYPE: Final = 116
# Bytes per request of FLARE, each a round trip; `wire_download_chunk_size` in its configuration overrides it.
PORTION: Final = 4 << 20

_NUMBER, _LIBRARY = "portion", "library"  # in the state that sender and receiver tell one another
_LIBRARIES: Final = ("numpy", "torch")
_OFFLOAD: Final = "tensor_disk_offload"  # FOBSContextKey of FLARE 2.9
_OFFLOAD_FOLDER: Final = "tensor_disk_offload_root_dir"


class Wire:
    """A tensor with the codec for sending it, with which a `WireFilter` replaces the tensor.

    `view`: of the tensor, or of a difference computed as it is read. `library`: torch or numpy, in which the receiver
    gets the tensor. Filters after the `WireFilter` see these objects.
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
    """A received tensor, still encoded. FLARE calls `materialize` when it adds it up."""

    __slots__ = ("encoded", "library")

    def __init__(self, encoded: EncodedTensor, library: str) -> None:
        self.encoded = encoded
        self.library = library

    def materialize(self) -> Any:
        """The tensor, in memory of its own."""
        return as_sent(self.library, self.encoded.decode())

    def __repr__(self) -> str:
        return f"WireRef({self.encoded!r})"


class _Outgoing(Downloadable):  # type: ignore[misc]  # FLARE has no types
    """The tensors of one message, encoded on request.

    With one receiver, only the last portion is kept, in case it is requested again; with several, each portion is kept
    until all have it.
    """

    def __init__(self, wires: dict[str, Wire], size: int) -> None:
        Downloadable.__init__(self, wires)
        # The library that decodes the message: torch, if any of its tensors is torch's.
        self._library = "torch" if any(wire.library == "torch" for wire in wires.values()) else "numpy"
        self._size = size
        self._lock = threading.Lock()
        self._receivers = 1
        self._asked: dict[str, int] = {}
        self._begin()

    def _begin(self) -> None:
        """Encode from the start: the same input makes the same bytes."""
        self._portions = gather(_encode(self.base_obj), self._size)
        self._kept: dict[int, bytes] = {}
        self._made = 0

    def set_transaction(self, tx_id: str, ref_id: str) -> None:
        """How many receivers there are."""
        info = DownloadService.get_transaction_info(tx_id)
        self._receivers = info.num_receivers if info is not None else 1

    def produce(self, state: dict[str, Any], requester: str) -> tuple[str, Any, dict[str, Any]]:
        """The portion after the one that `state` names, or the end."""
        number = state[_NUMBER] + 1 if state else 0
        with self._lock:
            self._asked[requester] = number
            portion = self._portion(number)
            if len(self._asked) >= self._receivers:
                self._forget(min(self._asked.values()))
        if portion is None:
            return ProduceRC.EOF, None, {}
        return ProduceRC.OK, portion, {_NUMBER: number, _LIBRARY: self._library}

    def _portion(self, number: int) -> bytes | None:
        if number < self._made and number not in self._kept:
            self._begin()
        while self._made <= number:
            try:
                portion = next(self._portions, None)
            except EncodeError:
                self._begin()  # so that a repeated request gets the same answer
                raise
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
        """Release the tensors."""
        with self._lock:
            self.base_obj: dict[str, Wire] = {}
            self._begin()


def _encode(wires: Mapping[str, Wire]) -> Iterator[Any]:
    """The buffers of a stream of tensors, each under the library it is of and the number that FLARE gives it.

    Which of them are tied is said already: they have one number.
    """
    sent = {f"{wire.library}.{number}": wire for number, wire in wires.items()}
    try:
        yield from encode(
            {key: wire.view for key, wire in sent.items()}, ViewFront(), codec=lambda key, _: sent[key].codec, tie=False
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
        yield number, WireRef(value, library) if isinstance(value, EncodedTensor) else as_sent(library, value)


def module(library: Any) -> Any:
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
            self._decoder = module(state.get(_LIBRARY)).decoder(keep_encoded=self._store)
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
    """Sends the `Wire`s of a message as one stream, encoded during the download; the receiver gets tensors.

    `lazy`: the receiver gets encoded `WireRef`s in place of tensors, to add them up. If FLARE's tensor disk offload is
    on, it always gets these, with the payloads on disk.
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
        ((_, tensor),) = _received(list(module(library.decode(errors="replace")).decode(message)))
        return tensor


class WireRegister(Widget):  # type: ignore[misc]  # FLARE has no types
    """Registers the decomposer on the site that it is a component of. `lazy`: as in `WireDecomposer`.

    A client returns memory to the system after it has answered, because it waits for its next task then anyway.
    """

    def __init__(self, lazy: bool = False) -> None:
        Widget.__init__(self)
        self.lazy = lazy
        register(lazy=lazy)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """What FLARE calls with all that happens."""
        if event_type == EventType.AFTER_SEND_TASK_RESULT:
            cleanup_memory()


def register(*, lazy: bool = False) -> None:
    """Let this process send and receive `Wire`s. `WireRegister` does so where FLARE builds components.

    A training script calls it if FLARE launches the script as a separate process. Raises RuntimeError if another
    decomposer has the same number.
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
