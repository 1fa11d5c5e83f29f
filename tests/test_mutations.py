"""Every changed, lost, added or moved byte is refused: with a TensorwireError, the same however the bytes arrive, and
by the reference reader as well.

CI tries all single-bit flips and a seeded spread of other values at every position; TENSORWIRE_EXHAUSTIVE=1 tries all
255 values. The last tests mend every checksum after a change: then a stream may be valid, and both readers must agree
on whether it is and on what it holds.
"""

import os
import random
from collections.abc import Iterator

import pytest
import reference
from frames import assemble, cut, take_apart
from fuzz.mutants import mended_mutant
from vectors import GOOD, content, library, plain, read_reference, same, single_bytes, stored

import tensorwire.numpy as tw
from tensorwire import TensorwireError

EXHAUSTIVE = os.environ.get("TENSORWIRE_EXHAUSTIVE") == "1"
# Small, and between them: every kind of frame and item, padding, links within and between items, each codec family.
SMALL = [
    "at-rest",
    "casts",
    "file-zstd",
    "iterated",
    "metadata-id",
    "nf4",
    "skippable",
    "tied",
    "value-root",
    "zstd",
]


def substitutions(data: bytes, others: int) -> Iterator[tuple[int, bytes]]:
    """(position, mutant) for single-bit flips at every position and `others` seeded values, or all 255."""
    spread = random.Random(len(data))
    for at, byte in enumerate(data):
        if EXHAUSTIVE:
            values = set(range(256)) - {byte}
        else:
            values = {byte ^ 1 << bit for bit in range(8)}
            values |= set(spread.sample([v for v in range(256) if v != byte], others))
        for value in sorted(values):
            yield at, data[:at] + bytes([value]) + data[at + 1 :]


def is_file(name: str) -> bool:
    return name.startswith("file")


def assert_both_refuse(data: bytes, *, file: bool = False, error: str | None = None) -> None:
    verdict = library(data, file=file)
    assert verdict.error is not None
    assert error is None or verdict.error == error, verdict
    with pytest.raises(reference.Refused):
        read_reference(data)


@pytest.mark.parametrize("name", SMALL)
def test_every_substituted_byte_is_refused(name):
    data = stored(name)
    for at, mutant in substitutions(data, others=1):
        verdict = library(mutant, file=is_file(name))
        assert verdict.error is not None, f"byte {at} may be {mutant[at]:#x}"
        # Every byte is under a checksum, but for the magic, which comes before one, and padding, which is zero.
        expected = "FormatError" if at < 8 or "padding" in verdict.message else "CorruptError"
        assert verdict.error == expected, (at, verdict)


@pytest.mark.parametrize("name", SMALL)
def test_a_mutant_gets_the_same_verdict_byte_by_byte_and_from_the_reference(name):
    data = stored(name)
    spread = random.Random(name)
    for at in range(0, len(data), 1 if EXHAUSTIVE else 2):
        mutant = bytearray(data)
        mutant[at] ^= spread.randrange(1, 256)
        whole = library(bytes(mutant), file=is_file(name))
        assert library(single_bytes(bytes(mutant)), file=is_file(name)).place == whole.place
        with pytest.raises(reference.Refused):
            read_reference(bytes(mutant))


@pytest.mark.parametrize("name", GOOD)
def test_every_truncation_is_truncated(name):
    data = stored(name)
    lengths = set(range(len(data)))
    if len(data) > 1600 and not EXHAUSTIVE:  # around every frame boundary, and a spread
        boundary = 0
        near = set()
        for piece in cut(data):
            near |= {boundary + delta for delta in (-2, -1, 0, 1, 2, 24, 47, 48, 49)}
            boundary += len(piece)
        lengths &= near | set(random.Random(name).sample(range(len(data)), 100))
    for length in lengths:
        verdict = library(data[:length], file=is_file(name))
        assert (verdict.error, verdict.offset) == ("TruncatedError", length), verdict
        with pytest.raises(reference.Truncated):
            read_reference(data[:length])


@pytest.mark.parametrize("name", SMALL)
def test_every_swap_of_adjacent_bytes_is_refused(name):
    data = stored(name)
    for at in range(len(data) - 1):
        if data[at] != data[at + 1]:
            mutant = data[:at] + data[at + 1 : at + 2] + data[at : at + 1] + data[at + 2 :]
            assert library(mutant, file=is_file(name)).error is not None, at


@pytest.mark.parametrize("name", ["slices", "double-quant", "at-rest"])
def test_bursts_and_lost_sectors_are_refused(name):
    data = stored(name)
    spread = random.Random(name)
    for _ in range(100):
        at = spread.randrange(len(data) - 4)
        burst = spread.randbytes(spread.choice((2, 4)))
        mutant = data[:at] + burst + data[at + len(burst) :]
        if mutant != data:
            assert_both_refuse(mutant)
    for at in range(0, len(data), 512):
        mutant = data[:at] + bytes(len(data[at : at + 512])) + data[at + 512 :]
        if mutant != data:
            assert_both_refuse(mutant)


@pytest.mark.parametrize("name", GOOD)
def test_frames_lost_repeated_or_swapped_are_out_of_sequence(name):
    first, *pieces = cut(stored(name))
    for at in range(len(pieces) - 1):
        without = pieces[:at] + pieces[at + 1 :]
        repeated = pieces[: at + 1] + pieces[at:]
        swapped = [*pieces[:at], pieces[at + 1], pieces[at], *pieces[at + 2 :]]
        for mutant in (without, repeated, swapped):
            assert_both_refuse(first + b"".join(mutant), file=is_file(name), error="SequenceError")
    assert_both_refuse(first + b"".join([*pieces, pieces[-1]]), file=is_file(name), error="FormatError")
    assert_both_refuse(b"".join(pieces), file=is_file(name), error="FormatError")


def two_streams(same_id: bool) -> list[list[bytes]]:
    """Two rounds of one schema as pieces: other values, and with one id or two."""
    import numpy as np

    rounds = []
    for number in (1, 2):
        tensors = {"a": np.full(5, number, np.int32), "b": np.full(4100, number, np.uint8), "c": number}
        stream_id = b"round" if same_id else b"round %d" % number
        rounds.append([*cut(b"".join(bytes(b) for b in tw.encode(tensors, frame_size=4096, stream_id=stream_id)))])
    return rounds


@pytest.mark.parametrize("same_id", [True, False])
def test_frames_of_another_stream_with_the_same_schema_are_refused(same_id):
    ours, theirs = two_streams(same_id)
    assert len(ours) == len(theirs)
    good = (b"".join(ours), b"".join(theirs))
    for at in range(1, len(ours)):
        for mutant in ([*ours[:at], theirs[at], *ours[at + 1 :]], ours[:at] + theirs[at:]):
            stream = b"".join(mutant)
            if stream not in good:  # what stands before the first difference is common to both
                assert_both_refuse(stream)
    assert not same_id or ours[2] == theirs[2]
    assert same_id or all(ours[at] != theirs[at] for at in range(1, len(ours)))


# ------------------------------------------------------------------------------------------------- Files at rest


def read_all(path) -> dict:
    """Every tensor and value of a `.tw` file by name, read and, where it is raw, mapped."""
    values = {}
    with tw.open_file(path) as file:
        for name in file:
            if getattr(file.item(name), "codec", None) == ((1,),):
                values[name] = plain(file.map(name))
                assert same(values[name], plain(file[name]))
            values[name] = plain(file[name])
    return values


def test_random_access_to_a_changed_file_gives_what_was_saved_or_refuses(tmp_path):
    data = stored("at-rest")
    path = tmp_path / "x.tw"
    path.write_bytes(data)
    wanted = read_all(path)
    spread = random.Random(0)
    mutants = [data[:length] for length in range(0, len(data), 7)]
    mutants += [
        data[:at] + bytes([data[at] ^ spread.randrange(1, 256)]) + data[at + 1 :]
        for at in range(0, len(data), 1 if EXHAUSTIVE else 2)
    ]
    refused = 0
    for mutant in mutants:
        path.write_bytes(mutant)
        try:
            assert same(read_all(path), wanted)
        except TensorwireError:
            refused += 1
    assert refused > 0.8 * len(mutants)  # the rest is what random access need not look at


def test_random_access_survives_changes_whose_checksums_hold(tmp_path):
    path = tmp_path / "x.tw"
    frames = take_apart(stored("at-rest"))
    spread = random.Random(1)
    for _ in range(20_000 if EXHAUSTIVE else 300):
        mutant = mended_mutant(frames, 64, spread)
        path.write_bytes(mutant)
        verdict = library(mutant)
        error, values = None, {}
        try:
            values = read_all(path)
        except TensorwireError as caught:
            error = caught
        if error is not None:
            # Or it is for the index, which nobody needs who reads from front to back; or for the second of two
            # faults, before the data with the first was asked for.
            second = verdict.offset is not None and error.offset is not None and verdict.offset < error.offset
            assert verdict.error in (None, type(error).__name__) or "digest" in verdict.message or second, error
        elif verdict.error is None:
            wanted = {name: plain(value) for name, value in tw.decode(mutant)}
            assert same(values, {name: wanted[name] for name in values})
            assert len(values) == len(wanted)
        else:  # what cannot be known without reading all
            assert (verdict.error, "digest" in verdict.message) == ("CorruptError", True), verdict


# ------------------------------------------------------------------------- Changes with every checksum mended


@pytest.mark.parametrize("name", [name for name in GOOD if name not in ("slices", "double-quant")])
def test_both_readers_agree_on_mutants_whose_checksums_hold(name):
    data = stored(name)
    align = read_reference(data).align
    frames = take_apart(data)
    spread = random.Random(name)
    assert name == "future-minor" or assemble(frames, align=align) == data
    accepted = 0
    for _ in range(2000 if EXHAUSTIVE else 100):
        mutant = mended_mutant(frames, align, spread)
        verdict = library(mutant, file=is_file(name))
        if verdict.error == "SchemaError":  # a file where a container is wanted, or the other way round
            continue
        assert library(single_bytes(mutant), file=is_file(name)).place == verdict.place
        if verdict.error is not None:
            truncated = verdict.error == "TruncatedError"
            with pytest.raises(reference.Truncated if truncated else reference.Refused) as caught:
                read_reference(mutant)
            assert isinstance(caught.value, reference.Truncated) == truncated
        else:
            assert same(verdict.value, content(read_reference(mutant).root))
            accepted += 1
    assert accepted, "changes that leave a valid stream are part of the test"
