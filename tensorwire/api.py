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
    """What one front offers."""

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
        """Encode a container as an iterator of buffers to be sent one after the other.

        `obj`: a tensor, a plain value, or dicts, lists and tuples of them; or an iterator of (name, tensor) pairs, sent
        as they come: all of a pair leaves before the next one is asked for, with an empty buffer behind it, at which
        transports send what they have gathered. `codec`: a spec for all tensors ("nf4", "bf16|zstd"), a mapping of name
        patterns to specs, or a function of (name, tensor). `frame_size`: bytes of a frame at most, which is also the
        memory that encoding takes, times a small number. `metadata`: text pairs. `stream_id`: up to 64 bytes that bind
        every frame to a round or session. `tie`: send tensors that share their memory once. `base`: the version of the
        container that the receiver has; what is sent is the patch that `apply` makes the new one with, which has a
        coding and frames of its own (leave `codec` and `frame_size`). `limits`: what a receiver with the same limits
        accepts; more is an EncodeError, before the first buffer where the size is known then. `report`: a
        `tensorwire.Report` that is told what travelled how.

            for buffer in tensorwire.encode(model.state_dict(), codec="bf16|zstd"):
                connection.sendall(buffer)

        Under "raw", buffers are the tensors' own memory, which must not be changed until they were sent: the receiver
        would refuse the stream. To keep buffers and go on training, use `dumps`, which copies.

        Everything but the values themselves is checked here, before the first buffer. Raises EncodeError naming
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
        """As `encode`, for `async for`: `obj` may also be an asynchronous iterator of (name, tensor) pairs.

        All work is done in other threads (`asyncio.to_thread`), from the walk over the container on, a MiB of buffers
        at a time, so that the event loop is never held up. Do not change the tensors meanwhile. Nothing is checked
        before the first buffer is asked for.

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
        """The bytes that `encode` makes of a container with these options, framing included, without encoding it.

        Exact where payloads have a fixed length, as all but compressed ones do; else an upper bound. `at_rest`: of the
        file that `save_file` writes. Raises EncodeError as `encode` does, and for an iterator, whose size is not known
        ahead.

            headers = {"Content-Length": str(tensorwire.encoded_size(weights, codec="nf4"))}
        """
        if isinstance(obj, Iterator):
            raise EncodeError("the size of an iterator of pairs is known only once it was encoded; give a container")
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
        """Decode a stream as an iterator of (name, value), each given when complete and verified.

        `source`: a buffer, an iterable of buffers, or anything with `readinto` (files, `transport.receive()`). A key of
        the outermost dict is its own name, what is nested is called as `tensorwire.name_of` says ("/model/bias").
        `into`: preallocated tensors by name, written in place and given back. `expect`: a schema (see `schema`) or a
        container like the one expected; anything else is refused before memory is taken. `base`: the content digest of
        the version that the values are to be applied to, for a stream that is against one; without it, or with another,
        such a stream is refused. `device`: where torch tensors go. `metadata_into`: a dict that takes the stream's
        metadata before the first value comes.

            for name, tensor in tensorwire.torch.decode(transport.receive(), device="cuda"):
                model.get_parameter(name).copy_(tensor)

        Raises a WireError, and nothing else, for any bytes that are not a whole valid stream. What was given
        before is good; tensors in `into` may then hold parts of an item that was not given.
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
        """As `decode`, for `async for`.

        `source`: an asynchronous iterable of buffers, or what has a coroutine function `readinto`, as `AsyncTransport`
        does; also a buffer, an iterable of buffers or a plain `readinto`, none of which may wait. Slices are decoded in
        another thread while the next one is received; the event loop waits for one to end, at most.

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
        """A decoder that is fed, for whoever is called with bytes and cannot wait for more: see `Decoder`.

        Options as `decode` has them. `keep_encoded`: where to keep payloads, `InMemory()` or `OnDisk()`. Tensors are
        then given as `EncodedTensor`s, verified, in about the memory that they took on the wire; `into` and `device`
        have no meaning then.

            decoder = tensorwire.torch.decoder(expect=model.state_dict())
            for message in queue:
                for name, tensor in decoder.feed(message): ...
            decoder.finish()
        """
        if keep_encoded is not None and (into is not None or device is not None):
            raise ArgumentError("into= and device= are for decoded tensors: leave them out, or keep_encoded=")
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

        It has memory of its own, and stays what it is when tensors change. `base`, `report`: as in `encode`.

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
        """The container in a message or any other source that `decode` takes, once all of it is verified.

        Options as `decode` has them.

            about: dict[str, str] = {}
            weights = tensorwire.torch.loads(message, device="cuda", metadata_into=about)
        """
        front = self._front.on(device)
        return streams.collect(
            data, front, into=into, expect=expect, base=base, metadata_into=metadata_into, limits=limits
        )

    def digest(self, obj: Any, *, limits: Limits = DEFAULT) -> str:
        """The content digest of a container, 64 hexadecimal digits: its version.

        Of names, dtypes, shapes and values alone: not of codecs, frames, files, devices, order, or which tensors are
        tied. docs/format.md says how it is made. It tells apart what differs by accident; it is no signature. Raises
        EncodeError as `encode` does.

            assert tensorwire.digest(loaded) == tensorwire.digest(model.state_dict())
        """
        return streams.digest(obj, self._front, limits)

    def apply(self, source: Any, state: Any, *, limits: Limits = DEFAULT) -> streams.Applied:
        """Make of `state`, in place, the version that a patch is for: what `encode(new, base=old)` gave.

        `source`: as `decode` takes it, or a `tensorwire.Patch` that was read before. `state`: contiguous writable
        tensors, each as it is in the base or, from an earlier attempt, in the new version; nothing may write to them
        meanwhile. Returns how many blocks were written, how many were found done, and how many values were set.

            tensorwire.apply(transport.receive(), model.state_dict())

        Raises a WireError for what is no whole patch, SchemaError for one that is against another version and
        EncodeError for a state that cannot be written: nothing was written then. Whatever ends it later, to apply the
        same patch again ends at its target.
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
        """Write a container to a `.tw` file and return its size. The name appears only when all is on disk.

        `file`: a path, or a binary file object to write into, such as fsspec gives for S3, which has what was written
        also where that ends in an error. `progress`: called with the bytes written and their number in all (at most,
        where a codec compresses; None for an iterator of pairs). `report`: as in `encode`.

            tensorwire.save_file(model.state_dict(), "model.tw", codec="bf16", metadata={"step": "7"})

        Other threads may change tensors meanwhile: the file is whole, and holds of each element what it was at some
        moment. A file object cannot be written over: there, a raw tensor of more than 1 MiB that changes is an
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

        `file`: a path, or a binary file object, read from where it stands to its end. `progress`: called with the bytes
        read and their number in all, if known. Other options as `decode` has them.

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
        """A `.tw` file as a mapping of names to values, read and verified when asked for; see `TensorFile`.

        `file`: a path, a seekable binary file object, or a buffer that holds a file. `base` and `device` as in
        `decode`.

            with tensorwire.open_file("model.tw") as file:
                bias, rows = file["layer.0.bias"], file.get_slice("layer.0.weight")[0:64]
        """
        return files.TensorFile(file, self._front.on(device), base=base, limits=limits)

    def schema(self, obj: Any, *, codec: CodecChoice | None = None, limits: Limits = DEFAULT) -> Schema:
        """What to `expect=`: the names, dtypes and shapes of a container like this one, and its codecs if given.

        Its values do not matter.

            weights = tensorwire.loads(message, expect=tensorwire.schema(model.state_dict()))
        """
        return Schema.of(obj, self._front, codec=codec, limits=limits)


def _check_patch(codec: CodecChoice, frame_size: int) -> None:
    """Raise EncodeError for options that a patch does not have."""
    if codec != "raw" or frame_size != streams.FRAME_SIZE:
        raise EncodeError("a patch has a coding and frames of its own: with base=, leave codec= and frame_size=")


async def _encoded(
    sender: streams.Sender, obj: Any, front: Front, rule: streams.Rule, limits: Limits, *, tie: bool
) -> AsyncIterator[Buffer]:
    """What `Sender` makes of a container or of pairs, made in other threads."""
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
    """The same buffers, a batch of them made in another thread at a time."""
    from asyncio import to_thread

    more = True
    while more:
        batch, more = await to_thread(_batch, buffers)
        for buffer in batch:
            yield buffer


def _batch(buffers: Iterator[Buffer]) -> tuple[list[Buffer], bool]:
    """The next `_BATCH` bytes, or up to where they are to be flushed, and whether there may be more."""
    batch: list[Buffer] = []
    size = 0
    for buffer in buffers:
        batch.append(buffer)
        size += memoryview(buffer).nbytes
        if size >= _BATCH or buffer is streams.FLUSH:
            return batch, True
    return batch, False
