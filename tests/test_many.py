"""Many small items, as adapters and mixtures of experts have them: described together, sent in bundles, opened fast."""

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorwire.numpy as tw
from tensorwire import Report
from tensorwire.errors import NonFiniteError, SchemaError, WireError
from tensorwire.limits import DEFAULT
from tensorwire.streams import ItemStart, Payload, Receiver
from tensorwire.transfer.frames import Frames
from tensorwire.wire import ContainerItem, Kind
from tensorwire.wire.drive import as_source
from tensorwire.wire.items import ItemPacker


def experts(count: int, size: int = 16) -> dict[str, Any]:
    return {f"experts.{number}.w": np.full(size, number, np.float32) for number in range(count)}


def same(got: Any, wanted: dict[str, Any]) -> bool:
    return [*got] == [*wanted] and all(np.array_equal(got[name], wanted[name]) for name in wanted)


def types(stream: bytes) -> list[str]:
    return [frame.type_name for frame in Frames(as_source(stream))]


@pytest.mark.parametrize(
    ("count", "frames"),
    [
        (15, ["DATA"] * 15),  # too few to matter
        (16, ["BUNDLE"]),
        (64, ["BUNDLE"]),
        (79, ["BUNDLE", *["DATA"] * 15]),
        (80, ["BUNDLE"] * 2),
        (500, ["BUNDLE"] * 8),
    ],
)
def test_small_tensors_share_frames(count: int, frames: list[str]) -> None:
    stream = tw.dumps(experts(count))
    assert types(stream) == ["STREAM", "ITEM", *frames, "END"]
    assert same(tw.loads(stream), experts(count))
    assert tw.encoded_size(experts(count)) == len(stream)


def test_a_bundle_ends_at_128_kib_or_a_large_item() -> None:
    state = experts(40, 1024) | {"large": np.zeros(1025, np.float32)} | {f"b.{n}": np.zeros(1) for n in range(16)}
    stream = tw.dumps(state)
    assert types(stream)[2:-1] == ["BUNDLE", *["DATA"] * 9, "DATA", "BUNDLE"]
    assert all(frame.size <= 128 << 10 for frame in Frames(as_source(stream)) if frame.type_name == "BUNDLE")
    assert same(tw.loads(stream), state) and tw.encoded_size(state) == len(stream)
    small = b"".join(tw.encode(state, frame_size=4096))
    assert all(frame.size <= 4096 for frame in Frames(as_source(small)))
    assert same(tw.loads(small), state) and tw.encoded_size(state, frame_size=4096) == len(small)


def test_descriptions_fill_frames() -> None:
    stream = tw.dumps(experts(5000))
    sizes = [frame.header.length for frame in Frames(as_source(stream)) if frame.type_name == "ITEM"]
    assert len(sizes) == 2 and max(sizes) <= DEFAULT.descriptor
    items = [event for event in Receiver(DEFAULT).events(stream) if isinstance(event, ItemStart)]
    assert [event.number for event in items] == [*range(5001)]
    long = {f"{number}{'x' * 1000}": np.zeros(0) for number in range(200)}
    assert [*tw.loads(tw.dumps(long))] == [*long]


@pytest.mark.parametrize("codec", ["raw", "nf4", "int8|zstd", "bf16", "zstd"])
def test_bundles_carry_the_same_values_under_every_codec(codec: str, tmp_path: Path) -> None:
    state = {f"{number}": np.linspace(-1, 1, 33 + number, dtype=np.float32) for number in range(30)}
    few = [tw.loads(tw.dumps({name: state[name]}, codec=codec))[name] for name in state]
    assert same(tw.loads(tw.dumps(state, codec=codec)), dict(zip(state, few, strict=True)))
    tw.save_file(state, tmp_path / "x.tw", codec=codec)
    assert same(tw.load_file(tmp_path / "x.tw"), dict(zip(state, few, strict=True)))
    with tw.open_file(tmp_path / "x.tw") as file:
        assert same(file, dict(zip(state, few, strict=True)))
        assert np.array_equal(file.get_slice("7")[5:9], few[7][5:9])


def test_payloads_of_equal_items_may_differ_in_length() -> None:
    """What is checked once for items that are described alike does not include the length of their payloads."""
    rng = np.random.default_rng(0)
    state = {f"{number}": rng.integers(0, number + 1, 600).astype(np.float32) for number in range(20)}
    stream = tw.dumps(state, codec="raw|zstd")
    assert types(stream).count("BUNDLE") == 1
    with Receiver(DEFAULT, encoded=True) as receiver:
        lengths = {len(event.data) for event in receiver.events(stream) if isinstance(event, Payload)}
    assert len(lengths) > 10 and same(tw.loads(stream), state)


def test_items_of_a_bundle_are_read_one_by_one(tmp_path: Path) -> None:
    state = experts(100) | {"none": np.zeros((0, 3), np.float32), "steps": 7, "tied": None}
    state["tied"] = state["experts.3.w"]
    tw.save_file(state, tmp_path / "x.tw")
    with tw.open_file(tmp_path / "x.tw") as file:
        assert same(file, state) and same(pickle.loads(pickle.dumps(file)), state)
        mapped = file.map("experts.70.w")
        assert np.array_equal(mapped, state["experts.70.w"]) and not mapped.flags.writeable
        assert mapped.ctypes.data % 4 == 0
        assert np.array_equal(file.get_slice("experts.70.w")[3:5], state["experts.70.w"][3:5])
        assert file.get_slice("experts.70.w")[3:3].shape == (0,)
    assert tw.load_file(tmp_path / "x.tw")["tied"] is not None


def test_bundled_items_are_received_in_place() -> None:
    state = experts(20)
    into = {name: np.zeros(16, np.float32) for name in [*state][:5]}
    got = tw.loads(tw.dumps(state), into=into)
    assert same(got, state) and all(got[name] is into[name] for name in into)
    with pytest.raises(SchemaError):
        tw.loads(tw.dumps(state), expect=experts(20, 15))


def test_more_shapes_of_small_tensors_than_are_cached() -> None:
    state = {f"{size}": np.full(size, size % 256, np.uint8) for size in range(1, 1100)}
    assert same(tw.loads(tw.dumps(state)), state)


def test_described_items_are_made_once() -> None:
    packer = ItemPacker(DEFAULT)
    assert packer.add(ContainerItem((), Kind.DICT)) and packer.add(ContainerItem(("a",), Kind.LIST))
    _, described = packer.take()
    assert [*described.names()] == ["", "a"] and described[1] == ContainerItem(("a",), Kind.LIST)
    assert described.items() is described.items() and described[1] is described.items()[1]


def test_payloads_of_a_bundle_can_stay_encoded() -> None:
    stream = tw.dumps(experts(20), codec="int8")
    kept = []
    with Receiver(DEFAULT) as receiver:
        for event in receiver.events(stream):
            if isinstance(event, ItemStart) and event.item.path:
                receiver.keep_encoded(event.number)
            elif isinstance(event, Payload):
                kept.append(bytes(event.data))
    assert len(kept) == 20 and all(payload in stream for payload in kept)


def test_an_error_names_the_item_of_the_bundle() -> None:
    state = experts(40)
    state["experts.33.w"][5] = np.nan
    with pytest.raises(NonFiniteError, match=r"element 5 .*experts\.33\.w"):
        tw.dumps(state, codec="nf4")


def test_a_report_counts_the_items_of_bundles() -> None:
    report = Report()
    stream = tw.dumps(experts(100) | {"n": 1}, codec={"*": "int8"}, report=report)
    assert report.items == 101 and report.bytes_in == 6401 and report.bytes_out == len(stream)


def test_bundles_are_verified_like_frames(tmp_path: Path) -> None:
    tw.save_file(experts(100), tmp_path / "x.tw")
    good = (tmp_path / "x.tw").read_bytes()
    found = [frame for frame in Frames(as_source(good)) if frame.type_name == "BUNDLE"]
    for frame, place in itertools.product(found, (60, 400, -1)):
        damaged = bytearray(good)
        damaged[frame.offset + place % frame.size] ^= 1
        (tmp_path / "y.tw").write_bytes(damaged)
        with pytest.raises(WireError), tw.open_file(tmp_path / "y.tw") as file:
            [*file.values()]
        with pytest.raises(WireError):
            tw.loads(bytes(damaged))


def test_half_a_million_items(tmp_path: Path) -> None:
    """Sizes are counted, not times: what is kept for an item must be bounded however many there are."""
    count = 500_000
    limits = tw_limits(count + 1)
    state = dict.fromkeys((f"experts.{number}" for number in range(count)), np.zeros(0, np.float32))
    tw.save_file(state, tmp_path / "x.tw", limits=limits)
    with tw.open_file(tmp_path / "x.tw", limits=limits) as file:
        assert len(file) == count and file["experts.499999"].shape == (0,)
    assert len(tw.load_file(tmp_path / "x.tw", limits=limits)) == count
    with pytest.raises(WireError, match="items"):
        tw.load_file(tmp_path / "x.tw", limits=tw_limits(count))


def tw_limits(items: int) -> Any:
    from dataclasses import replace

    return replace(DEFAULT, items=items, skippable=32 << 20)
