"""The format is what docs/format.md and the stored vectors say: the library writes and reads the vectors byte for byte,
a reader written from the page alone agrees on every one, and each bad stream gets the error it must get.
"""

import json
import re
from pathlib import Path

import bad
import make
import pytest
import reference
import zstandard
from frames import ITEM, take_apart
from msgpack import unpackb
from vectors import FOLDER, GOOD, content, library, plain, read_reference, same, single_bytes, stored

from tensorwire import codecs, dtypes
from tensorwire.limits import Limits
from tensorwire.wire import Kind
from tensorwire.wire.ledger import TRANSITIONS, State, Step

PAGE = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
BAD = sorted(bad.BAD)


def test_every_stored_vector_has_a_recipe_and_every_recipe_is_stored():
    assert sorted(make.GOLDEN) == GOOD
    assert sorted(path.stem for path in (FOLDER / "bad").glob("*.tw")) == BAD
    errors = json.loads((FOLDER / "bad" / "errors.json").read_text())
    assert errors == {name: {"error": error, "says": says} for name, (error, says, _) in bad.BAD.items()}


@pytest.mark.parametrize("name", GOOD)
def test_the_library_still_writes_every_vector(name):
    if "zstd" in name and zstandard.ZSTD_VERSION != make.LIBZSTD:
        pytest.skip(f"libzstd {zstandard.ZSTD_VERSION}; the vectors were made with {make.LIBZSTD}")
    assert make.GOLDEN[name]() == stored(name)


@pytest.mark.parametrize("name", GOOD)
def test_the_library_and_the_reference_reader_read_the_same(name):
    data = stored(name)
    verdict = library(data, file=name.startswith("file"))
    assert verdict.error is None, verdict.message
    assert same(verdict.value, content(read_reference(data).root))


def test_vectors_hold_what_went_in():
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
    items = [unpackb(f.payload) for name in GOOD for f in take_apart(stored(name)) if f.type == ITEM]
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
    assert library(single_bytes(data), file="file" in name).place == verdict.place
    with pytest.raises(reference.Truncated if error == "TruncatedError" else reference.Refused):
        read_reference(data)


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


def test_the_page_shows_the_table_of_transitions():
    heads, _, *body = rows("## 7.")
    steps = [Step.STREAM, Step.ITEM, Step.SLICE, Step.LAST, Step.SKIP, Step.END]
    assert len(heads) == 1 + len(steps)
    found = {
        State[row[0].split()[0].upper()]: {
            step: State[cell.upper()] for step, cell in zip(steps, row[1:], strict=True) if cell
        }
        for row in body
    }
    assert found | {State.ENDED: {}} == TRANSITIONS


def test_the_page_gives_the_default_limits():
    units = {"MiB": 1 << 20, "KiB": 1 << 10, "GiB": 1 << 30}
    fields = {
        "stream metadata": "metadata", "item descriptor": "descriptor", "one key of a path": "name",
        "dimensions": "ndim", "items": "items", "nesting": "nesting", "bytes of a tensor, decoded": "item",
        "text or binary value": "value", "composite value": "composite",
        "data frame that is not raw, also before zstd": "frame", "skippable frame": "skippable",
        "stream, file": "stream", "pairs of stream metadata": "pairs",
    }  # fmt: skip
    found = {}
    for row in rows("## 9.")[2:]:
        for name, default in (row[:2], row[2:]):
            if not name:
                continue
            number, _, unit = default.replace(",", "").partition(" ")
            found[fields[name]] = int(number) * units.get(unit, 1)
    assert found == {field: getattr(Limits(), field) for field in Limits.__slots__}
