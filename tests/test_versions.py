"""A store of versions: what a publisher writes, whoever follows gets whole, or not at all."""

import errno
import json
import threading
import tracemalloc
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import storage_faults

import tensorwire
from tensorwire import (
    ArgumentError,
    CorruptError,
    EncodeError,
    FormatError,
    LimitError,
    MissingFileError,
    SchemaError,
    SequenceError,
    StorageError,
    TransportError,
    TruncatedError,
    UnsupportedError,
    WireError,
)
from tensorwire.versions import (
    FolderStore,
    FsspecStore,
    Manifest,
    Publisher,
    Stored,
    Subscriber,
    Version,
    follow,
    open_store,
    version_in,
)

torch = pytest.importorskip("torch")

STATE = dict[str, Any]
MANIFEST = "manifest.json"


def model(step: int = 0) -> STATE:
    """A small model, the same for every step but for a few values."""
    seeded = torch.Generator().manual_seed(7)
    weight = torch.randn(120, 64, generator=seeded).bfloat16()
    state = {"weight": weight, "tied": weight, "layers": [{"bias": torch.zeros(64)}], "step": 0}
    for number in range(1, step + 1):
        train(state, number)
    return state


def train(state: STATE, number: int) -> None:
    state["weight"].view(torch.int16).view(-1)[number::500] += 1
    state["layers"][0]["bias"][number % 64] += 0.25
    state["step"] = number


def published(store: Any, count: int, **options: Any) -> list[str]:
    """Publish `count` versions; returns their digests."""
    with Publisher(store, **options) as publisher:
        return [publisher.publish(model(step)).digest for step in range(count)]


def digest(state: Any) -> str:
    return tensorwire.digest(state)


def files(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"*.{kind}.tw"))


class Quiet(SimpleHTTPRequestHandler):
    """A web server that breaks off after `most` bytes of each file, and answers `code` where that is set."""

    most: int | None = None
    code = 0

    def copyfile(self, source: Any, outputfile: Any) -> None:
        outputfile.write(source.read(self.most))

    def do_GET(self) -> None:
        if self.code:
            self.send_error(self.code)
        else:
            super().do_GET()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the URL that a web server shows it at."""
    folder = tmp_path / "served"
    folder.mkdir()

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_follower_becomes_every_version_in_place(tmp_path: Path) -> None:
    state, worker = model(), model()
    weight = worker["weight"]
    subscriber = Subscriber(tmp_path, have=digest(worker))
    with Publisher(tmp_path) as publisher:
        assert publisher.head is None
        seen: list[tuple[int, int]] = []
        first = publisher.publish(state, metadata={"lr": "1e-6"}, progress=lambda *at: seen.append(at))
        assert seen[-1][0] == first.anchor <= seen[-1][1]
        assert (first.number, first.is_new, first.patch) == (1, True, None) and first.anchor
        assert not subscriber.fetch().is_new
        for number in range(1, 4):
            train(state, number)
            done = publisher.publish(state)
            assert (done.number, done.digest, done.anchor) == (number + 1, digest(state), None)
            staged = subscriber.fetch()
            assert staged.size == done.patch and staged.target.number == done.number
            staged.apply(worker)
            assert digest(worker) == digest(state) == subscriber.have and worker["weight"] is weight is worker["tied"]
            assert worker["step"] == number
    assert subscriber.manifest().versions[0].metadata == {"lr": "1e-6"}
    assert {*staged.seconds} == {"fetch", "stage", "verify", "apply"} and staged.seconds["apply"] > 0


def test_the_same_version_again_is_neither_published_nor_fetched(tmp_path: Path) -> None:
    with Publisher(tmp_path) as publisher:
        done = publisher.publish(model())
        before = sorted(tmp_path.iterdir())
        again = publisher.publish(model())
        assert not again.is_new and (again.number, again.digest) == (done.number, done.digest)
    with Publisher(tmp_path) as publisher:
        assert not publisher.publish(model()).is_new
    assert sorted(tmp_path.iterdir()) == before
    staged = Subscriber(tmp_path, have=done.digest).fetch()
    assert not staged.is_new and staged.size == 0
    other = {"nothing": 1}
    staged.apply(other)  # which is looked at as little
    assert other == {"nothing": 1}


def test_a_version_that_comes_back_is_a_new_number_of_the_same_digest(tmp_path: Path) -> None:
    with Publisher(tmp_path) as publisher:
        digests = [publisher.publish(model(step)).digest for step in (0, 1, 0)]
        assert digests[0] == digests[2] and publisher.head is not None and publisher.head.number == 3
    assert not Subscriber(tmp_path, have=digests[0]).fetch().is_new
    assert Subscriber(tmp_path, have=digests[1]).fetch().target.number == 3


def test_a_newcomer_gets_an_anchor_and_later_patches(tmp_path: Path) -> None:
    digests = published(tmp_path, 4)
    staged = Subscriber(tmp_path).fetch()
    assert digest(staged.state) == digests[-1]
    worker = {"weight": torch.zeros(120, 64).bfloat16(), "tied": None, "layers": [{"bias": torch.ones(64)}], "step": 9}
    worker["tied"] = worker["weight"]
    staged.apply(worker)
    assert digest(worker) == digests[-1] and worker["step"] == 3 and worker["tied"] is worker["weight"]
    staged.apply(worker)
    assert digest(worker) == digests[-1]
    assert torch.equal(tensorwire.torch.loads(tensorwire.encode(staged.state))["weight"], model(3)["weight"])


@pytest.mark.parametrize("behind", [0, 1, 3])
def test_staging_in_a_folder_equals_staging_in_memory(tmp_path: Path, behind: int) -> None:
    store, staging = tmp_path / "store", tmp_path / "staging"
    staging.mkdir()
    digests = published(store, 1 + behind)
    worker = model(9)
    subscriber = Subscriber(store, staging=staging)
    staged = subscriber.fetch()
    assert staged.is_whole and digest(staged.state) == digests[-1] != digest(worker)
    assert digest(tensorwire.torch.loads(staged.encode())) == digests[-1]
    staged.apply(worker)
    assert digest(worker) == digests[-1] == subscriber.have and worker["weight"] is worker["tied"]
    with Publisher(store) as publisher:
        train(worker, 7)
        publisher.publish(worker)
    follower = model(behind)
    assert subscriber.fetch().patches
    subscriber.fetch().apply(follower)
    assert digest(follower) == digest(worker)
    with pytest.raises(SchemaError, match="patches or nothing"):
        next(subscriber.fetch().encode())
    assert not list(staging.iterdir())


def test_a_full_or_damaged_staging_folder_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (target,) = published(tmp_path, 1)
    with pytest.raises(StorageError, match="stage in"):
        Subscriber(tmp_path, staging=tmp_path / "nowhere").fetch()
    worker = model(3)
    subscriber = Subscriber(tmp_path, have=digest(worker), staging=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(tensorwire.OnDisk, "put", full)
        with pytest.raises(StorageError, match="no space") as caught:
            subscriber.fetch()
    assert caught.value.errno == errno.ENOSPC and digest(worker) == digest(model(3)) == subscriber.have
    staged = subscriber.fetch()
    staged._disk._file.seek(0)  # type: ignore[union-attr]
    staged._disk._file.write(b"what was never written here")  # type: ignore[union-attr]
    with pytest.raises(CorruptError, match="kept on disk"):
        staged.apply(worker)
    assert subscriber.have in (None, digest(worker))
    subscriber.fetch().apply(worker)
    assert digest(worker) == target


def full(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "no space left")


def test_following_takes_no_memory_of_the_size_of_the_model(tmp_path: Path) -> None:
    state = {name: np.random.default_rng(1).normal(size=4 << 20).astype(np.float32) for name in "abcd"}
    with Publisher(tmp_path / "store") as publisher:
        for _ in range(3):
            publisher.publish(state)
            state["a"][:4000] *= 1.01
    size = sum(array.nbytes for array in state.values())
    worker = {name: np.zeros_like(array) for name, array in state.items()}
    tracemalloc.start()
    try:
        (followed,) = follow(tmp_path / "store", tmp_path / "model.safetensors", timeout=0)
        Subscriber(tmp_path / "store", staging=tmp_path).fetch().apply(worker)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert followed.version.number == 3 and digest(worker) == followed.version.digest
    assert peak < size / 2


def test_the_route_with_the_fewest_bytes_is_fetched() -> None:
    def version(number: int, patch: int, anchor: int | None) -> Version:
        digests = f"{number:064x}", f"{number - 1:064x}"
        name = f"{number:012}-{number:016x}"
        whole = None if anchor is None else Stored(f"{name}.anchor.tw", anchor)
        return Version(number, digests[0], Stored(f"{name}.patch.tw", patch, digests[1]), whole)

    versions = tuple(version(number, 10, 45 if number in (3, 8) else None) for number in range(3, 11))
    manifest = Manifest("0" * 16, "1" * 16, versions)
    assert Manifest.parse(manifest.dump()) == manifest

    def way(have: int, number: int | None = None) -> tuple[int, int | None, list[int]]:
        route = manifest.route(f"{have:064x}", number)
        anchor = None if route.anchor is None else route.anchor.number
        return route.size, anchor, [each.number for each in route.patches]

    assert way(10) == (0, None, [])
    assert way(9) == (10, None, [10])
    assert way(4) == (60, None, [5, 6, 7, 8, 9, 10])
    assert way(2) == (65, 8, [9, 10])
    assert way(2, 5) == (30, None, [3, 4, 5])  # the base of the first one that is kept
    assert way(1, 5) == (65, 3, [4, 5])
    assert way(10, 4) == (55, 3, [4])
    assert manifest.route(None, 10, {versions[5].files[0]}).size == 45 + 70
    with pytest.raises(SequenceError, match="breaks at version 10"):
        manifest.route(None, 10, {versions[7].files[0]})
    with pytest.raises(SequenceError, match="dropped"):
        manifest.route(None, 2)
    with pytest.raises(SequenceError, match="never published"):
        manifest.route(None, 11)


def test_anchors_are_written_regularly_and_old_versions_removed(tmp_path: Path) -> None:
    digests = published(tmp_path, 12, anchor_every=3, keep=2)
    manifest = Subscriber(tmp_path).manifest()
    anchored = [version.number for version in manifest.versions if version.anchor is not None]
    assert anchored == [7, 10] and [version.number for version in manifest.versions] == [*range(7, 13)]
    assert {path.name for path in tmp_path.iterdir() if path.name.endswith(".tw")} == manifest.files
    for place, version in enumerate(manifest.versions):
        staged = Subscriber(tmp_path).fetch(number=version.number)
        assert digest(staged.state) == digests[6 + place]
    with pytest.raises(SequenceError, match="no version 6"):
        Subscriber(tmp_path).fetch(number=6)


def test_an_anchor_is_written_when_patches_exceed_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    with Publisher(tmp_path, anchor_every=100) as publisher:
        anchors = [
            publisher.publish({"a": rng.normal(size=5000), "b": np.zeros(20_000)}).anchor is not None for _ in range(8)
        ]
    assert anchors[0] and 2 <= sum(anchors) < 8


def test_dropped_files_stay_for_one_more_publish(tmp_path: Path) -> None:
    """One publish longer; after that, whoever comes too late takes another way."""
    with Publisher(tmp_path, anchor_every=2, keep=1) as publisher:
        for step in range(2):
            publisher.publish(model(step))
        begun = Subscriber(tmp_path, have=digest(model(0)))
        old = begun.manifest().route(begun.have)
        publisher.publish(model(2))  # has an anchor, and the two before are dropped
        assert [version.number for version in Subscriber(tmp_path).manifest().versions] == [3]
        assert all((tmp_path / stored.file).exists() for stored, _ in old.files)
        publisher.publish(model(3))
        assert not any((tmp_path / stored.file).exists() for stored, _ in old.files)
    staged = begun.fetch()
    worker = model(0)
    staged.apply(worker)
    assert digest(worker) == digest(model(3))


def test_a_file_removed_during_a_fetch_is_retried(tmp_path: Path) -> None:
    published(tmp_path, 3)

    class Slow(FolderStore):
        def open(self, name: str) -> Any:
            if name.endswith("patch.tw") and "000000000002-" in name:
                for path in files(tmp_path, "patch"):
                    path.unlink(missing_ok=True)
                published(tmp_path, 6, anchor_every=1)
            return super().open(name)

    worker = model(0)
    subscriber = Subscriber(Slow(tmp_path), have=digest(worker))
    subscriber.fetch().apply(worker)
    assert digest(worker) == digest(model(5))


def test_names_dtypes_and_shapes_may_change_from_version_to_version(tmp_path: Path) -> None:
    with Publisher(tmp_path) as publisher:
        publisher.publish(model())
        done = publisher.publish({**model(1), "more": torch.ones(2)})
        assert done.patch is None and done.anchor and "no patch" in done.notes[0]
        assert publisher.publish({**model(2), "more": torch.ones(2)}).patch
    worker = model()
    subscriber = Subscriber(tmp_path, have=digest(worker))
    staged = subscriber.fetch()
    with pytest.raises(SchemaError, match="Nothing was written") as caught:
        staged.apply(worker)
    assert caught.value.item == "more" and digest(worker) == digest(model()) == subscriber.have
    assert digest(staged.state) == digest({**model(2), "more": torch.ones(2)})


def test_a_restarted_publisher_continues_from_the_last_version(tmp_path: Path) -> None:
    published(tmp_path, 2)
    with Publisher(tmp_path) as publisher:
        done = publisher.publish(model(2))
    assert done.number == 3 and done.patch and done.anchor is None and "read" in done.seconds


def test_an_unreadable_store_gets_a_whole_version(tmp_path: Path) -> None:
    """A trainer goes on; whoever is behind finds an anchor."""
    published(tmp_path, 3)
    files(tmp_path, "patch")[0].unlink()
    with pytest.raises(MissingFileError, match="version 2"):
        Subscriber(tmp_path).fetch()
    with Publisher(tmp_path) as publisher:
        done = publisher.publish(model(3))
    assert done.patch is None and done.anchor and "could not be read" in done.notes[0]
    worker = model(0)
    Subscriber(tmp_path, have=digest(worker)).fetch().apply(worker)
    assert digest(worker) == digest(model(3))


@pytest.mark.parametrize("kind", ["patch", "anchor"])
@pytest.mark.parametrize("damage", ["flip", "cut", "more", "gone", "other"])
def test_a_damaged_file_is_refused_by_name_before_a_byte_is_written(tmp_path: Path, kind: str, damage: str) -> None:
    published(tmp_path, 3)
    path = files(tmp_path, kind)[-1]
    data = bytearray(path.read_bytes())
    errors: dict[str, Any] = {"flip": WireError, "cut": TruncatedError, "more": FormatError, "gone": MissingFileError}
    if damage == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= damage == "flip"
        other = files(tmp_path, "patch")[0].read_bytes() if kind == "patch" else tensorwire.dumps(model(1))
        path.write_bytes({"cut": data[:-1], "more": data + b"x", "other": other}.get(damage, data))
    worker = model(1)
    subscriber = Subscriber(tmp_path, have=digest(worker) if kind == "patch" else None)
    if kind == "patch" and damage != "other":
        files(tmp_path, "anchor")[0].unlink()
    with pytest.raises(errors.get(damage, WireError), match="version") as caught:
        subscriber.fetch().apply(worker)
    assert str(caught.value).startswith(f"version {3 if kind == 'patch' else 1}")
    assert digest(worker) == digest(model(1))


def test_another_route_avoids_a_damaged_patch(tmp_path: Path) -> None:
    published(tmp_path, 4, anchor_every=2)
    path = files(tmp_path, "patch")[1]
    path.write_bytes(path.read_bytes()[:100])
    worker = model(1)
    staged = Subscriber(tmp_path, have=digest(worker)).fetch()
    staged.apply(worker)
    assert digest(worker) == digest(model(3)) and digest(staged.state) == digest(worker)


def test_a_wrong_base_is_refused_by_name_before_a_byte_is_written(tmp_path: Path) -> None:
    published(tmp_path, 3)
    worker = model(0)
    subscriber = Subscriber(tmp_path, have=digest(worker))
    worker["layers"][0]["bias"][5] = 7
    before = digest(worker)
    with pytest.raises(SchemaError, match=r"version 3 .* Nothing was written"):
        subscriber.fetch().apply(worker)
    assert digest(worker) == before
    subscriber.have = before  # which the store does not know: an anchor helps
    subscriber.fetch().apply(worker)
    assert digest(worker) == digest(model(2))


def test_an_interrupted_apply_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two patches of a chain, in the middle of one, in the middle of an anchor."""
    published(tmp_path, 4)
    worker = model(0)
    subscriber = Subscriber(tmp_path, have=digest(worker))
    Subscriber(tmp_path, have=digest(worker)).fetch(number=2).apply(worker)
    worker["layers"][0]["bias"][:] = model(2)["layers"][0]["bias"]  # and of the next one the first block
    subscriber.fetch().apply(worker)
    assert digest(worker) == digest(model(3)) == subscriber.have

    subscriber = Subscriber(tmp_path, have=digest(model(0)))
    staged = subscriber.fetch(whole=True)
    worker = model(0)
    with monkeypatch.context() as patched:
        patched.setattr(tensorwire, "decode", lambda *_, **__: interrupted())
        with pytest.raises(KeyboardInterrupt):
            staged.apply(worker)
    assert subscriber.have in (None, digest(worker))
    subscriber.fetch().apply(worker)
    assert digest(worker) == digest(model(3))


def interrupted() -> Iterator[Any]:
    raise KeyboardInterrupt
    yield


@pytest.mark.parametrize("spoil", ["name", "dtype", "shape", "kind", "read-only", "untied", "tuple"])
def test_a_whole_version_that_does_not_fit_is_refused_before_a_byte_is_written(tmp_path: Path, spoil: str) -> None:
    version = {"a": np.ones(3), "b": np.ones(4), "n": {"step": 1, "w": np.ones(2)}, "t": (np.ones(2), 1)}
    published_one(tmp_path, version)
    worker: STATE = {"a": np.zeros(3), "b": np.zeros(4), "n": {"step": 0, "w": np.zeros(2)}, "t": (np.zeros(2), 1)}
    if spoil == "name":
        worker["c"] = worker.pop("b")
    elif spoil == "dtype":
        worker["b"] = worker["b"].astype(np.float32)
    elif spoil == "shape":
        worker["b"] = np.zeros((4, 1))
    elif spoil == "kind":
        worker["n"]["step"] = np.zeros(1)
    elif spoil == "read-only":
        worker["b"].flags.writeable = False
    elif spoil == "untied":
        version["n"]["w"][:] = 5
        published_one(tmp_path, version)
        worker["n"]["w"] = worker["t"][0]
    else:
        worker["t"] = (worker["t"][0], 2)
    before = digest(worker)
    with pytest.raises((SchemaError, EncodeError)):
        Subscriber(tmp_path).fetch().apply(worker)
    assert digest(worker) == before


def published_one(store: Path, state: STATE) -> None:
    with Publisher(store) as publisher:
        publisher.publish(state)


def test_a_second_publisher_is_refused_while_the_first_has_the_folder(tmp_path: Path) -> None:
    first = Publisher(tmp_path)
    with pytest.raises(StorageError, match="another publisher") as caught:
        Publisher(tmp_path)
    assert caught.value.errno == errno.EWOULDBLOCK
    first.close()
    Publisher(tmp_path).close()


@pytest.fixture
def memory() -> Iterator[str]:
    fsspec = pytest.importorskip("fsspec")
    yield "memory://versions-test/run"
    fsspec.filesystem("memory").rm("/versions-test", recursive=True)


def test_versions_behind_an_fsspec_url(memory: str) -> None:
    with pytest.raises(MissingFileError, match="nothing is published"):
        Subscriber(memory).fetch()
    worker = model(0)
    digests = published(memory, 8, anchor_every=3, keep=1)
    assert digest(Subscriber(memory).fetch().state) == digests[-1]
    subscriber = Subscriber(FsspecStore(memory), have=digest(worker))
    subscriber.fetch().apply(worker)
    assert digest(worker) == digests[-1]
    store = open_store(memory)
    assert {name for name in store.names() if name.endswith(".tw")} == subscriber.manifest().files


def test_without_a_lock_the_second_publisher_to_write_stops(memory: str) -> None:
    first, second = Publisher(memory), Publisher(memory)
    first.publish(model(0))
    with pytest.raises(SequenceError, match="another one is at work"):
        second.publish(model(1))
    second = Publisher(memory)
    second.publish(model(1))
    with pytest.raises(SequenceError, match=r"version 2 .* another one is at work"):
        first.publish(model(2))
    assert digest(Subscriber(memory).fetch().state) == digest(model(1))


def test_a_fork_another_store_and_an_older_one_are_errors_that_name_the_version(tmp_path: Path) -> None:
    published(tmp_path, 2)
    two = (tmp_path / MANIFEST).read_bytes()
    published(tmp_path, 3)
    seen = Subscriber(tmp_path)
    seen.fetch()
    three = (tmp_path / MANIFEST).read_bytes()
    (tmp_path / MANIFEST).write_bytes(two)
    with pytest.raises(SequenceError, match=r"went back from version 5 .* to version 2"):
        seen.fetch()
    with Publisher(tmp_path) as publisher:  # who restored it goes on
        publisher.publish(model(9))
    with pytest.raises(SequenceError, match="a fork: version 3"):
        seen.fetch()
    (tmp_path / MANIFEST).write_bytes(three.replace(json.loads(three)["run"].encode(), b"0" * 16))
    with pytest.raises(SequenceError, match="a different store"):
        seen.fetch()


def test_invalid_manifests_are_refused(tmp_path: Path) -> None:
    published(tmp_path, 3)
    good = json.loads((tmp_path / MANIFEST).read_bytes())
    file = good["versions"][0]["anchor"]["file"]

    def spoiled(**changes: Any) -> bytes:
        return json.dumps({**good, **changes}).encode()

    def version(place: int, **changes: Any) -> bytes:
        versions = [{**each, **(changes if at == place else {})} for at, each in enumerate(good["versions"])]
        return spoiled(versions=versions)

    patch = good["versions"][1]["patch"]
    cases: list[tuple[bytes, type[Exception]]] = [
        (b"", FormatError),
        (b"<html>", FormatError),
        (b"[" * 100_000, FormatError),
        (b"[]", FormatError),
        (b'{"a": 1}', FormatError),
        (b" " * ((16 << 20) + 1), LimitError),
        (spoiled(format=2), UnsupportedError),
        (spoiled(versions=[]), FormatError),
        (spoiled(versions=[1]), FormatError),
        (spoiled(versions={}), FormatError),
        (spoiled(run="x"), FormatError),
        (spoiled(publisher=None), FormatError),
        (version(0, number=-1), FormatError),
        (version(0, number=True), FormatError),
        (version(0, anchor=None), FormatError),
        (version(0, anchor={"file": f"../{file}", "size": 1}), FormatError),
        (version(0, anchor={"file": "/etc/passwd", "size": 1}), FormatError),
        (version(0, anchor={"file": 5, "size": 1}), FormatError),
        (version(0, anchor={"file": file, "size": -1}), FormatError),
        (version(0, anchor={"file": file, "size": "1"}), FormatError),
        (version(0, digest="A" * 64), FormatError),
        (version(0, metadata={"a": 1}), FormatError),
        (version(1, patch={**patch, "file": file}), FormatError),
        (version(1, patch={**patch, "base": "0" * 64}), SequenceError),
        (version(1, number=3, patch={**patch, "file": patch["file"].replace("2-", "3-", 1)}), SequenceError),
    ]
    for data, error in cases:
        (tmp_path / MANIFEST).write_bytes(data)
        with pytest.raises(error) as caught:
            Subscriber(tmp_path).fetch()
        assert MANIFEST in str(caught.value) and len(str(caught.value)) < 600


def test_a_flipped_manifest_is_refused_or_harmless(tmp_path: Path) -> None:
    """It has no checksum: what it names is verified."""
    digests = published(tmp_path, 2)
    good = (tmp_path / MANIFEST).read_bytes()
    for place in range(0, len(good), 7):
        mutant = bytearray(good)
        mutant[place] ^= 1 << place % 7
        (tmp_path / MANIFEST).write_bytes(mutant)
        worker = model(0)
        try:
            Subscriber(tmp_path, have=digest(worker)).fetch().apply(worker)
        except (WireError, MissingFileError):
            pass
        assert digest(worker) in digests


def test_a_failed_publish_changes_nothing(tmp_path: Path) -> None:
    with Publisher(tmp_path) as publisher:
        with pytest.raises(EncodeError):
            publisher.publish({"a": object()})
        publisher.publish(model(0))
        before = (tmp_path / MANIFEST).read_bytes()
        for state, options in (
            ({"a": object()}, {}),
            (iter([("a", torch.ones(1))]), {}),
            (model(1), {"metadata": {"a": 1}}),
        ):
            with pytest.raises(EncodeError):
                publisher.publish(state, **options)
        assert (tmp_path / MANIFEST).read_bytes() == before
        assert publisher.publish(model(1)).patch
    for options in ({"anchor_every": 0}, {"keep": 0}, {"keep": True}):
        with pytest.raises(ArgumentError):
            Publisher(tmp_path, **options)
    with pytest.raises(EncodeError, match="exact"):
        Publisher(tmp_path, codec="nf4")
    for have in ("", "x" * 64, b"a", digest(model()).upper()):
        with pytest.raises(ArgumentError, match="digest"):
            Subscriber(tmp_path, have=have)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError):
        open_store(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "replace"])
def test_a_full_disk_keeps_the_version_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    published(tmp_path, 2)
    before = {path.name for path in tmp_path.iterdir()}
    with Publisher(tmp_path, anchor_every=2) as publisher:
        publisher.publish(model(1))
        for first in range(1, 12):
            fault = storage_faults.FaultyOs(call, first)
            with monkeypatch.context() as patched:
                storage_faults.replace_os(patched, fault)
                try:
                    publisher.publish(model(2))
                except StorageError as error:
                    assert error.errno == errno.ENOSPC
            worker = model(0)
            Subscriber(tmp_path, have=digest(worker)).fetch().apply(worker)
            assert digest(worker) in (digest(model(1)), digest(model(2)))
            if not fault.struck:
                break
        done = publisher.publish(model(2))
        assert digest(model(2)) == done.digest == digest(Subscriber(tmp_path).fetch().state)
    assert before <= {path.name for path in tmp_path.iterdir()} and not [*tmp_path.glob(".*.part")]


def test_files_of_a_killed_publisher_are_removed(tmp_path: Path) -> None:
    published(tmp_path, 2)
    half = tmp_path / f".{files(tmp_path, 'patch')[0].name[:24]}.0123456789abcdef.part"
    orphan = tmp_path / "000000000003-0123456789abcdef.patch.tw"
    strange = tmp_path / ".mine.part"
    for path in (half, orphan, strange):
        path.write_bytes(b"x")
    with Publisher(tmp_path) as publisher:
        assert not half.exists()
        publisher.publish(model(3))
        publisher.publish(model(4))
    assert not orphan.exists() and strange.exists()


def test_over_http(served: tuple[Path, str]) -> None:
    folder, url = served
    with pytest.raises(MissingFileError, match="nothing is published"):
        Subscriber(url).fetch()
    digests = published(folder, 3)
    worker = model(0)
    subscriber = Subscriber(url, have=digest(worker))
    seen: list[tuple[int, int]] = []
    staged = subscriber.fetch(progress=lambda done, total: seen.append((done, total)))
    staged.apply(worker)
    assert digest(worker) == digests[-1] == digest(Subscriber(url + "/").fetch().state)
    assert seen[-1] == (staged.size, staged.size)
    with pytest.raises(StorageError, match="read only"):
        Publisher(url)
    with pytest.raises(ArgumentError, match="headers"):
        Subscriber(url + "?token=1")


class Followers:
    """Threads that follow a store of versions of `flat`, each of which fails at anything but a whole version."""

    def __init__(self, url: str, count: int) -> None:
        self.trouble: list[BaseException] = []
        self._url = url
        self._count = count
        self._numbers = {digest(flat(step)): step + 1 for step in range(count)}
        self._over = threading.Event()
        self._followers: list[threading.Thread] = []
        self._readers: list[threading.Thread] = []

    def keep_state(self, pause: float) -> None:
        state, last = flat(0), 0
        subscriber = Subscriber(self._url, have=digest(state))
        while last < self._count and not self.trouble:
            self._over.wait(pause)
            staged = subscriber.fetch()
            staged.apply(state)
            assert staged.target.number >= last and self._numbers[digest(state)] == staged.target.number
            last = staged.target.number

    def keep_file(self, path: Path) -> None:
        for followed in follow(self._url, path, interval=0.01, timeout=60):
            assert self._read(path) == followed.version.number == version_in(path)
            if followed.version.number == self._count:
                return

    def read_file(self, path: Path) -> None:
        """Whoever knows nothing of followers."""
        last = 0
        while not self._over.wait(0.01):
            if path.exists():
                last, before = self._read(path), last
                assert last >= before

    def start(self, work: Any, *arguments: Any) -> None:
        threads = self._readers if work == self.read_file else self._followers
        threads.append(threading.Thread(target=self._guarded, args=(work, *arguments)))
        threads[-1].start()

    def join(self) -> None:
        for thread in self._followers:
            thread.join()
        self._over.set()
        for thread in self._readers:
            thread.join()

    def _read(self, path: Path) -> int:
        return self._numbers[digest(tensorwire.loads(tensorwire.safetensors.encode(path)))]

    def _guarded(self, work: Any, *arguments: Any) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            self.trouble.append(error)


def test_a_chain_of_50_versions_with_a_publisher_at_work_and_four_followers(served: tuple[Path, str]) -> None:
    """Two keep a state, two a file: each only ever has whole versions, in their order, and ends at the last."""
    folder, url = served
    count = 50
    followers = Followers(url, count)
    with Publisher(folder, anchor_every=7, keep=2) as publisher:
        publisher.publish(flat(0))
        for pause in (0.0, 0.2):
            followers.start(followers.keep_state, pause)
        for number in range(2):
            path = folder.parent / f"{number}.safetensors"
            followers.start(followers.keep_file, path)
            followers.start(followers.read_file, path)
        for step in range(1, count):
            publisher.publish(flat(step))
    followers.join()
    assert not followers.trouble, followers.trouble


def flat(step: int) -> STATE:
    rng = np.random.default_rng(3)
    state = {name: rng.normal(size=(64, 64)).astype(np.float32) for name in "abc"}
    for number in range(step):
        state["abc"[number % 3]][number % 64] *= 1.01
    return state


def test_server_failures_are_retryable(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, url = served
    (target,) = published(folder, 1)
    worker = model(5)
    subscriber = Subscriber(url, have=digest(worker))
    for most in (0, 1, 800, 10_000):
        with monkeypatch.context() as patched:
            patched.setattr(Quiet, "most", most)
            with pytest.raises(TransportError, match="before the file does") as caught:
                subscriber.fetch()
            assert caught.value.retryable and subscriber.have == digest(model(5))
    for code, again in ((403, False), (500, True), (429, True)):
        with monkeypatch.context() as patched:
            patched.setattr(Quiet, "code", code)
            with pytest.raises(TransportError, match=str(code)) as caught:
                subscriber.fetch()
            assert caught.value.retryable is again
            if not again:
                with pytest.raises(TransportError, match="403"):
                    next(follow(url, folder.parent / "model.safetensors"))
    subscriber.fetch().apply(worker)
    assert digest(worker) == target
    with pytest.raises(TransportError) as caught:
        Subscriber("http://127.0.0.1:1/versions").fetch()
    assert caught.value.retryable


def test_following_continues_from_an_existing_file(tmp_path: Path) -> None:
    store, path = tmp_path / "store", tmp_path / "model.safetensors"
    with Publisher(store) as publisher:
        for step in range(3):
            publisher.publish(flat(step))
    tensorwire.safetensors.decode(tensorwire.encode(flat(1)), path)
    (followed,) = follow(store, path, timeout=0)
    manifest = Subscriber(store).manifest()
    assert followed.version == manifest.head and followed.size == manifest.head.patch.size  # type: ignore[union-attr]
    assert version_in(path) == 3 and followed.seconds["apply"] > 0
    assert [*follow(store, path, timeout=0)] == []
    path.write_bytes(b"something else")
    assert version_in(path) is None
    (followed,) = follow(store, path, timeout=0)
    assert digest(tensorwire.loads(tensorwire.safetensors.encode(path))) == digest(flat(2))


def test_following_waits_and_says_why(tmp_path: Path) -> None:
    store, path, notes = tmp_path / "store", tmp_path / "model.safetensors", []

    def on_note(note: str) -> None:
        notes.append(note)
        published_one(store, flat(0))
        if "nothing is published" not in note:
            whole = next(store.glob("*.anchor.tw"))
            whole.write_bytes(good)

    versions = follow(store, path, interval=0.01, on_note=on_note)
    assert next(versions).version.number == 1 and len(notes) == 1 and "nothing is published" in notes[0]
    path.unlink()
    whole = next(store.glob("*.anchor.tw"))
    good = whole.read_bytes()
    whole.write_bytes(good[:-9])
    versions = follow(store, path, interval=0.01, on_note=on_note)
    assert next(versions).version.number == 1 and len(notes) == 2 and "version 1" in notes[1]
    with pytest.raises(MissingFileError, match="nothing is published"):
        next(follow(tmp_path / "nowhere", path, interval=0.01, timeout=0.05))
    assert version_in(path) == 1
    for options in ({"interval": 0.0}, {"timeout": -1.0}, {"timeout": float("nan")}):
        with pytest.raises(ArgumentError):
            follow(store, path, **options)


def test_a_file_that_could_not_be_written_is_written_the_next_time(tmp_path: Path) -> None:
    store, path = tmp_path / "store", tmp_path / "folder" / "model.safetensors"
    published_one(store, flat(0))
    path.parent.mkdir()
    versions = follow(store, path, interval=0.01, timeout=0)
    path.parent.rename(tmp_path / "elsewhere")
    with pytest.raises(MissingFileError, match="folder"):
        next(versions)
    path.parent.mkdir()
    assert next(follow(store, path, timeout=0)).version.number == 1


def test_versions_that_safetensors_cannot_hold_are_refused(tmp_path: Path) -> None:
    published(tmp_path / "store", 1)
    with pytest.raises(SchemaError, match="flat dict"):
        next(follow(tmp_path / "store", tmp_path / "model.safetensors"))
    assert not (tmp_path / "model.safetensors").exists()


def test_a_file_of_many_slices_is_patched_whichever_thread_reads_first(tmp_path: Path) -> None:
    """An encoder reads slices in two threads."""
    state = {"w": np.random.default_rng(2).normal(size=3 << 19).astype(np.float32)}
    with Publisher(tmp_path / "store") as publisher:
        for step in range(6):
            state["w"][step::500] *= 1.001
            done = publisher.publish(state)
            (followed,) = follow(tmp_path / "store", tmp_path / "model.safetensors", timeout=0)
            assert followed.version.digest == done.digest
            assert (
                digest(tensorwire.loads(tensorwire.safetensors.encode(tmp_path / "model.safetensors"))) == done.digest
            )


def test_patches_are_not_a_whole_version(tmp_path: Path) -> None:
    published(tmp_path, 2)
    staged = Subscriber(tmp_path, have=digest(model(0))).fetch()
    assert not staged.is_whole and len(staged.patches) == 1
    with pytest.raises(SchemaError, match="whole=True"):
        _ = staged.state


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    published(tmp_path.as_uri(), 1)
    assert isinstance(open_store(tmp_path.as_uri()), FolderStore) and len(files(tmp_path, "anchor")) == 1


def test_a_failed_upload_is_removed(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    published(memory, 1)
    store = open_store(memory)
    before = store.names()

    def broken() -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.EIO, "no more")

    with pytest.raises(TransportError, match="no more"):
        store.write("000000000002-0123456789abcdef.patch.tw", broken())
    assert store.names() == before
    with Publisher(memory) as publisher, monkeypatch.context() as patched:
        patched.setattr(FsspecStore, "names", lambda self: refused())
        done = publisher.publish(model(1))
    assert done.is_new and "could not be removed" in done.notes[0]


def refused() -> list[str]:
    raise TransportError("no listing here")


def test_too_many_damaged_files_end_a_fetch(tmp_path: Path) -> None:
    published(tmp_path, 12, anchor_every=1, keep=12)
    for path in files(tmp_path, "anchor"):
        path.write_bytes(b"")
    with pytest.raises(TruncatedError, match="version 12"):
        Subscriber(tmp_path).fetch()
