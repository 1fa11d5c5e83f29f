"""Branches of the decoder that only a stream made for them reaches: `.tw` files whose frames are sound one by one and
wrong together, and what callers get wrong. tests/measure_coverage counts on them.
"""

import asyncio
import gc
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zstandard
from bad import ALIAS, DICT, FILE, FLOAT32, INT8, START, VALUE, ZRAW, data, item, tensor, zstd_frame
from frames import INDEX, STREAM, Frame, assemble, end, preamble, take_apart
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
from tensorwire.files.tw import iterate_file
from tensorwire.limits import DEFAULT, Limits
from tensorwire.memory.buffers import Pool
from tensorwire.wire import NEED_DATA, ContainerItem, Kind, TensorItem
from tensorwire.wire.frames import FrameType, Header
from tensorwire.wire.items import pack_item
from tensorwire.wire.ledger import Ledger, State

AT_REST = Frame(STREAM, packb({"align": 64}))
ROOT = item(0, DICT, [])


def opened(path: Path, stream: bytes) -> None:
    """Open a file and read all of it."""
    path.write_bytes(stream)
    with tw.open_file(path) as file:
        for name in file:
            file[name]


def test_frames_of_a_file_that_are_wrong_together(tmp_path):
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
        ((tensor(1, ["a"], [3], codec=ZRAW), data(1, zstd_frame(b"ab"), 3)), FormatError, "must say 3"),
        ((tensor(1, ["a"], [3], FLOAT32, [[INT8, 16]]), data(1, b"\0\0\0\x80abc", 3)), FormatError, "absmax"),
    ],
    ids=["alias of a value", "beyond", "empty", "long", "zstd", "absmax"],
)  # fmt: skip
def test_items_of_a_file_that_reading_from_front_to_back_would_refuse(frames, error, says, tmp_path):
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


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what is mapped")
def test_a_file_is_let_go_of_when_it_is_closed_and_when_the_last_view_of_it_goes(tmp_path):
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


def test_what_is_no_raw_tensor_in_one_frame_cannot_be_mapped(tmp_path):
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


def test_what_is_no_source_is_the_callers_mistake():
    for nothing in ("text", 7, None):
        with pytest.raises(TypeError, match="expected a buffer"):
            tw.loads(nothing)


def test_an_ordered_dict_travels_inside_a_value():
    assert tw.loads(tw.dumps({"a": OrderedDict(x=1, y=(OrderedDict(),))})) == {"a": {"x": 1, "y": ({},)}}


def test_a_writer_holds_to_the_limit_of_descriptors():
    with pytest.raises(LimitError, match="descriptor"):
        pack_item(ContainerItem(("a" * 100,), Kind.DICT), Limits(descriptor=64))
    with pytest.raises(FormatError, match="cannot be described"):
        pack_item(TensorItem((), dtypes.UINT8, (1 << 64,), ((1,),)), DEFAULT)


def test_sequence_numbers_end_before_they_repeat():
    ledger = Ledger(DEFAULT, preamble(), 0)
    ledger.state, ledger.sequence = State.READY, (1 << 32) - 1
    with pytest.raises(LimitError, match="frames"):
        ledger.admit(Header(FrameType.ITEM, 0, ledger.sequence, 0, 0, 0, 0, 0, 0, 0))


def test_need_data_says_what_it_is():
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


def test_decoding_under_asyncio_gives_what_decoding_gives():
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
