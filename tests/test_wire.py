"""The reader and writer alone, without I/O: every illegal step fails by the table, every limit is held before memory is
taken, events come in order, no byte beyond the end is asked for, an error stays.

The checksum is handed in, so that most tests here use zlib's, which is quick everywhere.
"""

import asyncio
import io
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bad import BAD, BOOL, DICT, FILE, FLOAT32, START, UINT8, VALUE, bundle, data, item, items, tensor
from frames import Frame, assemble, cut, end, take_apart
from vectors import GOOD, stored

import tensorwire.numpy as tw
from tensorwire import (
    CorruptError,
    FormatError,
    LimitError,
    SequenceError,
    TransportError,
    TruncatedError,
    WireError,
    decode_file,
    dtypes,
)
from tensorwire.checksum import crc32c
from tensorwire.limits import DEFAULT, Limits
from tensorwire.wire import (
    NEED_DATA,
    Bundle,
    ContainerItem,
    Item,
    ItemsStart,
    Kind,
    Reader,
    Skipped,
    Slice,
    SlicePart,
    SliceStart,
    StreamEnd,
    StreamInfo,
    StreamStart,
    TensorItem,
    Writer,
    sharing,
)
from tensorwire.wire.drive import as_async_source, as_source, pull_async
from tensorwire.wire.drive import pull as drive_blocking
from tensorwire.wire.ledger import TRANSITIONS, State, Step

MIB = 1 << 20


def pull(reader: Reader, stream: bytes) -> Iterator[Any]:
    """Events of a reader that is given exactly what it asks for, and told where the input ends."""
    taken = 0
    while not reader.ended:
        event = reader.next_event()
        if event is not NEED_DATA:
            yield event
            continue
        room = reader.get_buffer()
        part = stream[taken : taken + len(room)]
        room[: len(part)] = part
        reader.buffer_updated(len(part))
        taken += len(part)
    assert taken <= len(stream)


# ---------------------------------------------------------------------------------------------------- The table

ROOT, OPEN = item(0, DICT, []), tensor(1, ["a"], [3])
BEFORE = {  # frames that lead to a state, with an item to go on with where the step needs one
    State.OPENING: [],
    State.READY: [START, ROOT, OPEN],
    State.PARTIAL: [START, ROOT, OPEN, data(1, b"a")],
}
STEPS = {
    Step.STREAM: START,
    Step.ITEM: tensor(2, ["b"], [3]),
    Step.SLICE: data(1, b"b"),
    Step.LAST: data(1, b"abc"),
    Step.BUNDLE: bundle(1, [b"abc", b"def"]),
    Step.SKIP: Frame(0xEE, b"?"),
    Step.END: end(),
}


def frames_for(state: State, step: Step) -> list[Frame]:
    frame, before = STEPS[step], BEFORE[state]
    if state is State.PARTIAL and step in (Step.SLICE, Step.LAST):
        frame = data(1, b"b" if step is Step.SLICE else b"bc", start=1)
    if state is State.READY and step is Step.END:
        before = [START, ROOT]
    if state is State.READY and step is Step.BUNDLE:
        before = [*before, tensor(2, ["b"], [3])]
    if state is State.OPENING and step is Step.ITEM:
        frame = ROOT
    return [*before, frame]


@pytest.mark.parametrize("step", [*Step])
@pytest.mark.parametrize("state", [*BEFORE])
def test_the_reader_follows_the_table_of_transitions(state, step):
    reader = Reader(crc32c)
    stream = assemble(frames_for(state, step))
    if step in TRANSITIONS[state]:
        reader_ended = TRANSITIONS[state][step] is State.ENDED
        events = [*reader.feed(stream)]
        assert reader.ended == reader_ended
        assert reader_ended == isinstance(events[-1], StreamEnd)
        return
    with pytest.raises(SequenceError) as caught:
        [*reader.feed(stream)]
    assert caught.value.frame == len(BEFORE[state])


def test_the_table_has_every_state_and_no_way_out_of_the_end():
    assert {*TRANSITIONS} == {*State}
    assert TRANSITIONS[State.ENDED] == {}
    assert {target for steps in TRANSITIONS.values() for target in steps.values()} == {*State} - {State.OPENING}


def writer_in(state: State) -> Writer:
    writer = Writer(zlib.crc32)
    if state is not State.OPENING:
        writer.start(StreamInfo())
        root, tensor = ContainerItem((), Kind.DICT), TensorItem(("a",), dtypes.UINT8, (3,), ((1,),))
        assert len([*writer.items([root, tensor])]) == 1
    if state in (State.PARTIAL, State.ENDED):
        writer.data(0, 1, 1, 0)
    if state is State.ENDED:
        writer.data(1, 2, 2, 0)
        writer.end()
    return writer


@pytest.mark.parametrize("step", [Step.STREAM, Step.ITEM, Step.SLICE, Step.END])
@pytest.mark.parametrize("state", [*State])
def test_the_writer_refuses_what_the_reader_would_refuse(state, step):
    writer = writer_in(state)
    position = 1 if state is State.PARTIAL else 0
    act = {
        Step.STREAM: lambda: writer.start(StreamInfo()),
        Step.ITEM: lambda: [*writer.items([ContainerItem(("b",), Kind.DICT)])],
        Step.SLICE: lambda: writer.data(position, 1, 1, 0),
        Step.END: writer.end,
    }[step]
    offset = writer.offset
    if step in TRANSITIONS[state] and (state, step) != (
        State.READY,
        Step.END,
    ):  # an item is still to come there
        assert act()
        return
    with pytest.raises(WireError):
        act()
    assert writer.offset == offset, "a refused step leaves no trace"


@pytest.mark.parametrize(
    "wrong",
    [(1, 1, 1), (0, 0, 0), (0, 4, 4), (0, 1, 0), (0, 2**63, 1)],
    ids=["gap", "empty", "beyond", "no bytes", "wraps"],
)  # fmt: skip
def test_the_writer_refuses_slices_out_of_place(wrong):
    writer = writer_in(State.READY)
    with pytest.raises(WireError):
        writer.data(*wrong, 0)
    assert writer.data(0, 3, 3, 0)


# ------------------------------------------------------------------------------------------------------- Events


@pytest.mark.parametrize("name", GOOD)
def test_events_come_in_order_and_account_for_every_frame(name):
    stream = stored(name)
    first, *events, last = pull(Reader(crc32c), stream)
    assert isinstance(first, StreamStart)
    assert isinstance(last, StreamEnd)
    described: dict[int, Item] = {}
    position: dict[int, int] = {}
    complete = set()
    for before, event in zip([first, *events], events, strict=False):
        if isinstance(event, ItemsStart):
            assert event.number == len(described)
            described |= enumerate(event.items, event.number)
        elif isinstance(event, SliceStart):
            assert event.item is described[event.number]
            assert event.start == position.setdefault(event.number, 0)
            assert event.number not in complete
        elif isinstance(event, Bundle):
            for part in event.slices:
                assert part.item is described[part.number] and part.number not in complete
                assert (part.start, part.count, part.last) == (0, part.item.total, True)
                complete.add(part.number)
        elif isinstance(event, Skipped):
            assert event.type >= 0x80
        else:
            assert isinstance(before, SliceStart)
            assert (event.number, event.start, event.count) == (before.number, before.start, before.count)
            assert len(event.payload) == before.length
            position[event.number] += event.count
            complete |= {event.number} if event.last else set()
    assert complete == {number for number, item in described.items() if item.total != 0}
    assert last.summary.items == len(described)
    assert (last.summary.frames, last.summary.size) == (len(take_apart(stream)) - 1, len(stream) - 48 - 64)


@pytest.mark.parametrize("name", [*GOOD, *(f"bad/{name}" for name in BAD)])
def test_readers_that_share_descriptions_agree(name):
    def told(reader: Reader) -> tuple[list[Item], str]:
        found: list[Item] = []
        try:
            for event in pull(reader, stored(name)):
                if isinstance(event, SliceStart):
                    reader.direct(memoryview(bytearray(event.length)))
                elif isinstance(event, ItemsStart):
                    found += event.items
        except WireError as error:
            return found, repr(error)
        return found, ""

    unpack = sharing()
    alone, verdict = told(Reader(crc32c))
    first, *others = [told(Reader(crc32c, unpack=unpack)) for _ in range(3)]
    assert first == (alone, verdict)
    for found, says in others:
        assert says == verdict and all(one is other for one, other in zip(first[0], found, strict=True))


@pytest.mark.parametrize("name", GOOD)
def test_no_byte_after_the_end_frame_is_requested(name):
    stream = stored(name)
    reader = Reader(crc32c)
    asked = 0
    while not reader.ended:
        if reader.next_event() is NEED_DATA:
            room = reader.get_buffer()
            assert 0 < len(room) <= len(stream) - asked
            room[:] = stream[asked : asked + len(room)]
            reader.buffer_updated(len(room))
            asked += len(room)
    assert asked == len(stream)
    assert len(reader.get_buffer()) == 0
    with pytest.raises(FormatError, match="ended"):
        reader.next_event()


def test_feed_returns_how_many_bytes_it_used():
    stream = stored("tied")

    def taken(generator) -> int:
        while True:
            try:
                next(generator)
            except StopIteration as stop:
                return stop.value

    reader = Reader(crc32c)
    assert taken(reader.feed(stream[:100])) == 100
    assert taken(reader.feed(stream[100:] + b"next stream")) == len(stream) - 100
    assert reader.ended
    assert taken(reader.feed(b"more")) == 0


def test_an_error_is_raised_again():
    stream = bytearray(stored("tied"))
    stream[300] ^= 1
    reader = Reader(crc32c)
    with pytest.raises(WireError) as first:
        [*reader.feed(stream)]
    for _ in range(3):
        with pytest.raises(WireError) as again:
            reader.next_event()
        assert type(again.value) is type(first.value) and str(again.value) == str(first.value)
    reader = Reader(crc32c)
    assert reader.next_event() is NEED_DATA
    reader.buffer_updated(0)
    for _ in range(3):
        with pytest.raises(TruncatedError):
            reader.next_event()


def test_a_payload_is_received_only_into_the_directed_memory():
    reader = Reader(crc32c)
    room = bytearray(6)
    for event in pull(reader, assemble([START, ROOT, OPEN, data(1, b"abc"), end()])):
        if isinstance(event, SliceStart):
            reader.direct(memoryview(room)[2:5])
        elif isinstance(event, Slice):
            assert event.payload.obj is room
    assert room == b"\0\0abc\0"
    reader = Reader(crc32c)
    events = pull(reader, assemble([START, ROOT, OPEN, data(1, b"abc"), end()]))
    next(event for event in events if isinstance(event, SliceStart))
    reader.direct(memoryview(room)[:4])
    with pytest.raises(ValueError, match="4 bytes for 3"):
        next(events)


def directed_by_parts(reader: Reader, stream: bytes, kinds: tuple[type, ...]) -> list[bytearray]:
    """Where the payload went, one byte a part, directed at events of these kinds."""
    rooms: list[bytearray] = []
    for event in pull(reader, stream):
        if isinstance(event, SlicePart):
            assert (event.done, event.left) == (len(rooms), 3 - len(rooms))
        if isinstance(event, kinds):
            rooms.append(bytearray(1))
            reader.direct(memoryview(rooms[-1]))
    return rooms


def test_a_payload_may_be_directed_part_by_part():
    stream = assemble([START, ROOT, OPEN, data(1, b"abc"), end()])
    assert directed_by_parts(Reader(crc32c), stream, (SliceStart, SlicePart)) == [b"a", b"b", b"c"]
    with pytest.raises(ValueError, match="not directed"):
        directed_by_parts(Reader(crc32c), stream, (SliceStart,))


def lent(reader: Reader, stream: bytes, most: int) -> Iterator[Any]:
    """The events of a stream whose bytes are lent, at most so many at once."""
    at, view = 0, memoryview(stream)
    while not reader.ended:
        event = reader.next_event()
        if event is NEED_DATA:
            size = min(len(reader.get_buffer()), most)
            reader.lend(view[at : at + size])
            at += size
        else:
            yield event


@pytest.mark.parametrize("anywhere", [False, True])
@pytest.mark.parametrize("most", [1, 2, 3, 1 << 20])
def test_a_complete_lent_payload_is_used_in_place(anywhere: bool, most: int) -> None:
    stream = assemble([START, ROOT, OPEN, data(1, b"abc"), end()])
    room = bytearray(3)
    reader = Reader(crc32c)
    for event in lent(reader, stream, most):
        if isinstance(event, SliceStart):
            reader.direct(memoryview(room), anywhere=anywhere)
        elif isinstance(event, Slice):
            in_place = anywhere and most >= 3
            assert event.payload == b"abc" and event.payload.obj is (stream if in_place else room)
            assert room == (bytes(3) if in_place else b"abc")


@pytest.mark.parametrize("anywhere", [False, True])
def test_lent_bytes_are_checked_like_any_others(anywhere: bool) -> None:
    stream = bytearray(assemble([START, ROOT, OPEN, data(1, b"abc"), end()]))

    def read(data: bytes) -> None:
        reader = Reader(crc32c)
        for event in lent(reader, data, 1 << 20):
            if isinstance(event, SliceStart):
                reader.direct(memoryview(bytearray(3)), anywhere=anywhere)

    for at in range(len(stream)):
        stream[at] ^= 1
        with pytest.raises(WireError):
            read(bytes(stream))
        stream[at] ^= 1
        with pytest.raises(TruncatedError):
            read(bytes(stream[:at]))


# ------------------------------------------------------------------------------------------------------- Limits

VALUES = np.linspace(-1, 1, 100, dtype=np.float32)
# The field, a stream, and what the stream needs of it.
AT_LIMIT: dict[str, tuple[bytes, int]] = {
    "descriptor": (tw.dumps({"name": VALUES}), len(take_apart(tw.dumps({"name": VALUES}))[1].payload)),
    "metadata": (stored("metadata-id"), len(take_apart(stored("metadata-id"))[0].payload)),
    "pairs": (stored("metadata-id"), 3),
    "name": (tw.dumps({"ääb": VALUES}), 5),
    "ndim": (tw.dumps(np.zeros((1, 2, 3))), 3),
    "items": (tw.dumps([VALUES, 1, 2]), 4),
    "nesting": (tw.dumps({"a": [VALUES]}), 2),
    "item": (tw.dumps(VALUES), 400),
    "value": (tw.dumps({"a": "x" * 31, "b": "y"}), 32),
    "composite": (tw.dumps({"a": [1, 2, 3]}), 4),
    "containers": (tw.dumps({"a": [1, [2], {"b": ()}]}), 4),
    "frame": (tw.dumps(VALUES, codec="nf4"), 2 * 4 + 50),
    "expanded": (tw.dumps(VALUES, codec="sparse"), 400),
    "skippable": (stored("skippable"), 15),
    "stream": (stored("slices"), len(stored("slices"))),
}


def test_every_limit_has_a_case():
    assert {*AT_LIMIT} == {*Limits.__slots__}


@pytest.mark.parametrize("field", [*AT_LIMIT])
def test_a_limit_allows_its_value_and_no_more(field):
    stream, needed = AT_LIMIT[field]
    tw.loads(stream, limits=replace(DEFAULT, **{field: needed}))
    with pytest.raises(LimitError) as caught:
        tw.loads(stream, limits=replace(DEFAULT, **{field: needed - 1}))
    assert (caught.value.allowed, caught.value.got) == (needed - 1, needed)
    assert str(needed - 1) in str(caught.value)


def test_what_a_zstd_frame_unpacks_to_is_under_the_frame_limit():
    stream = tw.dumps(np.zeros(100_000, np.uint8), codec="zstd")
    assert len(stream) < 1000
    with pytest.raises(LimitError):
        tw.loads(stream, limits=replace(DEFAULT, frame=99_999))


# ------------------------------------------------------------------------------------------------------- Memory

WIDE = replace(DEFAULT, item=1 << 50, stream=1 << 60, value=1 << 40)


def peak(act: Any) -> int:
    """Bytes of the most memory that Python and NumPy held while `act` ran, beyond what they held before."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def claims(elements: int, kind: int, **fields: Any) -> bytes:
    """A stream that describes `elements` and has one data frame of as many, of which 1 KiB comes."""
    narrow = 2 if fields.get("codec", [[1]])[0] == [2] else 1
    frame = data(1, bytes(1024), elements).having(length=elements * narrow)
    return assemble([START, ROOT, item(1, kind, ["x"], **fields), frame])


CLAIMS = {
    "raw": claims(16 << 30, 1, dtype=UINT8, shape=[16 << 30], codec=[[1]]),
    "raw of many dimensions": claims(16 << 30, 1, dtype=UINT8, shape=[1 << 17, 1 << 17], codec=[[1]]),
    "bool": claims(16 << 30, 1, dtype=BOOL, shape=[16 << 30], codec=[[1]]),
    "raw, 1 TiB": claims(1 << 40, 1, dtype=UINT8, shape=[1 << 40], codec=[[1]]),
    "fp16, 1 TiB": claims(1 << 38, 1, dtype=FLOAT32, shape=[1 << 38], codec=[[2]]),
    "zstd, 1 TiB": claims(1 << 40, 1, dtype=UINT8, shape=[1 << 40], codec=[[1], [64]]),
    "value, 1 TiB": claims(1 << 40, VALUE, size=1 << 40),
    "file, 1 TiB": claims(1 << 40, FILE, size=1 << 40, codec=[[1]]),
    "file of unknown size": claims(1 << 40, FILE, size=None, codec=[[1]]),
}


@pytest.mark.parametrize("limits", [DEFAULT, WIDE], ids=["default", "wide"])
@pytest.mark.parametrize("what", [*CLAIMS])
def test_memory_follows_what_has_arrived_not_what_is_declared(what, limits, tmp_path):
    def receive() -> None:
        if what.startswith("file"):
            decode_file(CLAIMS[what], tmp_path / "target", limits=limits)
        else:
            tw.loads(CLAIMS[what], limits=limits)

    def act() -> None:
        with pytest.raises((TruncatedError, LimitError)):
            receive()

    assert peak(act) < 9 * MIB
    assert [*tmp_path.iterdir()] == []


def test_a_large_frame_arrives_in_pieces_and_is_verified_whole():
    """A frame's checksum comes before any complaint about its content, however many pieces it lands in."""
    size = 9 * MIB + 5
    flags = bytearray(size)
    frames = [START, ROOT, tensor(1, ["x"], [size], BOOL), data(1, bytes(flags)), end()]
    stream = assemble(frames)
    assert not tw.loads(stream)["x"].any()
    assert tw.loads(stream, into={"x": np.ones(size, bool)})["x"].sum() == 0
    flags[100] = 2
    with pytest.raises(FormatError, match="neither 0 nor 1"):
        tw.loads(assemble([*frames[:3], data(1, bytes(flags)), end()]))
    damaged = bytearray(stream)
    damaged[damaged.index(bytes(1000)) + 100] = 2
    with pytest.raises(CorruptError):
        tw.loads(damaged)


def test_a_file_of_unknown_size_is_never_bundled():
    described = items(1, [{"kind": FILE, "size": None, "codec": [[1]]}], [[0, "a"], [0, "b"]])
    stream = assemble([START, ROOT, described, bundle(1, [b"abc", b"def"])])
    with pytest.raises(FormatError, match="unknown size"):
        [*Reader(crc32c).feed(stream)]


def test_a_writer_bundles_no_more_items_than_exist():
    writer = Writer(zlib.crc32)
    writer.start(StreamInfo())
    with pytest.raises(SequenceError, match="without an item"):
        writer.bundle(2, 10, 0)


def test_a_skipped_frame_takes_no_memory_of_its_size():
    stream = assemble([START, ROOT, Frame(0x99, bytes(8 * MIB)), end()])
    assert peak(lambda: tw.loads(memoryview(stream))) < MIB


def many_slices(count: int) -> Iterator[bytes]:
    writer = Writer(zlib.crc32)
    yield writer.start(StreamInfo())
    yield from writer.items([TensorItem((), dtypes.UINT8, (count,), ((1,),))])
    crc = zlib.crc32(b"x")
    for start in range(count):
        yield writer.data(start, 1, 1, crc)
        yield b"x"
    yield writer.end()


def slices_seen(count: int) -> int:
    reader = Reader(zlib.crc32)
    seen = sum(isinstance(event, Slice) for piece in many_slices(count) for event in reader.feed(piece))
    assert reader.ended
    return seen


def test_a_hundred_thousand_tiny_frames_use_no_memory():
    assert slices_seen(100_000) == 100_000
    few, many = (peak(lambda count=count: slices_seen(count)) for count in (1000, 10_000))
    assert many < few + 8192


def test_useless_frames_are_bounded_by_the_stream_limit():
    def endless() -> Iterator[bytes]:
        yield from cut(assemble([START, ROOT]))
        pieces = [*cut(assemble([START, ROOT, *[Frame(0x80)] * 50]))][3:]
        yield from pieces

    with pytest.raises(LimitError, match="stream"):
        tw.loads(endless(), limits=replace(DEFAULT, stream=1000))


# ------------------------------------------------------------------------------------------------------ Driving


class Collected:
    """A consumer that keeps nothing but the payloads of slices."""

    def __init__(self) -> None:
        self._reader = Reader(crc32c)
        self.get_buffer, self.buffer_updated = self._reader.get_buffer, self._reader.buffer_updated
        self.lend = self._reader.lend

    def steps(self) -> Iterator[Any]:
        while not self._reader.ended:
            event = self._reader.next_event()
            if event is NEED_DATA:
                yield event
            elif isinstance(event, Slice):
                yield bytes(event.payload)


class Reading:
    """A file of a few bytes a read; `coroutine` says how it is read."""

    def __init__(self, stream: bytes, *, coroutine: bool) -> None:
        self._file = io.BytesIO(stream)
        self.readinto = self._later if coroutine else self._now

    def _now(self, buffer: memoryview) -> int:
        return self._file.readinto(buffer[:50])

    async def _later(self, buffer: memoryview) -> int:
        await asyncio.sleep(0)
        return self._now(buffer)


def cut_at(stream: bytes, size: int = 50) -> Iterator[bytes]:
    for at in range(0, len(stream), size):
        yield stream[at : at + size]
        yield b""


async def cut_later(stream: bytes) -> AsyncIterator[bytes]:
    for chunk in cut_at(stream):
        await asyncio.sleep(0)
        yield chunk


async def drive(source: Any) -> list[bytes]:
    return [payload async for payload in pull_async(Collected(), as_async_source(source))]


STREAM_OF_TWO = assemble([START, ROOT, OPEN, data(1, b"ab"), data(1, b"c", start=2), end()])
BLOCKING: dict[str, Any] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "iterable": cut_at,
    "file": lambda stream: Reading(stream, coroutine=False),
}
WAITING = BLOCKING | {"asynchronous iterable": cut_later, "coroutine": lambda stream: Reading(stream, coroutine=True)}


@pytest.mark.parametrize("how", [*BLOCKING])
def test_a_consumer_is_fed_from_every_blocking_source(how):
    assert [*drive_blocking(Collected(), as_source(BLOCKING[how](STREAM_OF_TWO)))] == [b"ab", b"c"]
    with pytest.raises(TruncatedError):
        [*drive_blocking(Collected(), as_source(BLOCKING[how](STREAM_OF_TWO[:-1])))]


@pytest.mark.parametrize("how", [*WAITING])
def test_a_consumer_is_fed_from_every_asynchronous_source(how):
    assert asyncio.run(drive(WAITING[how](STREAM_OF_TWO))) == [b"ab", b"c"]
    with pytest.raises(TruncatedError):
        asyncio.run(drive(WAITING[how](STREAM_OF_TWO[:-1])))


@pytest.mark.parametrize("how", [*WAITING])
def test_buffers_end_with_their_stream_and_files_may_continue(how):
    longer = STREAM_OF_TWO + b"?"
    goes_on = how in ("file", "coroutine")
    with nullcontext() if goes_on else pytest.raises(FormatError, match="after the end"):
        asyncio.run(drive(WAITING[how](longer)))
    if how in BLOCKING:
        with nullcontext() if goes_on else pytest.raises(FormatError, match="after the end"):
            [*drive_blocking(Collected(), as_source(BLOCKING[how](longer)))]


def test_a_non_blocking_source_without_data_raises():
    class Nothing:
        def readinto(self, buffer: memoryview) -> None:
            return None

    with pytest.raises(TransportError, match="non-blocking"):
        [*drive_blocking(Collected(), as_source(Nothing()))]
    with pytest.raises(TransportError, match="non-blocking"):
        asyncio.run(drive(Nothing()))


def test_invalid_sources_are_refused_by_name():
    for make in (as_source, as_async_source):
        with pytest.raises(TypeError, match="not int"):
            make(7)
        with pytest.raises(TypeError, match="not str"):
            make("text")
