"""Patches: from one version to the next in place, or nothing at all."""

import asyncio
import copy
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import make
import numpy as np
import pytest
import reference
from fuzz.patches import mutant, verdict
from vectors import stored as stored_vector
from vectors import zstd_decompress

import tensorwire
from tensorwire import CorruptError, EncodeError, FormatError, Limits, SchemaError, WireError, dtypes
from tensorwire.checksum import crc32c
from tensorwire.cli import main
from tensorwire.codecs import CHUNK, parse, patch_slice
from tensorwire.files import versions
from tensorwire.streams import Sender, flatten, rule
from tensorwire.tensor import Extent
from tensorwire.wire import StreamInfo

torch = pytest.importorskip("torch")

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


def test_every_way_to_encode_takes_a_base() -> None:
    async def gather(buffers: AsyncIterator[Any]) -> bytes:
        return b"".join([bytes(buffer) async for buffer in buffers])

    old, new = {"w": np.zeros(1000, np.float16), "step": 1}, {"w": np.ones(1000, np.float16), "step": 2}
    patch = patch_of(new, old, metadata={"by": "ann"})
    assert tensorwire.dumps(new, base=old, metadata={"by": "ann"}) == patch
    assert asyncio.run(gather(tensorwire.encode_async(new, base=old, metadata={"by": "ann"}))) == patch
    for encode in (tensorwire.dumps, tensorwire.encode_async):
        with pytest.raises(EncodeError, match="leave out codec="):
            encode(new, base=old, codec="nf4")
    with pytest.raises(EncodeError, match="send the new one whole"):
        asyncio.run(gather(tensorwire.encode_async(new, base={"w": old["w"]})))


def test_a_kept_patch_keeps_no_encoder_buffer() -> None:
    old = {"w": np.zeros(1 << 22, np.float16)}
    new = {"w": old["w"].copy()}
    new["w"][::1000] = 1
    kept = list(tensorwire.encode(new, base=old))
    owners = [buffer.obj if isinstance(buffer, memoryview) else buffer for buffer in kept]
    assert sum(memoryview(owner).nbytes for owner in owners) < 20_000


@pytest.fixture(scope="module")
def made() -> tuple[STATE, STATE, bytes]:
    old = base()
    new = trained(old)
    return old, new, patch_of(new, old)


def test_a_patch_turns_the_base_into_the_target_in_place(made: tuple[STATE, STATE, bytes]) -> None:
    old, new, patch = made
    state = copy.deepcopy(old)
    embedding = state["embedding"]
    applied = tensorwire.apply(patch, state)
    assert tensorwire.digest(state) == tensorwire.digest(new) == tensorwire.Patch.read(patch).target
    assert state["embedding"] is embedding is state["head"] and torch.equal(embedding, new["embedding"])
    assert state["step"] == 8 and state["history"] == new["history"] and applied.values == 2
    assert applied.skipped == 0 and len(patch) < 120_000


def test_applying_it_again_changes_nothing(made: tuple[STATE, STATE, bytes]) -> None:
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


def test_a_block_matching_neither_version_is_named(made: tuple[STATE, STATE, bytes]) -> None:
    state = copy.deepcopy(made[0])
    wrong_value(state)
    with pytest.raises(SchemaError, match="elements 0 to 4096 are neither") as caught:
        tensorwire.apply(made[2], state)
    assert caught.value.item == "/layers/0/weight"


def test_unwritable_tensors_are_refused_before_any_write(made: tuple[STATE, STATE, bytes]) -> None:
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


def test_mutants_with_valid_checksums_are_refused_or_make_the_target() -> None:
    """What a block is bound to holds also where the checksums of frames are made to fit (`tests/fuzz/patches.py`)."""
    spread, patch = random.Random(5), stored_vector("patches/to-new")
    old, target = tensorwire.torch.loads(stored_vector("patches/old")), tensorwire.Patch.read(patch).target
    said = [verdict(mutant(patch, spread), old, target) for _ in range(60)]
    assert "another" not in said and said.count("refused") > 50


def test_a_stream_without_a_base_is_not_a_patch(made: tuple[STATE, STATE, bytes]) -> None:
    with pytest.raises(SchemaError, match="not a patch"):
        tensorwire.apply(tensorwire.dumps(made[1]), made[0])
    with pytest.raises(SchemaError, match="apply it"):
        tensorwire.loads(made[2])


def test_the_reference_reader_agrees(made: tuple[STATE, STATE, bytes]) -> None:
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
    patch_slice(payload, extent, out)
    assert np.array_equal(out, new)
    out[-1] ^= 1
    with pytest.raises(SchemaError, match="against"):
        patch_slice(payload, extent, out)
    with pytest.raises(SchemaError, match="tensorwire.apply"):
        codec.decode(memoryview(payload), extent, old.copy())  # also where the base stands there by chance


def test_the_stored_patch_matches_the_documentation() -> None:
    """The library writes it byte for byte, and both readers make the stored version of the stored base."""
    old, new, patch = (stored_vector(f"patches/{name}") for name in ("old", "new", "to-new"))
    assert all(recipe() == stored_vector(f"patches/{name}") for name, recipe in make.PATCHES.items())
    reader = reference._Reader(new, zstd_decompress)
    reader.read()
    wanted = {name: data for name, (_, data) in reference.version(reader.items).items()}
    assert reference.apply(patch, old, zstd_decompress) == wanted
    state = tensorwire.torch.loads(old)
    tensorwire.apply(patch, state)
    assert tensorwire.digest(state) == tensorwire.digest(tensorwire.loads(new))
    assert {*tensorwire.inspect(patch).ways} == {"sparse", "difference", "replaced"}


def slice_of(mode: int, changed: int, made: bytes, old: bytes, coding: bytes) -> bytes:
    """A slice of less than a MiB that says whatever it is told."""
    return bytes([mode]) + np.array([changed, crc32c(made), crc32c(old)], "<u4").tobytes() + coding


@pytest.mark.parametrize(
    ("dtype", "payload", "says"),
    [
        (
            dtypes.FLOAT32,
            slice_of(3, 1, bytes(8), bytes(8), b"\x01"),
            "changes cannot be listed one by one for float32",
        ),
        (dtypes.FLOAT16, slice_of(3, 1, bytes(8), bytes(8), b"\x01"), "not valid changes to 8 bytes"),
        (dtypes.FLOAT16, slice_of(1, 2, bytes(8), bytes(8), b"\x02"), "changes 0 numbers, but states 2"),
        (dtypes.FLOAT16, slice_of(2, 2, b"\x02" + bytes(7), bytes(8), b"\x02"), "does not have the checksums"),
    ],
)
def test_inconsistent_slices_are_refused(dtype: dtypes.DType, payload: bytes, says: str) -> None:
    count = 8 // dtype.itemsize
    with pytest.raises(FormatError, match=says):
        patch_slice(payload, Extent(dtype, (count,), 0, count), np.zeros(8, np.uint8))


def as_patch(content: Any, **options: Any) -> bytes:
    """A stream of `content` that says it is a patch."""
    sender = Sender(StreamInfo(base=bytes(32), target=bytes(32)), 1 << 20, Limits())
    leaves = flatten(content, tensorwire.numpy.FRONT, rule(options.get("codec", "raw")), Limits())
    return b"".join(sender.container(leaves))


@pytest.mark.parametrize(
    ("content", "codec", "says"),
    [
        ({0: np.ones(3)}, "raw", "coded by patch"),
        ({"name": np.ones(3)}, "patch", "under its rank"),
        ({-1: 5}, "raw", "under its rank"),
        ([np.ones(3)], "patch", "under its rank"),
        ({0: np.ones(3)}, "patch", "bound to its base"),
    ],
)
def test_streams_that_only_claim_to_be_patches_are_refused(content: Any, codec: str, says: str) -> None:
    with pytest.raises(SchemaError, match=says):
        tensorwire.Patch.read(as_patch(content, codec=codec))


def test_values_can_only_be_set_in_dicts_and_lists() -> None:
    old = {"a": [1, np.ones(2)], "b": (1, np.ones(2))}
    patch = patch_of({"a": [2, np.ones(2)], "b": (1, np.ones(2))}, old)
    tensorwire.apply(patch, old)
    assert old["a"][0] == 2
    patch = patch_of({"a": [2, np.ones(2)], "b": (3, np.ones(2))}, old)
    with pytest.raises(EncodeError, match="dicts and lists"):
        tensorwire.apply(patch, old)
    with pytest.raises(SchemaError, match="a value where"):
        tensorwire.apply(as_patch({0: 5}), {"w": np.ones(2)})


def test_a_tied_tensor_cannot_become_two() -> None:
    old = {"a": np.zeros(9), "b": np.zeros(9)}
    patch = patch_of({"a": np.ones(9), "b": np.full(9, 2.0)}, old)
    shared = np.zeros(9)
    with pytest.raises(SchemaError, match="same tensor as 'a'"):
        tensorwire.apply(patch, {"a": shared, "b": shared})
    assert not shared.any()


def test_an_unchanged_version_is_an_empty_patch(made: tuple[STATE, STATE, bytes]) -> None:
    old = made[0]
    patch = patch_of(copy.deepcopy(old), old)
    assert len(patch) < 500
    assert tensorwire.apply(patch, copy.deepcopy(old)) == (0, 0, 0)


@pytest.mark.parametrize("change", ["more", "less", "shape", "kind"])
def test_versions_that_differ_in_more_than_values_are_refused(made: tuple[STATE, STATE, bytes], change: str) -> None:
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


def test_a_change_with_equal_checksums_is_refused() -> None:
    """A multiple of the polynomial of the CRC may be added to anything: its bits, from the highest power on."""
    polynomial = sum(1 << power for power in (0, 6, 8, 9, 10, 11, 13, 14, 18, 19, 20, 22, 23, 25, 26, 27, 28, 32))
    bits = np.array([polynomial >> 32 - place & 1 for place in range(33)], np.uint8)
    old = {"w": np.arange(100, dtype=np.uint8)}
    new = {"w": old["w"].copy()}
    new["w"][10:15] ^= np.packbits(bits, bitorder="little")
    assert crc32c(new["w"].tobytes()) == crc32c(old["w"].tobytes())
    with pytest.raises(EncodeError, match="no checksum tells") as caught:
        patch_of(new, old)
    assert caught.value.item == "w"


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


# --------------------------------------------------------------------------------------------------------- Files


@pytest.fixture(scope="module")
def flat() -> list[STATE]:
    """Three versions of tensors that a .safetensors file can hold."""
    first = {name: tensor for name, tensor in base().items() if isinstance(tensor, torch.Tensor)}
    second = copy.deepcopy(first)
    second["big"].view(torch.int16).view(-1)[5::333] += 1
    third = copy.deepcopy(second)
    third["big"].view(torch.int16).view(-1)[7::99] -= 1
    third["scale"] *= 2
    return [first, second, third]


def stored(state: STATE, path: Path) -> str:
    """A state in a file of the kind that its name says; in two shards for a folder."""
    if path.suffix == ".tw":
        tensorwire.save_file(state, path, metadata={"step": "7"})
    else:
        options = {"max_shard_size": 1 << 21} if path.suffix == "" else {}
        tensorwire.safetensors.decode(tensorwire.dumps(state, metadata={"step": "7"}), path, **options)
    return str(path)


@pytest.mark.parametrize("kinds", [(".safetensors", ".safetensors"), (".tw", ".tw"), ("", ".tw"), (".tw", "")])
def test_files_are_patched_one_after_the_other(flat: list[STATE], tmp_path: Path, kinds: tuple[str, str]) -> None:
    source, target = kinds
    files = [stored(state, tmp_path / f"{number}{source}") for number, state in enumerate(flat)]
    patches = []
    for old, new in pairwise(files):
        patches.append(str(tmp_path / f"to{len(patches)}.tw"))
        assert main(["diff", old, new, patches[-1]]) == 0
    out = tmp_path / f"out{target}"
    sharded = ["--max-shard-size", "2MB"] if target == "" else []
    assert main(["patch", files[0], *patches, str(out), *sharded]) == 0
    assert versions.digest(str(out)) == tensorwire.digest(flat[2]) == versions.digest(files[2])
    assert tensorwire.patch(files[0], patches[:1], tmp_path / "one.safetensors") == tensorwire.digest(flat[1])


def test_a_nested_file_with_values_is_patched(made: tuple[STATE, STATE, bytes], tmp_path: Path) -> None:
    old, new, patch = made
    tensorwire.save_file(old, tmp_path / "old.tw", codec={"big": "zstd"})
    tensorwire.patch(tmp_path / "old.tw", [patch], tmp_path / "new.tw")
    assert tensorwire.digest(tensorwire.load_file(tmp_path / "new.tw")) == tensorwire.digest(new)


def test_the_wrong_file_is_left_alone_and_nothing_appears(
    flat: list[STATE], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [stored(state, tmp_path / f"{number}.safetensors") for number, state in enumerate(flat)]
    assert main(["diff", files[1], files[2], str(tmp_path / "patch.tw")]) == 0
    assert main(["patch", files[0], str(tmp_path / "patch.tw"), str(tmp_path / "out.safetensors")]) == 1
    assert "neither" in capsys.readouterr().err
    assert main(["patch", files[1], str(tmp_path / "patch.tw"), files[1], "--force"]) == 2
    assert main(["patch", files[1], str(tmp_path / "patch.tw"), files[0]]) == 2
    assert not (tmp_path / "out.safetensors").exists()


class Changing(BytesIO):
    """A file one byte of which is another from its third reading on."""

    def __init__(self, data: bytes, place: int, reads: int) -> None:
        super().__init__(data)
        self.place, self.reads = place, reads

    def read(self, size: int | None = -1) -> bytes:
        begin, data = self.tell(), bytearray(super().read(size))
        if begin <= self.place < begin + len(data):
            self.reads -= 1
            data[self.place - begin] ^= self.reads < 0
        return bytes(data)


def test_a_file_that_changes_while_it_is_patched_is_refused(flat: list[STATE], tmp_path: Path) -> None:
    old, new = (stored(state, tmp_path / f"{number}.safetensors") for number, state in enumerate(flat[:2]))
    data = Path(old).read_bytes()
    place = data.index(flat[0]["scale"].numpy().tobytes())
    patch = b"".join(tensorwire.diff(old, new))
    refused: list[type[Exception]] = []
    for reads in range(10):
        try:
            tensorwire.patch(Changing(data, place, reads), [patch], tmp_path / "out.tw")
        except WireError as error:
            refused.append(type(error))
            assert not (tmp_path / "out.tw").exists()
        else:
            assert tensorwire.digest(tensorwire.load_file(tmp_path / "out.tw")) == tensorwire.digest(flat[1])
            break
    assert SchemaError in refused and CorruptError in refused


def test_patches_are_verified_and_explained(
    flat: list[STATE], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patch = patch_of(flat[2], flat[1])
    assert tensorwire.verify(patch).size == len(patch)
    report = tensorwire.inspect(patch)
    assert report.changed == 1_500_000 // 99 + 1 + 1 and report.ways == {"sparse": 1, "difference": 1}
    (tmp_path / "patch.tw").write_bytes(patch)
    assert main(["inspect", str(tmp_path / "patch.tw")]) == 0
    shown = capsys.readouterr().out
    assert tensorwire.digest(flat[2]) in shown and "15,153 of 1,500,001 numbers changed" in shown
    assert "/0 is the first item of its base in the order of names" in shown
    damaged = bytearray(patch)
    damaged[-200] ^= 1
    with pytest.raises(WireError):
        tensorwire.verify(bytes(damaged))


def test_content_digests_are_printed(flat: list[STATE], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [stored(flat[0], tmp_path / name) for name in ("a.tw", "a.safetensors")]
    assert main(["digest", "--content", *files]) == 0
    digest = tensorwire.digest(flat[0])
    assert capsys.readouterr().out == "".join(f"{digest}  {file}\n" for file in files)


# --------------------------------------------------------------------------------------------------------- Kills

_APPLYING = """
import sys
import numpy as np
import tensorwire
state = {"w": np.memmap(sys.argv[1], np.float16, "r+")}
patch = tensorwire.Patch.read(open(sys.argv[2], "rb").read())
print("ready", flush=True)
tensorwire.apply(patch, state)
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_mapped_state_is_at_its_target_or_refused_after_any_kill(tmp_path: Path) -> None:
    """Killed anywhere: each block is old or new, but for the one being copied, which is then refused by name."""
    drawn = np.random.default_rng(3)
    old = drawn.normal(0, 0.05, 12 << 20).astype(np.float16)
    new = old.copy()
    new.view(np.uint16)[::101] += 1
    (tmp_path / "patch.tw").write_bytes(patch_of({"w": new}, {"w": old}))
    outcomes = set()
    for wait in drawn.uniform(0, 0.3, 8):
        old.tofile(tmp_path / "state")
        command = [sys.executable, "-c", _APPLYING, str(tmp_path / "state"), str(tmp_path / "patch.tw")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
            time.sleep(wait)
            child.kill()
        state = np.fromfile(tmp_path / "state", np.float16)
        step = 4 << 19
        blocks = [slice(at, at + step) for at in range(0, state.size, step)]
        torn = [b for b in blocks if not any(np.array_equal(state[b], whole[b]) for whole in (old, new))]
        try:
            applied = tensorwire.apply((tmp_path / "patch.tw").read_bytes(), {"w": state})
            assert not torn and np.array_equal(state, new)
            outcomes.add("completed" if applied.skipped else "applied")
        except SchemaError as error:
            assert len(torn) == 1 and error.item == "w"
    assert outcomes
