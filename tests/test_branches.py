"""Branches of the decoder that only a stream made for them reaches: `.tw` files whose frames are sound one by one and
wrong together, and what callers get wrong. tests/measure_coverage counts on them.
"""

import asyncio
import gc
import struct
from collections import OrderedDict
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zstandard
from bad import ALIAS, BAD, DICT, FILE, FLOAT32, INT8, START, VALUE, ZRAW, bundle, data, item, tensor, zstd_frame
from frames import INDEX, STREAM, Frame, assemble, at_rest, cut, end, preamble, take_apart
from msgpack import packb
from vectors import stored

import tensorwire.numpy as tw
from tensorwire import (
    CorruptError,
    EncodeError,
    FormatError,
    LimitError,
    SchemaError,
    SequenceError,
    TruncatedError,
    WireError,
    decode_file,
    dtypes,
    encode_file,
)
from tensorwire.codecs import Encoded, Packer, Range, Sizes, Transform, parameter, parse, register
from tensorwire.files.tw import iterate_file
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory.buffers import Pool
from tensorwire.tensor import Extent
from tensorwire.wire import NEED_DATA, ContainerItem, Item, Kind, TensorItem
from tensorwire.wire.frames import FrameType, Header
from tensorwire.wire.items import ItemPacker
from tensorwire.wire.ledger import Ledger, State

AT_REST = Frame(STREAM, packb({"align": 64}))
ROOT = item(0, DICT, [])


def opened(path: Path, stream: bytes) -> None:
    """Open a file and read all of it."""
    path.write_bytes(stream)
    with tw.open_file(path) as file:
        for name in file:
            file[name]


def test_inconsistent_frames_of_a_file_are_refused(tmp_path):
    path = tmp_path / "x.tw"
    good = stored("at-rest")
    opened(path, good)
    frames = take_apart(good)
    with pytest.raises(FormatError, match="size=64"):
        opened(path, assemble([*frames[:-1], end(size=64)], align=64))
    with pytest.raises(SequenceError, match="spliced"):
        opened(path, preamble(minor=9) + good[16:])
    opened(path, assemble([*frames[:-1], Frame(0x90), frames[-1]], align=64))
    with pytest.raises(FormatError, match="no index of all items"):
        opened(path, assemble([*frames[:-2], Frame(INDEX, bytes(33)), frames[-1]], align=64))
    with pytest.raises(SchemaError, match="no index"):
        opened(path, assemble([*frames[:-2], frames[-1]], align=64))
    for length in (0, 1, 16, 100, len(good) - 1):
        with pytest.raises(TruncatedError):
            opened(path, good[:length])
    first = 16
    shorter = len(frames[0].payload) - 1
    for length, error in ((1 << 40, LimitError), (1 << 19, TruncatedError), (shorter, CorruptError)):
        long = assemble([frames[0].having(length=length)])[first : first + 48]
        with pytest.raises(error):
            opened(path, good[:first] + long + good[first + 48 :])


@pytest.mark.parametrize(
    ("frames", "error", "says"),
    [
        ((item(1, VALUE, ["v"], size=1), item(2, ALIAS, ["a"], of=1), data(1, b"\xc0")), FormatError, "still to come"),
        ((tensor(1, ["a"], [3]), data(1, b"abcd", 4)), FormatError, "beyond the end"),
        ((tensor(1, ["a"], [3]), data(1, b"", 0)), FormatError, "empty data frame"),
        ((tensor(1, ["a"], [3]), data(1, b"abcd", 3)), FormatError, "must have 3"),
        ((tensor(1, ["a"], [3], codec=ZRAW), data(1, zstd_frame(b"ab"), 3)), FormatError, "expected 3"),
        ((tensor(1, ["a"], [3], FLOAT32, [[INT8, 16]]), data(1, b"\0\0\0\x80abc", 3)), FormatError, "absmax"),
    ],
    ids=["alias of a value", "beyond", "empty", "long", "zstd", "absmax"],
)  # fmt: skip
def test_random_access_refuses_items_that_streaming_refuses(frames, error, says, tmp_path):
    stream = assemble([AT_REST, ROOT, *frames, Frame(INDEX, None), end()], align=64)
    with pytest.raises(WireError):
        tw.loads(stream)
    with pytest.raises(error, match=says):
        opened(tmp_path / "x.tw", stream)


def test_a_file_is_a_mapping_and_is_read_item_by_item(tmp_path):
    path = tmp_path / "x.tw"
    tw.save_file({"a": np.arange(3), "b": np.zeros(0)}, path)
    with tw.open_file(path) as file:
        assert [*file.keys()] == ["a", "b"]
        assert len(file) == 2
        assert "a" in file
        assert file.map("b").shape == (0,)
    assert sorted(name for name, _ in iterate_file(path, tw.FRONT)) == ["a", "b"]  # what is empty comes first


def test_an_index_that_contradicts_the_stream_is_refused(tmp_path):
    """Each within the order of frames, so that only the item that is asked for, or the count of items, shows it."""
    path = tmp_path / "x.tw"
    items = (tensor(1, ["a"], [0]), tensor(2, ["b"], [2]), tensor(3, ["c"], [2]))
    frames = [AT_REST, ROOT, *items, data(2, b"ab"), data(3, b"cd"), Frame(INDEX, None), end()]
    good = assemble(frames, align=64)
    opened(path, good)
    entries = index_of(good)

    def refused(changed: list[tuple[int, ...]], says: str) -> None:
        stream = assemble([*frames[:-2], Frame(INDEX, packed_index(changed)), end()], align=64)
        assert set(tw.loads(stream)) == {"a", "b", "c"}
        with pytest.raises(FormatError, match=says):
            opened(path, stream)

    *described, root, empty, first, second = entries
    *_, last = described
    refused([*described, root, first, first, second], "disagree about which items")
    refused([*described, root, first, second, empty], "disagree about which items")
    refused([*described, root, first, (*second[:2], 7), (0, 0, 0)], "disagree about which items")
    refused([*described, root, empty, second, second], "leaves out|elsewhere")
    refused([*described, root, empty, second, (second[0] + 64, second[1] + 1, 7)], "past its own start")
    refused([*described, root, empty, first, (second[0], second[1], 7)], "points elsewhere")
    refused([*described, root, empty, first, (second[0] + 16, *second[1:])], "elsewhere|leaves out")
    refused([*described, root, empty, first, (1 << 63, *second[1:])], "past its own start")
    refused([*described, root, empty, first, (second[0], 0, second[2])], "an incomplete entry")
    refused([*described, root, empty, first, (first[0] + 47, *second[1:])], "order of frames")
    refused([*described, root, empty, first, (0, 0, 0)], "before the data|leaves out")
    refused([*described[:-1], root, empty, first, second], "no index of all|leaves out|elsewhere")
    refused([*described, last, root, empty, first, second], "points elsewhere|another frame")
    refused([*described, first, root, empty, first, second], "another frame|elsewhere|leaves out|before the data")


def index_of(stream: bytes) -> list[tuple[int, ...]]:
    """The entries of a file's index: of its ITEM frames, then of its items."""
    begin = int.from_bytes(stream[-40:-32], "little") + 48
    return [*struct.iter_unpack("<QII", stream[begin:-112])]


def packed_index(entries: list[tuple[int, ...]]) -> bytes:
    return b"".join(struct.pack("<QII", *entry) for entry in entries)


def test_an_index_of_items_described_one_by_one_that_names_data_for_a_descriptor(tmp_path):
    path = tmp_path / "x.tw"
    frames = [AT_REST, ROOT, tensor(1, ["a"], [2]), data(1, b"ab"), tensor(2, ["b"], [2]), data(2, b"cd")]
    good = assemble([*frames, Frame(INDEX, None), end()], align=64)
    opened(path, good)
    first, second, third, root, a, b = index_of(good)
    for wrong, says in (
        ([first, second, a, root, a, b], "leaves out|another frame"),
        ([first, second, (third[0] - 64, *third[1:]), root, a, b], "order of frames|elsewhere"),
        ([first, a, third, root, (0, 0, 0), b], "another frame|leaves out"),
        ([first, second, b, root, a, (0, 0, 0)], "disagree about which items|another frame|leaves out|elsewhere"),
    ):
        with pytest.raises(FormatError, match=says):
            opened(path, assemble([*frames, Frame(INDEX, packed_index(wrong)), end()], align=64))


def test_a_file_that_was_cut_off_before_its_end_frame_has_no_index(tmp_path):
    with pytest.raises(TruncatedError, match="ends before the end frame"):
        opened(tmp_path / "x.tw", BAD["end-missing"][2](at_rest))


def test_an_index_of_bundles_that_disagrees_with_the_stream_is_refused(tmp_path):
    path = tmp_path / "x.tw"
    described = [tensor(number, [str(number)], [1]) for number in range(1, 6)]
    frames = [AT_REST, ROOT, *described, bundle(1, [b"a", b"b", b"c"]), data(4, b"d"), data(5, b"e")]
    good = assemble([*frames, Frame(INDEX, None), end()], align=64)
    opened(path, good)
    *others, a, b, c, d, e = index_of(good)
    assert a == b == c
    for data_marks, says in (
        ([a, b, d, d, e], "disagree about the items in a bundle"),
        ([a, d, d, d, e], "only some of the items in a bundle"),
        ([a, b, c, c, e], "disagree about the items in a bundle"),
        ([a, b, c, d, d], "disagree about the items in a bundle"),
        ([a, b, (c[0], c[1], 7), d, e], "order of frames"),
        ([a, b, (c[0] + 64, *c[1:]), d, e], "order of frames"),
        ([a, d, c, d, e], "order of frames"),
        ([a, b, (0, 0, 0), d, e], "disagree about which items"),
    ):
        path.write_bytes(assemble([*frames, Frame(INDEX, packed_index([*others, *data_marks])), end()], align=64))
        with pytest.raises(FormatError, match=says), tw.open_file(path) as file:
            for name in file:
                file[name]


def test_an_index_that_points_into_another_item_is_blamed(tmp_path):
    path = tmp_path / "x.tw"
    described = (ROOT, tensor(1, ["b"], [2]), tensor(2, ["c"], [2]))
    slices = (data(1, b"a", 1), data(1, b"b", 1, 1), data(2, b"cd"))
    good = assemble([AT_REST, *described, *slices, Frame(INDEX, None), end()], align=64)
    pieces = [*cut(good)]
    inside = (sum(map(len, pieces[:6])), 5, int.from_bytes(pieces[5][44:48], "little"))  # the second slice of b
    index = Frame(INDEX, packed_index([*index_of(good)[:-1], inside]))
    path.write_bytes(assemble([AT_REST, *described, *slices, index, end()], align=64))
    with tw.open_file(path) as file:
        with pytest.raises(FormatError, match="points elsewhere: expected data of item 2"):
            file["c"]
        with pytest.raises(FormatError, match="points elsewhere"):
            file["b"]


def test_an_index_obeys_the_limit_of_skippable_frames(tmp_path):
    path = tmp_path / "x.tw"
    tw.save_file([0, 1, np.ones(1)], path)
    with pytest.raises(LimitError, match="skippable"):
        tw.open_file(path, limits=Limits(skippable=64))


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what is mapped")
def test_a_file_is_released_by_close_and_with_its_last_view(tmp_path):
    path = tmp_path / "x.tw"
    tw.save_file({"a": np.arange(3), "b": 7}, path)
    file = tw.open_file(path)
    assert [*file["a"], file["b"]] == [0, 1, 2, 7]
    assert not mapped(path)
    view = file.map("a")
    assert mapped(path)
    for _ in range(2):  # closing twice does no harm
        file.close()
    assert view[2] == 2
    with pytest.raises(ValueError, match="closed"):
        file["a"]
    del view
    gc.collect()
    assert not mapped(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TruncatedError):
        tw.open_file(path)
    gc.collect()
    assert not mapped(path)


def test_only_raw_tensors_in_one_frame_can_be_mapped(tmp_path):
    path = tmp_path / "x.tw"
    frames = (tensor(1, ["a"], [3]), data(1, b"ab", 2), data(1, b"c", 1, 2))
    path.write_bytes(assemble([AT_REST, ROOT, *frames, Frame(INDEX, None), end()], align=64))
    with tw.open_file(path) as file:
        assert file["a"].tolist() == [97, 98, 99]
        with pytest.raises(EncodeError, match="in one frame"):
            file.map("a")
    tw.save_file({"value": 1, "q": np.zeros(64, np.float32)}, path, codec="nf4")
    with tw.open_file(path) as file:
        for name in file:
            with pytest.raises(EncodeError, match="only a raw tensor"):
                file.map(name)


def test_torch_maps_a_file_and_never_writes_to_it(tmp_path):
    pytest.importorskip("torch")
    import tensorwire.torch as front

    path = tmp_path / "x.tw"
    tw.save_file({"a": np.arange(3)}, path)
    before = path.read_bytes()
    with front.open_file(path) as file:
        file.map("a")[0] = 7
        assert int(file["a"][0]) == 0
    assert path.read_bytes() == before


def test_a_stream_carries_one_file(tmp_path):
    file = {"size": 3, "codec": [[1]]}
    frames = (
        START,
        ROOT,
        item(1, FILE, ["f"], **file),
        item(2, FILE, ["g"], **file),
        data(1, b"abc"),
        data(2, b"abc"),
        end(),
    )
    with pytest.raises(SchemaError, match="more than one"):
        decode_file(assemble(frames), tmp_path / "x")
    assert [*tmp_path.iterdir()] == []


def test_a_file_that_shrinks_while_it_is_sent_is_an_error(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(1 << 20))
    buffers = encode_file(path, frame_size=4096)
    next(buffers)
    path.write_bytes(b"")
    with pytest.raises(EncodeError, match="shorter"):
        list(buffers)


def test_an_invalid_source_is_an_argument_error():
    for nothing in ("text", 7, None):
        with pytest.raises(TypeError, match="expected a buffer"):
            tw.loads(nothing)


def test_an_ordered_dict_can_be_sent_inside_a_value():
    assert tw.loads(tw.dumps({"a": OrderedDict(x=1, y=(OrderedDict(),))})) == {"a": {"x": 1, "y": ({},)}}


def packed(item: Item, limits: Limits = DEFAULT) -> bytes:
    packer = ItemPacker(limits)
    packer.add(item)
    return packer.take()[0]


def test_a_writer_obeys_the_limit_of_descriptors():
    with pytest.raises(LimitError, match="descriptor"):
        packed(ContainerItem(("a" * 100,), Kind.DICT), Limits(descriptor=64))
    with pytest.raises(FormatError, match="cannot be described"):
        packed(TensorItem((), dtypes.UINT8, (1 << 64,), ((1,),)))


def test_sequence_numbers_end_before_they_repeat():
    ledger = Ledger(DEFAULT, preamble(), 0)
    ledger.state, ledger.sequence = State.READY, (1 << 32) - 1
    with pytest.raises(LimitError, match="frames"):
        ledger.admit(Header(FrameType.ITEM, 0, ledger.sequence, 0, 0, 0, 0, 0, 0, 0))


def test_need_data_has_a_readable_repr():
    assert repr(NEED_DATA) == "NEED_DATA"


def test_a_pool_keeps_a_few_buffers_and_lends_more():
    pool = Pool()
    lent = [pool.take(100) for _ in range(20)]
    assert len({array.ctypes.data for array in lent}) == 20
    first = {array.ctypes.data for array in lent}
    del lent
    assert pool.take(50).ctypes.data in first


class Pieces:
    """A source for coroutines that gives a few bytes at a time."""

    def __init__(self, stream: bytes) -> None:
        self._rest = memoryview(stream)

    async def readinto(self, buffer: memoryview) -> int:
        size = min(len(buffer), len(self._rest), 100)
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def test_decoding_under_asyncio_gives_the_same_values():
    stream = tw.dumps({"a": np.arange(1000), "b": [1, np.ones(3)]})

    async def received(source: Pieces) -> dict:
        return {name: value async for name, value in tw.decode_async(source)}

    expected, got = dict(tw.decode(stream)), asyncio.run(received(Pieces(stream)))
    assert list(got) == list(expected)
    assert all(np.array_equal(got[name], expected[name]) for name in got)
    with pytest.raises(TruncatedError):
        asyncio.run(received(Pieces(stream[:-1])))


def test_zstd_without_memory_is_a_memory_error(monkeypatch):
    def fail(*args, **options):
        raise zstandard.ZstdError("cannot compress: Allocation error : not enough memory")

    monkeypatch.setattr(zstandard, "ZstdCompressor", lambda **options: SimpleNamespace(compress=fail))
    with pytest.raises(MemoryError):
        tw.dumps({"a": np.arange(1000)}, codec="zstd")


def test_a_value_nested_beyond_what_msgpack_reads_is_too_deep():
    nested = b"\x91" * 1500 + b"\xc0"
    frames = (START, item(0, VALUE, [], size=len(nested)), data(0, nested), end())
    with pytest.raises(LimitError, match="nesting"):
        tw.loads(assemble(frames))


def test_a_state_knows_whether_its_absmax_are_quantized():
    values = np.ones(64, np.float32)
    for spec, nested in (("nf4", False), ("nf4:double_quant=true", True), ("int8", False)):
        codec = parse(spec)
        view = tw.FRONT.view(values)
        encoded = codec.encode(
            values, Extent.whole(view.dtype, view.shape), lambda size: np.empty(size, np.uint8), codec.prepare(view)
        )
        state = codec.packer.state(memoryview(encoded.payload).cast("B"), values.size)
        assert state.nested == nested


class Copy(Packer):
    """A stage that lacks its row."""

    lossless = exact_length = True

    def accepts(self, dtype):
        return True

    def sizes(self, count, dtype):
        return Sizes(count)

    def encode(self, data, extent, take, context=None):
        return Encoded(data)

    def decode(self, payload, extent, out, uncached=None):
        pass


def test_codec_names_and_parameters_are_validated():
    class Shouting(Copy):
        id, name = 40_000, "LOUD NAME"

    with pytest.raises(EncodeError, match="lower-case"):
        register(Shouting)
    fields = [(f"p{number}", int, parameter(0, Range(0, 9), wire=True)) for number in range(9)]
    row = {"id": 40_001, "name": "many"}
    many = make_dataclass("Many", fields, bases=(Copy,), namespace=row, frozen=True, repr=False)
    with pytest.raises(EncodeError, match="more than 8 parameters"):
        register(many)


def test_a_transform_keeps_the_dtype_and_takes_single_elements_unless_it_says_otherwise():
    class Reversed(Transform):
        def accepts(self, dtype):
            return True

        def encode(self, data, extent):
            return data[::-1]

        def decode(self, data, extent, out):
            out[:] = data[::-1]

    assert (Reversed().output(dtypes.FLOAT32), Reversed().block(dtypes.FLOAT32)) == (dtypes.FLOAT32, 1)


def test_a_stage_has_unsigned_parameters():
    for stage in ([-1], [4, "64"]):
        with pytest.raises(FormatError, match="unsigned"):
            packed(TensorItem((), dtypes.FLOAT32, (1,), (tuple(stage),)))
