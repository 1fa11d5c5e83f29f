"""Plain values of any number: exact, at a cost that is linear in their bytes, and nothing to attack with."""

import gc
import json
import random
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tensorwire.numpy as tw
from tensorwire import EncodeError, FormatError, LimitError, Limits, UnsupportedError, WireError
from tensorwire.limits import DEFAULT
from tensorwire.wire.values import pack_value, unpack_value

RANDOM = random.Random(7)
LARGE: dict[str, Callable[[], Any]] = {
    "floats": lambda: [RANDOM.random() for _ in range(300_000)],
    "ints": lambda: [RANDOM.getrandbits(40) for _ in range(262_145)],
    "a vocabulary": lambda: {f"token{number}": number for number in range(150_000)},
    "a history": lambda: [{"step": number, "loss": RANDOM.random(), "lr": 1e-4} for number in range(50_000)],
    "pairs": lambda: [[number, number + 1] for number in range(100_000)],
    "int keys": lambda: {number: str(number) for number in range(100_000)},
    "texts": lambda: [f"merge {number}" for number in range(150_000)],
}
INTS = st.integers(-(1 << 63), (1 << 64) - 1)
KEYS = st.text() | st.integers(-(1 << 53), 1 << 53)
SCALARS = st.none() | st.booleans() | INTS | st.floats(allow_nan=False) | st.text() | st.binary()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)


def seconds(job: Callable[[], Any]) -> float:
    """Of the processor, at best; without collections, which look at all that other tests have left."""
    best = float("inf")
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            began = time.process_time()
            job()
            best = min(best, time.process_time() - began)
    finally:
        gc.enable()
    return best


def exact(value: Any) -> Any:
    """A value with the types of all that is in it."""
    if isinstance(value, dict):
        return dict, [(exact(key), exact(child)) for key, child in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [exact(child) for child in value]
    return type(value), repr(value)


@given(VALUES)
def test_a_value_round_trips_exactly(value):
    assert exact(unpack_value(pack_value(value, DEFAULT), DEFAULT)) == exact(value)
    assert exact(tw.loads(tw.dumps({"x": value}))) == exact({"x": value})


@pytest.mark.parametrize("name", LARGE)
def test_a_large_value_costs_about_as_much_as_msgpack(name):
    value = LARGE[name]()
    packed = msgpack.packb(value)
    data = tw.dumps({"x": value})
    assert tw.loads(data) == {"x": value}
    assert len(data) < 1.01 * len(packed) + 1000
    theirs = seconds(lambda: msgpack.unpackb(msgpack.packb(value), strict_map_key=False))
    ours = seconds(lambda: tw.loads(tw.dumps({"x": value})))
    assert ours < 8 * theirs + 0.02  # 1.4 to 3.2 times on a machine of its own


@pytest.mark.parametrize(
    "value", [[(n, n + 1) for n in range(100_000)], [((n,), n) for n in range(50_000)]], ids=["pairs", "nested"]
)
def test_tuples_take_no_large_multiple_either(value):
    lists = json.loads(json.dumps(value))
    assert exact(tw.loads(tw.dumps({"x": value}))) == exact({"x": value})
    theirs = seconds(lambda: msgpack.unpackb(msgpack.packb(lists)))
    ours = seconds(lambda: tw.loads(tw.dumps({"x": value})))
    assert ours < 14 * theirs + 0.02  # 7 to 10 times on a machine of its own


@pytest.mark.parametrize(
    "bodies",
    [
        [b"\x92\x01", b"\x02"],  # together one array
        [b"\x91", b"\x01\x90"],  # together two, with the border elsewhere
        [b"\x90\x90", b""],
        [b"\x01", b"\x90"],
        [b"\x90", b"\xdd\xff\xff\xff\xff"],
    ],
    ids=repr,
)
def test_tuples_are_values_each_by_itself(bodies):
    payload = b"\x92" + b"".join(b"\xc7" + bytes([len(body), 1]) + body for body in bodies)
    with pytest.raises(FormatError):
        unpack_value(payload, DEFAULT)


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (b"\x92\xd4\x02x\xc4\x02\x90\x90", UnsupportedError),
        (b"\x92\xd4\x01\x01\xc4\x02\x90\x90", FormatError),
        (b"\x81\xc0\xc4\x02\x90\x90", FormatError),
        (b"\x81\x90\xc4\x02\x90\x90", FormatError),
        (b"\x81\xd4\x01\x90\xc4\x02\x90\x90", FormatError),
    ],
    ids=repr,
)
def test_what_is_wrong_is_found_with_containers_counted_and_without(payload, error):
    for limits in (DEFAULT, Limits(containers=2)):  # that there are no more shows only when they are counted
        with pytest.raises(error):
            unpack_value(payload, limits)


def test_tuples_are_nested_no_deeper_than_allowed():
    value: Any = ()
    for _ in range(31):
        value = (value,)
    assert unpack_value(pack_value(value, DEFAULT), DEFAULT) == value
    packed = pack_value((value,), Limits(nesting=33))
    with pytest.raises(LimitError, match="nesting is 33, more than the limit of 32"):
        unpack_value(packed, DEFAULT)


@pytest.mark.parametrize("name", LARGE)
def test_a_large_root_costs_about_as_much_as_msgpack(name):
    value = LARGE[name]()
    data = tw.dumps(value)
    assert tw.loads(data) == value
    assert len(data) < 1.01 * len(msgpack.packb(value)) + 1000
    assert [*dict(tw.decode(data))] == [""]


def test_the_values_of_a_small_root_have_names():
    settings = {"step": 7, "lr": 0.1, "betas": (0.9, 0.99)}
    assert dict(tw.decode(tw.dumps(settings))) == settings


def test_cost_is_linear():
    few, many = ([RANDOM.random() for _ in range(count)] for count in (30_000, 300_000))
    assert (
        seconds(lambda: tw.loads(tw.dumps({"x": many}))) < 30 * seconds(lambda: tw.loads(tw.dumps({"x": few}))) + 0.05
    )


def test_beside_a_tensor_a_large_value_is_still_one_item():
    state = {
        "weight": np.zeros(3),
        "log": [0.5] * 300_000,
        "nested": {"vocabulary": {str(n): n for n in range(20_000)}},
    }
    names = [name for name, _ in tw.decode(tw.dumps(state))]
    assert names == ["weight", "log", "nested"]


def test_values_beyond_the_limit_are_sent_in_parts():
    limits = Limits(composite=1000, containers=20)
    for value in ({str(n): [0.5] * 50 for n in range(10)}, {str(n): [[n]] * 9 for n in range(10)}):
        assert tw.loads(tw.dumps({"x": value}, limits=limits), limits=limits) == {"x": value}


@pytest.mark.parametrize("unit", [b"\x80", b"\x90", b"\xd4\x01\x90", b"\x81\xa0\x80"], ids=repr)
def test_containers_are_counted_before_they_are_too_many(unit):
    payload = b"\xdd" + (2_000_000).to_bytes(4, "big") + unit * 2_000_000
    limits = Limits(containers=10_000)
    tracemalloc.start()
    with pytest.raises(LimitError, match="containers in a value is 10001"):
        unpack_value(payload, limits)
    assert tracemalloc.get_traced_memory()[1] < 3 * len(payload) + 24 * 2_000_000
    tracemalloc.stop()


def test_an_array_takes_no_memory_for_missing_elements():
    claims = b"\xdd\x00\xff\xff\xff" * 30 + bytes(1 << 20)
    tracemalloc.start()
    with pytest.raises(FormatError):
        unpack_value(claims, DEFAULT)
    assert tracemalloc.get_traced_memory()[1] < 4 * len(claims)
    tracemalloc.stop()


def test_colliding_keys_cost_nothing():
    many = [(1 << 61) - 1, 0]
    keys = [tuple(many[n >> bit & 1] for bit in range(12)) for n in range(4096)]
    one = b"".join(msgpack.packb(msgpack.ExtType(1, msgpack.packb(list(key)))) + b"\xc0" for key in keys)
    payload = b"\xde" + len(keys).to_bytes(2, "big") + one
    began = time.process_time()
    with pytest.raises(WireError, match="key"):
        unpack_value(payload, DEFAULT)
    assert time.process_time() - began < 0.5  # 16 seconds, if they are compared


@pytest.mark.parametrize(
    "value",
    [{True: 1}, {None: 1}, {1.5: 1}, {b"a": 1}, {(1,): 1}, {(1 << 53) + 1: 1}, [bytearray(b"a")], [memoryview(b"a")],
     [1 << 64], [-(1 << 63) - 1], ["\ud800"], [{1, 2}], [np.float32(1)], {"a": msgpack.Timestamp(1)},
     [msgpack.ExtType(1, b"\x90")]],
    ids=repr,
)  # fmt: skip
def test_values_that_would_change_are_refused_at_any_depth(value):
    for nested in (value, [value], {"a": (value, 1)}, [OrderedDict(x=value)]):
        with pytest.raises(EncodeError):
            pack_value(nested, DEFAULT)


@pytest.mark.parametrize("value", [msgpack.Timestamp(7), msgpack.ExtType(2, b"x"), {msgpack.Timestamp(7): 1}], ids=repr)
def test_extensions_that_are_not_tuples_are_refused(value):
    for nested in (value, [value], {"a": [value]}):
        with pytest.raises((UnsupportedError, FormatError)):
            unpack_value(msgpack.packb(nested), DEFAULT)


def test_a_value_of_more_containers_than_are_allowed_is_not_packed():
    assert pack_value([[1], [2]], Limits(containers=3))
    with pytest.raises(EncodeError, match="containers in a value is 3, more than the limit of 2"):
        pack_value([[1], [2]], Limits(containers=2))
