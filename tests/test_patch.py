"""Patches: from one version to the next in place, or nothing at all."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from vectors import zstd_decompress

import tensorwire
from tensorwire import EncodeError, SchemaError, WireError, dtypes
from tensorwire.codecs import CHUNK, parse
from tensorwire.tensor import Extent

STATE = dict[str, Any]


def base() -> STATE:
    seeded = torch.Generator().manual_seed(7)
    embedding = torch.randn(300, 64, generator=seeded).bfloat16()
    return {
        "embedding": embedding,
        "head": embedding,
        "big": torch.randn(1500, 1000, generator=seeded).half(),
        "layers": [
            {"weight": torch.randn(64, 64, generator=seeded), "bias": torch.zeros(64)},
            {"weight": torch.arange(9)},
        ],
        "flags": np.array([True, False, True]),
        "scale": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "step": 7,
        "history": [{"loss": 2.5}, {"loss": 2.25}],
    }


def trained(state: STATE) -> STATE:
    """Another version of everything but the bias."""
    new = copy.deepcopy(state)
    new["embedding"].view(torch.int16).view(-1)[::50] += 1
    new["big"].view(torch.int16).view(-1)[3::170] -= 2
    new["layers"][0]["weight"] *= 1.001
    new["layers"][1]["weight"][4] = -(2**40)
    new["flags"][1] = True
    new["scale"] += 1
    new["step"] = 8
    new["history"].append({"loss": 2.0})
    return new


def patch_of(new: Any, old: Any, **options: Any) -> bytes:
    return b"".join(tensorwire.encode(new, base=old, **options))


@pytest.fixture(scope="module")
def made() -> tuple[STATE, STATE, bytes]:
    old = base()
    new = trained(old)
    return old, new, patch_of(new, old)


def test_a_patch_makes_the_new_version_of_the_old_one_in_place(made: tuple[STATE, STATE, bytes]) -> None:
    old, new, patch = made
    state = copy.deepcopy(old)
    embedding = state["embedding"]
    applied = tensorwire.apply(patch, state)
    assert tensorwire.digest(state) == tensorwire.digest(new) == tensorwire.Patch.read(patch).target
    assert state["embedding"] is embedding is state["head"] and torch.equal(embedding, new["embedding"])
    assert state["step"] == 8 and state["history"] == new["history"] and applied.values == 2
    assert applied.skipped == 0 and len(patch) < 120_000


def test_to_apply_it_again_changes_nothing(made: tuple[STATE, STATE, bytes]) -> None:
    old, new, patch = made
    state = copy.deepcopy(old)
    first = tensorwire.apply(patch, state)
    again = tensorwire.apply(patch, state)
    assert again == (0, first.written, 0) and tensorwire.digest(state) == tensorwire.digest(new)


def test_a_patch_that_was_applied_in_part_is_completed(made: tuple[STATE, STATE, bytes]) -> None:
    old, new, patch = made
    state = copy.deepcopy(old)
    state["embedding"][:] = new["embedding"]
    state["layers"][1]["weight"][:] = new["layers"][1]["weight"]
    applied = tensorwire.apply(patch, state)
    assert applied.skipped == 2 and tensorwire.digest(state) == tensorwire.digest(new)


def wrong_value(state: STATE) -> None:
    state["layers"][0]["weight"][3, 3] += 1


def wrong_untouched(state: STATE) -> None:
    state["layers"][0]["bias"][5] = 1


def wrong_step(state: STATE) -> None:
    state["step"] = 6


def missing(state: STATE) -> None:
    del state["scale"]


def missing_last(state: STATE) -> None:
    del state["step"]


def more(state: STATE) -> None:
    state["zzz"] = torch.zeros(1)


def another_dtype(state: STATE) -> None:
    state["big"] = state["big"].bfloat16()


def renamed(state: STATE) -> None:
    state["layerz"] = state.pop("layers")


@pytest.mark.parametrize(
    "spoil", [wrong_value, wrong_untouched, wrong_step, missing, missing_last, more, another_dtype, renamed]
)
def test_another_base_is_refused_before_a_byte_is_written(
    made: tuple[STATE, STATE, bytes], spoil: Callable[[STATE], None]
) -> None:
    state = copy.deepcopy(made[0])
    spoil(state)
    before = tensorwire.digest(state)
    with pytest.raises(SchemaError, match="Nothing was written"):
        tensorwire.apply(made[2], state)
    assert tensorwire.digest(state) == before


def test_a_block_that_is_neither_is_named(made: tuple[STATE, STATE, bytes]) -> None:
    state = copy.deepcopy(made[0])
    wrong_value(state)
    with pytest.raises(SchemaError, match="elements 0 to 4096 are neither") as caught:
        tensorwire.apply(made[2], state)
    assert caught.value.item == "/layers/0/weight"


def test_what_cannot_be_written_is_refused_before_a_byte_is(made: tuple[STATE, STATE, bytes]) -> None:
    state = copy.deepcopy(made[0])
    state["flags"].flags.writeable = False
    before = tensorwire.digest(state)
    with pytest.raises(EncodeError, match="writable") as caught:
        tensorwire.apply(made[2], state)
    assert tensorwire.digest(state) == before and caught.value.item == "flags"


def test_damaged_patches_are_refused_before_a_byte_is_written(made: tuple[STATE, STATE, bytes]) -> None:
    old, _, patch = made
    state = copy.deepcopy(old)
    before = tensorwire.digest(state)
    step = len(patch) // 40
    for at in range(0, len(patch), step):
        mutant = bytearray(patch)
        mutant[at] ^= 1 << at % 8
        for bad in (bytes(mutant), patch[:at]):
            with pytest.raises(WireError):
                tensorwire.apply(bad, state)
    assert tensorwire.digest(state) == before


def test_a_stream_that_stands_alone_is_no_patch(made: tuple[STATE, STATE, bytes]) -> None:
    with pytest.raises(SchemaError, match="no patch"):
        tensorwire.apply(tensorwire.dumps(made[1]), made[0])
    with pytest.raises(SchemaError, match="apply it"):
        tensorwire.loads(made[2])


def test_the_reference_reader_makes_the_same(made: tuple[STATE, STATE, bytes]) -> None:
    old, new = ({name: state[name] for name in state if name != "big"} for state in made[:2])
    got = reference.apply(patch_of(new, old), tensorwire.dumps(old), zstd_decompress)
    reader = reference._Reader(tensorwire.dumps(new), zstd_decompress)
    reader.read()
    wanted = reference.version(reader.items)
    assert got == {name: data for name, (_, data) in wanted.items()}
    assert reference.digest(wanted).hex() == tensorwire.digest(new)


@pytest.mark.parametrize("dtype", dtypes.ALL, ids=str)
@pytest.mark.parametrize("count", [1, 7, 1500])
def test_every_dtype_is_patched(dtype: dtypes.DType, count: int) -> None:
    drawn = np.random.default_rng(dtype.number * count)
    old = drawn.integers(0, 2 if dtype is dtypes.BOOL else 256, count * dtype.itemsize, np.uint8)
    new = old.copy()
    new[:: max(count // 5, 1)] = 1
    extent = Extent(dtype, (count,), 0, count)
    codec = parse("patch")
    payload = codec.encode(new, extent, lambda size: np.empty(size, np.uint8), old).payload
    assert len(payload) <= codec.bound(count, dtype)
    out = old.copy()
    codec.decode(memoryview(payload), extent, out)
    assert np.array_equal(out, new)
    out[-1] ^= 1
    with pytest.raises(SchemaError, match="against"):
        codec.decode(memoryview(payload), extent, out)


def test_an_unchanged_version_is_an_empty_patch(made: tuple[STATE, STATE, bytes]) -> None:
    old = made[0]
    patch = patch_of(copy.deepcopy(old), old)
    assert len(patch) < 500
    assert tensorwire.apply(patch, copy.deepcopy(old)) == (0, 0, 0)


@pytest.mark.parametrize("change", ["more", "less", "shape", "kind"])
def test_versions_that_differ_in_more_than_values_are_no_patch(made: tuple[STATE, STATE, bytes], change: str) -> None:
    old, new = {"a": np.ones(3), "b": 1}, {"a": np.ones(3), "b": 1}
    if change == "more":
        new["c"] = np.ones(1)
    elif change == "less":
        del new["b"]
    elif change == "shape":
        new["a"] = np.ones((3, 1))
    else:
        new["b"] = np.ones(1)
    with pytest.raises(EncodeError, match="send the new one whole") as caught:
        tensorwire.encode(new, base=old)
    assert caught.value.item == {"more": "c", "less": "b", "shape": "a", "kind": "b"}[change]


def test_the_options_of_a_whole_stream_are_refused(made: tuple[STATE, STATE, bytes]) -> None:
    for options in ({"codec": "zstd"}, {"frame_size": 1 << 16}):
        with pytest.raises(EncodeError, match="with base="):
            tensorwire.encode(made[1], base=made[0], **options)


def test_blocks_of_a_large_tensor_are_applied_one_by_one() -> None:
    old = {"w": np.zeros((5 << 20) + 3, np.uint16)}
    new = {"w": old["w"].copy()}
    new["w"][-1] = 1
    patch = patch_of(new, old)
    assert len(patch) < 3000
    half = {"w": old["w"].copy()}
    half["w"][CHUNK:] = new["w"][CHUNK:]
    assert tensorwire.apply(patch, half) == (0, 3, 0)
    state = {"w": old["w"].copy()}
    assert tensorwire.apply(patch, state) == (1, 2, 0) and np.array_equal(state["w"], new["w"])


def test_digests_are_of_content_alone() -> None:
    state = base()
    digest = tensorwire.digest(state)
    again = tensorwire.torch.loads(tensorwire.dumps(state, codec="zstd"))
    assert tensorwire.digest(again) == digest == tensorwire.numpy.digest(dict(reversed(again.items())))
    assert tensorwire.digest({**state, "head": state["head"].clone()}) == digest
    assert tensorwire.digest({**state, "scale": state["scale"].double()}) != digest
    assert tensorwire.digest({**state, "scale": state["scale"].reshape(1)}) != digest
    assert tensorwire.digest({**state, "step": 8}) != digest
    assert tensorwire.digest({}) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
