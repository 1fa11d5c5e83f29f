"""The format is what docs/format.md and the stored vectors say: the library writes and reads the vectors byte for byte,
a reader written from the page alone agrees on every one, and each bad stream gets the error it must get.
"""

import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import bad
import make
import pytest
import reference
import zstandard
from frames import ITEM, at_rest, take_apart
from msgpack import unpackb
from vectors import FOLDER, GOOD, WAYS, by_index, content, library, plain, read_reference, same, stored

import tensorwire.numpy as tw
from tensorwire import SchemaError, codecs, dtypes
from tensorwire.checksum import crc32c
from tensorwire.limits import Limits
from tensorwire.wire import FrameType, Kind, Reader, Skipped, StreamInfo, StreamStart, Writer
from tensorwire.wire.ledger import TRANSITIONS, State, Step

PAGE = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
BAD = sorted(bad.BAD)


def test_every_stored_vector_has_a_recipe_and_every_recipe_is_stored():
    assert sorted(make.GOLDEN) == GOOD
    assert sorted(path.stem for path in (FOLDER / "bad").glob("*.tw")) == BAD


def test_expected_values_are_listed_for_readers_in_any_language():
    assert (FOLDER / "vectors.json").read_text() == make.listed(), "run tests/golden/make.py"
    check = [sys.executable, FOLDER / "check.py"]
    run = subprocess.run(check, capture_output=True, text=True, check=False, cwd=FOLDER)
    assert (run.returncode, run.stderr) == (0, "")
    assert f"{len(GOOD)} good and {len(BAD)} bad vectors" in run.stdout


@pytest.mark.parametrize("name", GOOD)
def test_the_library_still_writes_every_vector(name):
    if ("zstd" in name or name in ("planes", "sparse", "entropy")) and zstandard.ZSTD_VERSION != make.LIBZSTD:
        pytest.skip(f"libzstd {zstandard.ZSTD_VERSION}; the vectors were made with {make.LIBZSTD}")
    assert make.GOLDEN[name]() == stored(name)


@pytest.mark.parametrize("name", GOOD)
def test_the_library_and_the_reference_reader_read_the_same(name):
    data = stored(name)
    verdict = library(data, file=name.startswith("file"))
    assert verdict.error is None, verdict.message
    assert same(verdict.value, content(read_reference(data).root))


def test_vectors_hold_their_input():
    assert same(read_reference(stored("values")).root, make.VALUES)
    assert same(read_reference(stored("nested")).root, plain(make.NESTED))
    assert same(read_reference(stored("dtypes-raw")).root, plain(make.every_dtype()))


def test_metadata_and_id_are_read():
    stream = read_reference(stored("metadata-id"))
    assert (stream.id, stream.metadata) == (bytes(range(64)), {"a": "", "b": "2", "ä": "\n"})
    stream = read_reference(stored("at-rest"))
    assert (stream.align, stream.metadata, stream.index_frames) == (64, {"k": "v"}, 1)


def test_tied_tensors_are_one_object_in_both_readers():
    ours = make.tw.loads(stored("tied"))
    theirs = read_reference(stored("tied")).root
    for root in (ours, theirs):
        assert root["layers"][0]["head"] is root["embed"] is root["layers"][1]


def test_vectors_cover_every_dtype_kind_and_codec():
    frames = [frame for name in GOOD for frame in take_apart(stored(name)) if frame.type == ITEM]
    items = [form for frame in frames for form in unpackb(frame.payload)["forms"]]
    assert {item["kind"] for item in items} == {*Kind}
    assert {item["dtype"] for item in items if "dtype" in item} == {*dtypes.BY_NUMBER}
    stages = {stage[0] for item in items for stage in item.get("codec", ())}
    assert stages == {stage.id for stage in codecs.BUILT_IN}


@pytest.mark.parametrize("name", BAD)
def test_bad_streams_are_refused_with_the_error_they_must_get(name):
    error, says, recipe = bad.BAD[name]
    data = stored(f"bad/{name}")
    assert recipe() == data
    verdict = library(data, file="file" in name)
    assert verdict.error == error, verdict
    assert says in verdict.message
    assert all(read(data, file="file" in name).place == verdict.place for read in WAYS)
    with pytest.raises(reference.Truncated if error == "TruncatedError" else reference.Refused):
        read_reference(data)


# ------------------------------------------------------------------------------- The same verdict by every way in

# What cannot be known without reading every frame, and nothing else. `verify` knows it.
UNKNOWN_BY_INDEX = {"end-digest"}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gets_its_error_from_every_reader(name):
    error, _, recipe = bad.BAD[name]
    data, file = recipe(at_rest), "file" in name
    whole = library(data, file=file)
    assert whole.error == error, whole
    assert all(read(data, file=file).place == whole.place for read in WAYS)
    indexed = by_index(data, file=file)
    assert indexed.error == (None if name in UNKNOWN_BY_INDEX else error), indexed
    if "value" not in name and name not in UNKNOWN_BY_INDEX:  # a value is judged when all its frames are there
        assert indexed.place == whole.place


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_has_the_same_content_for_every_reader(name):
    original, file = stored(name), name.startswith("file")
    data = at_rest(take_apart(original), head=original[:16])
    wanted = library(original, file=file)
    assert all(same(read(data, file=file).value, wanted.value) for read in WAYS)
    by_name = wanted.value if file else {path: plain(value) for path, value in tw.decode(data)}
    got = by_index(data, file=file).value
    assert same(got, by_name if file else {path: by_name[path] for path in got})
    assert file or len(got) == len(by_name)


def test_a_stream_with_a_base_applies_only_to_that_version():
    data, base = stored("bad/stream-base"), bytes(range(32))
    first = next(event for event in Reader(crc32c).feed(data))
    assert isinstance(first, StreamStart)
    assert first.info.base == base
    assert Writer(crc32c).start(first.info) == data[: 16 + 48 + len(take_apart(data)[0].payload)]
    first.info.check_base(base)
    for other in (None, bytes(32)):
        with pytest.raises(SchemaError, match="against version 0001"):
            first.info.check_base(other)
    StreamInfo().check_base()
    StreamInfo().check_base(base)  # a whole version stands on its own
    assert reference.read(data, base=base).base == base


def test_the_target_digest_is_the_same_at_both_ends():
    data = stored("target")
    events = [*Reader(crc32c).feed(data)]
    assert events[0].info.target == read_reference(data).target == take_apart(data)[-2].payload
    assert [event for event in events if isinstance(event, Skipped)] == [Skipped(FrameType.TARGET, 32)]


# ------------------------------------------------------------------------------ The page's tables are the code's


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table after a heading."""
    table = re.search(r"\n\|.*?\n\n", PAGE[PAGE.index(heading) :], re.DOTALL).group()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()]


def test_the_page_lists_every_dtype():
    found = {}
    for row in rows("### 5.1")[2:]:
        for numbers, names, sizes in (row[:3], row[3:]):
            names = re.sub(r"\(.*?\)", "", names)
            pairs = list(zip(numbers.split("/"), names.split("/"), strict=True))
            widths = sizes.split("/") * (len(pairs) if "/" not in sizes else 1)
            found |= {int(n): (name.strip(), int(w)) for (n, name), w in zip(pairs, widths, strict=True)}
    assert found == {dtype.number: (dtype.name, dtype.itemsize) for dtype in dtypes.ALL}


def test_the_page_lists_every_codec():
    found = {int(row[0]): row[1] for row in rows("## 6.")[2:]}
    assert found == {stage.id: stage.name for stage in codecs.BUILT_IN}


STEPS = {
    "STREAM": Step.STREAM, "ITEM": Step.ITEM, "DATA, item goes on": Step.SLICE, "DATA, item complete": Step.LAST,
    "BUNDLE": Step.BUNDLE,
    "skippable": Step.SKIP, "END": Step.END,
}  # fmt: skip


def test_the_page_draws_the_figure_of_transitions():
    found: dict[State, dict[Step, State]] = {state: {} for state in State}
    for before, after, label in re.findall(r"^    (\w+) --> (\w+): (.*)$", PAGE, re.MULTILINE):
        step = STEPS[label]
        assert step not in found[State[before.upper()]]
        found[State[before.upper()]][step] = State[after.upper()]
    assert found == TRANSITIONS


def test_the_page_shows_the_table_of_transitions():
    heads, _, *body = rows("## 7.")
    assert heads[1:] == [*STEPS]
    steps = STEPS.values()
    found = {
        State[row[0].split()[0].upper()]: {
            step: State[cell.upper()] for step, cell in zip(steps, row[1:], strict=True) if cell
        }
        for row in body
    }
    assert found | {State.ENDED: {}} == TRANSITIONS


# Stages that are known, in an order that is not: section 6 says what they are.
ORDERS = {"item-codec-zstd-first", "item-codec-zstd-twice", "item-codec-zstd-inside", "item-codec-quantized-twice"}


def test_the_page_gives_the_kind_of_every_error():
    *kinds, (last, _, others) = rows("## 10.")[2:]
    assert (last, others) == ("FormatError", "all others")
    assert {kind for kind, _, _ in kinds} | {last} == {error for error, _, _ in bad.BAD.values()}
    patterns = [(kind, pattern) for kind, _, cell in kinds for pattern in re.findall("`(.*?)`", cell)]
    assert all(fnmatch.filter(BAD, pattern) for _, pattern in patterns)
    for name in {*BAD} - ORDERS:
        matching = {kind for kind, pattern in patterns if fnmatch.fnmatch(name, pattern)} or {last}
        assert matching == {bad.BAD[name][0]}, name


def test_the_page_gives_the_default_limits():
    units = {"MiB": 1 << 20, "KiB": 1 << 10, "GiB": 1 << 30, "TiB": 1 << 40}
    fields = {
        "stream metadata": "metadata", "item descriptor": "descriptor", "one key of a path": "name",
        "dimensions": "ndim", "items": "items", "nesting": "nesting", "bytes of a tensor, decoded": "item",
        "text or binary value": "value", "composite value": "composite", "containers in a value": "containers",
        "data frame that is not raw, also before zstd": "frame", "skippable frame": "skippable",
        "stream, file": "stream", "pairs of stream metadata": "pairs",
        "sparse and low-rank tensors without `expect=` or `into=`, decoded": "expanded",
    }  # fmt: skip
    found = {}
    for row in rows("## 9.")[2:]:
        for name, default in (row[:2], row[2:]):
            if not name:
                continue
            number, _, unit = default.replace(",", "").partition(" ")
            found[fields[name]] = int(number) * units.get(unit, 1)
    assert found == {field: getattr(Limits(), field) for field in Limits.__slots__}
