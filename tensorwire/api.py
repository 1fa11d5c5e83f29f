"""The public functions, bound to one tensor library: `tensorwire`, `tensorwire.numpy` and `tensorwire.torch`."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from io import BytesIO
from typing import Any, Final

from tensorwire import files, streams
from tensorwire.errors import ArgumentError, EncodeError
from tensorwire.limits import DEFAULT, Limits
from tensorwire.streams import CodecChoice, Report, Schema
from tensorwire.tensor import Buffer, Front

_BATCH: Final = 1 << 20  # bytes that one turn in another thread makes


class Api:
    """The public functions of one front."""

    def __init__(self, front: Front) -> None:
        self._front = front

    def encode(
        self,
        obj: Any,
        *,
        codec: CodecChoice = "raw",
        frame_size: int = streams.FRAME_SIZE,
        metadata: Mapping[str, str] | None = None,
        stream_id: bytes = b"",
        tie: bool = True,
        base: Any = None,
        limits: Limits = DEFAULT,
        report: Report | None = None,
    ) -> Iterator[Buffer]:
        """Encode a container as an iterator of buffers to send in order.

        `obj`: a tensor, a plain value, or dicts, lists and tuples of them; or an iterator of (name, tensor) pairs. All
        buffers of a pair are yielded before the next pair is requested, followed by an empty buffer, at which
        transports send what they have gathered. `codec`: a spec for all tensors ("nf4", "bf16|zstd"), a mapping from
        name patterns to specs, or a function of (name, tensor). `frame_size`: the maximum bytes of a frame; encoding
        takes a small multiple of it in memory. `metadata`: text pairs. `stream_id`: up to 64 bytes that bind
        every frame to a round or session. `tie`: send tensors that share their memory once. `base`: the version of the
        container that the receiver has. The stream is then a patch, from which `apply` makes the new version; a patch
        has its own encoding and frames, so leave out `codec` and `frame_size`. `limits`: the receiver's limits;
        exceeding one raises EncodeError, before the first buffer if the size is known then. `report`: a
        `tensorwire.Report` that records how each item was encoded.

            for buffer in tensorwire.encode(model.state_dict(), codec="bf16|zstd"):
                connection.sendall(buffer)

        Under "raw", buffers are the tensors' own memory. Do not change the tensors until the buffers are sent, or the
        receiver will refuse the stream. To keep buffers and continue training, use `dumps`, which copies.

        Everything but the values themselves is checked before the first buffer. Raises EncodeError naming
        the item; NonFiniteError, while iterating, for NaN or infinities under a quantizing codec.
        """
        if base is not None:
            _check_patch(codec, frame_size)
            return streams.encode_patch(
                obj, base, self._front, metadata=metadata, stream_id=stream_id, limits=limits, report=report
            )
        return streams.encode(
            obj,
            self._front,
            codec=codec,
            frame_size=frame_size,
            metadata=metadata,
            stream_id=stream_id,
            tie=tie,
            limits=limits,
            report=report,
        )

    def encode_async(
        self,
        obj: Any,
        *,
        codec: CodecChoice = "raw",
        frame_size: int = streams.FRAME_SIZE,
        metadata: Mapping[str, str] | None = None,
        stream_id: bytes = b"",
        tie: bool = True,
        base: Any = None,
        limits: Limits = DEFAULT,
        report: Report | None = None,
    ) -> AsyncIterator[Buffer]:
        """Like `encode`, for `async for`: `obj` may also be an asynchronous iterator of (name, tensor) pairs.

        All work, including the walk over the container, is done in other threads (`asyncio.to_thread`), 1 MiB of
        buffers at a time, so the event loop is never blocked. Do not change the tensors meanwhile. Nothing is checked
        before the first buffer is requested.

            async for buffer in tensorwire.encode_async(model.state_dict(), codec="nf4"):
                await connection.send(buffer)
        """
        if base is not None:
            _check_patch(codec, frame_size)
            patch = partial(
                streams.encode_patch,
                obj,
                base,
                self._front,
                metadata=metadata,
                stream_id=stream_id,
                limits=limits,
                report=report,
            )
            return _made(patch)
        sender = streams.Sender(streams.stream_info(metadata, stream_id), frame_size, limits, report=report)
        return _encoded(sender, obj, self._front, streams.rule(codec, report), limits, tie=tie)

    def encoded_size(
        self,
        obj: Any,
        *,
        codec: CodecChoice = "raw",
        frame_size: int = streams.FRAME_SIZE,
        metadata: Mapping[str, str] | None = None,
        stream_id: bytes = b"",
        tie: bool = True,
        at_rest: bool = False,
        limits: Limits = DEFAULT,
    ) -> int:
        """The number of bytes that `encode` yields with these options, framing included, computed without encoding.

        Exact for codecs whose payloads have a fixed length; otherwise an upper bound. `at_rest`: the size of the
        file that `save_file` writes. Raises EncodeError as `encode` does, and for an iterator, whose size is not known
        in advance.

            headers = {"Content-Length": str(tensorwire.encoded_size(weights, codec="nf4"))}
        """
        if isinstance(obj, Iterator):
            raise EncodeError("the size of an iterator of pairs is known only after encoding; pass a container")
        leaves = streams.flatten(obj, self._front, streams.rule(codec), limits, tie=tie)
        info = streams.stream_info(metadata, stream_id, at_rest=at_rest)
        return streams.stream_size(leaves, info=info, frame_size=frame_size, at_rest=at_rest, limits=limits).total

    def decode(
        self,
        source: Any,
        *,
        into: Mapping[str, Any] | None = None,
        expect: Any = None,
        base: bytes | None = None,
        device: Any = None,
        metadata_into: dict[str, str] | None = None,
        limits: Limits = DEFAULT,
    ) -> Iterator[tuple[str, Any]]:
        """Decode a stream as an iterator of (name, value); each value is complete and verified.

        `source`: a buffer, an iterable of buffers, or anything with `readinto` (files, `transport.receive()`). A key of
        the outermost dict is its own name; nested items have the names that `tensorwire.name_of` defines
        ("/model/bias"). `into`: preallocated tensors by name, which are written in place and yielded. `expect`: a
        schema (see `schema`) or a container like the one expected; anything else is refused before memory is allocated.
        `base`: the content digest of the version that the values will be applied to; a stream with another base, or
        with a base when none is given, is refused. `device`: the device of torch tensors. `metadata_into`: a dict that
        receives the stream's metadata before the first value.

            for name, tensor in tensorwire.torch.decode(transport.receive(), device="cuda"):
                model.get_parameter(name).copy_(tensor)

        Raises a WireError, and nothing else, for any bytes that are not a complete valid stream. Values yielded before
        the error are good; tensors in `into` may hold parts of an item that was not yielded.
        """
        front = self._front.on(device)
        return streams.decode(
            source, front, into=into, expect=expect, base=base, metadata_into=metadata_into, limits=limits
        )

    def decode_async(
        self,
        source: Any,
        *,
        into: Mapping[str, Any] | None = None,
        expect: Any = None,
        base: bytes | None = None,
        device: Any = None,
        metadata_into: dict[str, str] | None = None,
        limits: Limits = DEFAULT,
    ) -> AsyncIterator[tuple[str, Any]]:
        """Like `decode`, for `async for`.

        `source`: an asynchronous iterable of buffers, or an object with a coroutine function `readinto`, such as
        `AsyncTransport`; also a buffer, an iterable of buffers or a plain `readinto`, if it never blocks. Slices are
        decoded in another thread while the next one is received; the event loop waits for at most one of them.

            async for name, tensor in tensorwire.decode_async(websocket): ...
        """
        front = self._front.on(device)
        return streams.decode_async(
            source, front, into=into, expect=expect, base=base, metadata_into=metadata_into, limits=limits
        )

    def decoder(
        self,
        *,
        into: Mapping[str, Any] | None = None,
        expect: Any = None,
        base: bytes | None = None,
        device: Any = None,
        limits: Limits = DEFAULT,
        keep_encoded: streams.Store | None = None,
    ) -> streams.Decoder:
        """A push decoder, for callers that are handed bytes and cannot wait for more: see `Decoder`.

        Options are those of `decode`. `keep_encoded`: where to keep payloads, `InMemory()` or `OnDisk()`. Tensors are
        then returned as `EncodedTensor`s, verified, which take about as much memory as on the wire; `into` and `device`
        cannot be used then.

            decoder = tensorwire.torch.decoder(expect=model.state_dict())
            for message in queue:
                for name, tensor in decoder.feed(message): ...
            decoder.finish()
        """
        if keep_encoded is not None and (into is not None or device is not None):
            raise ArgumentError("into= and device= are for decoded tensors: leave out either these or keep_encoded=")
        front = self._front.on(device)
        return streams.Decoder(front, into=into, expect=expect, base=base, limits=limits, keep=keep_encoded)

    def dumps(
        self,
        obj: Any,
        *,
        codec: CodecChoice = "raw",
        metadata: Mapping[str, str] | None = None,
        base: Any = None,
        limits: Limits = DEFAULT,
        report: Report | None = None,
    ) -> bytes:
        """A container as one message: all buffers of `encode`, joined.

        The message is a copy and does not change when tensors do. `base`, `report`: as in `encode`.

            message = tensorwire.dumps({"weight": weight, "step": 7}, codec="int8")
        """
        message = BytesIO()  # which, unlike a join, never holds the parts beside the whole
        if base is not None:
            buffers = self.encode(obj, codec=codec, metadata=metadata, base=base, limits=limits, report=report)
        else:
            buffers = streams.encode(
                obj, self._front, codec=codec, metadata=metadata, private=True, limits=limits, report=report
            )
        for buffer in buffers:
            message.write(buffer)
        return message.getvalue()

    def loads(
        self,
        data: Any,
        *,
        into: Mapping[str, Any] | None = None,
        expect: Any = None,
        base: bytes | None = None,
        device: Any = None,
        metadata_into: dict[str, str] | None = None,
        limits: Limits = DEFAULT,
    ) -> Any:
        """The container in a message, or in any other source that `decode` takes, once all of it is verified.

        Options are those of `decode`.

            about: dict[str, str] = {}
            weights = tensorwire.torch.loads(message, device="cuda", metadata_into=about)
        """
        front = self._front.on(device)
        return streams.collect(
            data, front, into=into, expect=expect, base=base, metadata_into=metadata_into, limits=limits
        )

    def digest(self, obj: Any, *, limits: Limits = DEFAULT) -> str:
        """The content digest of a container, 64 hexadecimal digits, which identifies its version.

        It depends on names, dtypes, shapes and values alone: not on codecs, frames, files, devices, order, or which
        tensors are tied. docs/format.md defines it. It detects accidental differences; it is not a signature. Raises
        EncodeError as `encode` does.

            assert tensorwire.digest(loaded) == tensorwire.digest(model.state_dict())
        """
        return streams.digest(obj, self._front, limits)

    def apply(self, source: Any, state: Any, *, limits: Limits = DEFAULT) -> streams.Applied:
        """Apply a patch, made by `encode(new, base=old)`, to `state` in place.

        `source`: a source as for `decode`, or a `tensorwire.Patch` that was read before. `state`: contiguous writable
        tensors, each as it is in the base or, after an interrupted attempt, in the new version; nothing else may write
        to them meanwhile. Returns how many blocks were written, how many were already done, and how many values were
        set.

            tensorwire.apply(transport.receive(), model.state_dict())

        Raises a WireError for anything but a complete patch, SchemaError for a patch against another version and
        EncodeError for a state that cannot be written; nothing is written in these cases. If it is interrupted later,
        applying the same patch again completes it.
        """
        patch = source if isinstance(source, streams.Patch) else streams.Patch.read(source, limits=limits)
        return patch.apply(state, self._front, limits=limits)

    def save_file(
        self,
        obj: Any,
        file: files.File,
        *,
        codec: CodecChoice = "raw",
        metadata: Mapping[str, str] | None = None,
        progress: files.Progress | None = None,
        limits: Limits = DEFAULT,
        report: Report | None = None,
    ) -> int:
        """Write a container to a `.tw` file and return its size. The name appears only when everything is on disk.

        `file`: a path, or a binary file object to write into, such as fsspec's for S3; after an error, a file object
        keeps what was written. `progress`: called with the bytes written and the total (an upper bound
        if a codec compresses; None for an iterator of pairs). `report`: as in `encode`.

            tensorwire.save_file(model.state_dict(), "model.tw", codec="bf16", metadata={"step": "7"})

        Other threads may change tensors meanwhile: the file is complete, and each element has a value that it held at
        some moment. A file object cannot be rewritten, so there a change to a raw tensor of more than 1 MiB raises
        EncodeError. Raises StorageError.
        """
        total = None
        if progress is not None and not isinstance(obj, Iterator):
            total = self.encoded_size(obj, codec=codec, metadata=metadata, at_rest=True, limits=limits)
        return files.save_file(
            obj,
            file,
            self._front,
            codec=codec,
            metadata=metadata,
            progress=progress,
            total=total,
            limits=limits,
            report=report,
        )

    def load_file(
        self,
        file: files.File,
        *,
        into: Mapping[str, Any] | None = None,
        expect: Any = None,
        base: bytes | None = None,
        device: Any = None,
        metadata_into: dict[str, str] | None = None,
        progress: files.Progress | None = None,
        limits: Limits = DEFAULT,
    ) -> Any:
        """The whole container in a `.tw` file, verified. For single tensors see `open_file`.

        `file`: a path, or a binary file object, read from its current position to its end. `progress`: called with the
        bytes read and the total, if known. Other options are those of `decode`.

            model.load_state_dict(tensorwire.torch.load_file("model.tw", device="cuda"))
        """
        return files.load_file(
            file,
            self._front.on(device),
            into=into,
            expect=expect,
            base=base,
            metadata_into=metadata_into,
            progress=progress,
            limits=limits,
        )

    def open_file(
        self, file: files.File | Buffer, *, base: bytes | None = None, device: Any = None, limits: Limits = DEFAULT
    ) -> files.TensorFile:
        """A `.tw` file as a mapping from names to values, each read and verified on access; see `TensorFile`.

        `file`: a path, a seekable binary file object, or a buffer that holds a file. `base` and `device` as in
        `decode`.

            with tensorwire.open_file("model.tw") as file:
                bias, rows = file["layer.0.bias"], file.get_slice("layer.0.weight")[0:64]
        """
        return files.TensorFile(file, self._front.on(device), base=base, limits=limits)

    def schema(self, obj: Any, *, codec: CodecChoice | None = None, limits: Limits = DEFAULT) -> Schema:
        """A schema for `expect=`: the names, dtypes and shapes of a container like `obj`, and its codecs if given.

        The values of `obj` do not matter.

            weights = tensorwire.loads(message, expect=tensorwire.schema(model.state_dict()))
        """
        return Schema.of(obj, self._front, codec=codec, limits=limits)


def _check_patch(codec: CodecChoice, frame_size: int) -> None:
    """Raise EncodeError for options that a patch does not have."""
    if codec != "raw" or frame_size != streams.FRAME_SIZE:
        raise EncodeError("a patch has its own encoding and frames: with base=, leave out codec= and frame_size=")


async def _encoded(
    sender: streams.Sender, obj: Any, front: Front, rule: streams.Rule, limits: Limits, *, tie: bool
) -> AsyncIterator[Buffer]:
    """The buffers that `Sender` makes of a container or of pairs, made in other threads."""
    from asyncio import to_thread  # asyncio takes longer to import than all of this package

    if isinstance(obj, AsyncIterator):
        yield sender.head()
        yield streams.FLUSH
        async for pair in obj:
            name, value = streams.as_pair(pair)
            async for buffer in _in_threads(sender.pair(name, value, front, rule)):
                yield buffer
            yield streams.FLUSH
        rule.finish()
        yield sender.end()
    elif isinstance(obj, Iterator):
        async for buffer in _in_threads(sender.pairs(obj, front, rule)):
            yield buffer
    else:
        leaves = streams.flatten(obj, front, rule, limits, tie=tie)
        async for buffer in _in_threads(await to_thread(sender.container, leaves)):
            yield buffer


async def _made(patch: Callable[[], Iterator[Buffer]]) -> AsyncIterator[Buffer]:
    """The buffers of a patch, made in other threads, the reading of both versions before the first one too."""
    from asyncio import to_thread

    async for buffer in _in_threads(await to_thread(patch)):
        yield buffer


async def _in_threads(buffers: Iterator[Buffer]) -> AsyncIterator[Buffer]:
    """The same buffers, made in another thread batch by batch."""
    from asyncio import to_thread

    more = True
    while more:
        batch, more = await to_thread(_batch, buffers)
        for buffer in batch:
            yield buffer


def _batch(buffers: Iterator[Buffer]) -> tuple[list[Buffer], bool]:
    """The next `_BATCH` bytes, or those up to the next flush, and whether there may be more."""
    batch: list[Buffer] = []
    size = 0
    for buffer in buffers:
        batch.append(buffer)
        size += memoryview(buffer).nbytes
        if size >= _BATCH or buffer is streams.FLUSH:
            return batch, True
    return batch, False
