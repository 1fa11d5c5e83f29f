"""A stream received to disk: every place where it can break, and what the next attempt finds."""

import errno
import functools
import itertools
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from leaks import left_open, open_files
from storage_faults import RecordingOs, replace_os
from test_storage import crashes

import tensorwire
from tensorwire.errors import (
    CorruptError,
    EncodeError,
    FormatError,
    LimitError,
    SchemaError,
    SequenceError,
    StorageError,
    TruncatedError,
)
from tensorwire.limits import Limits
from tensorwire.storage import write_file
from tensorwire.transfer import Outcome, Position, Recorded, Recording, Regenerated, version_of
from tensorwire.transfer import receiving as recording
from tensorwire.transfer.frames import Frames
from tensorwire.wire.drive import as_source, pull

RNG = np.random.default_rng(5)
MODEL = {"a": RNG.standard_normal(3000, np.float32), "b": RNG.standard_normal((7, 100), np.float32), "n": {"c": 1}}
STREAM = b"".join(tensorwire.encode(MODEL, frame_size=4096))
OTHER = b"".join(tensorwire.encode({**MODEL, "a": MODEL["a"] + 1}, frame_size=4096))
FRAMES = list(Frames(as_source(STREAM)))
POSITIONS = [Position()] + [Position(f.header.sequence + 1, f.offset + f.size, f.header.crc) for f in FRAMES]
DIGEST = STREAM[-32:].hex()
OLD = b"what was here before"


def outgoing() -> Iterator[Any]:
    return tensorwire.encode(MODEL, frame_size=4096)


def feed(place: Recording, data: bytes) -> None:
    """All of `data`; raises TruncatedError where that is not the whole rest."""
    for _ in pull(place, as_source(data)):
        pass


def receive(path: Path, data: bytes = STREAM, transfer: bytes = b"t", **options: Any) -> Outcome:
    place = Recording(path, transfer, **options)
    try:
        feed(place, data[place.position.offset :])
        return place.commit()
    finally:
        place.close()


def break_off(path: Path, data: bytes, transfer: bytes = b"t") -> None:
    place = Recording(path, transfer)
    with pytest.raises(TruncatedError):
        feed(place, data)
    place.close()


def hidden(folder: Path) -> list[str]:
    return sorted(path.name.rpartition(".")[2] for path in folder.glob(".*"))


def test_a_stream_arrives_under_its_name_and_its_digest_is_known(tmp_path: Path) -> None:
    outcome = receive(tmp_path / "m.tw")
    assert outcome == Outcome(POSITIONS[-1], DIGEST)
    assert (tmp_path / "m.tw").read_bytes() == STREAM
    assert hidden(tmp_path) == ["done"]


@pytest.mark.parametrize("lent", [False, True])
def test_a_frame_of_any_size_is_not_kept_in_memory(tmp_path: Path, lent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = b"".join(tensorwire.encode({"x": np.zeros(12 << 20, np.uint8)}, frame_size=16 << 20))
    held = []
    updated = Recording.buffer_updated

    def watched(place: Recording, size: int) -> None:
        updated(place, size)
        held.append(len(place._pending))

    monkeypatch.setattr(Recording, "buffer_updated", watched)
    chunks = (stream[i : i + 65536] for i in range(0, len(stream), 65536))
    place = Recording(tmp_path / "m.tw", b"t")
    try:
        for _ in pull(place, as_source(stream if lent else chunks)):
            pass
        place.commit()
    finally:
        place.close()
    assert (tmp_path / "m.tw").read_bytes() == stream
    assert max(held) < recording._HELD


def test_every_cut_resumes_at_the_last_complete_frame(tmp_path: Path) -> None:
    for cut in range(0, len(STREAM), 37):
        path = tmp_path / f"{cut}.tw"
        break_off(path, STREAM[:cut])
        assert not path.exists()
        place = Recording(path, b"t")
        assert place.position == max((p for p in POSITIONS if p.offset <= cut), key=lambda p: p.offset)
        feed(place, STREAM[place.position.offset :])
        assert place.commit().digest == DIGEST
        place.forget()
        assert path.read_bytes() == STREAM
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("make", [lambda path: Regenerated(outgoing), Recorded], ids=["regenerated", "recorded"])
def test_the_rest_from_every_frame_boundary(make: Callable, tmp_path: Path) -> None:
    path = tmp_path / "out.tw"
    path.write_bytes(STREAM)
    for position in POSITIONS:
        source = make(path)
        assert b"".join(source.after(position)) == STREAM[position.offset :]
        assert source.digest == DIGEST


@pytest.mark.parametrize("make", [lambda path: Regenerated(outgoing), Recorded], ids=["regenerated", "recorded"])
def test_a_position_that_is_not_in_this_stream_is_refused(make: Callable, tmp_path: Path) -> None:
    path = tmp_path / "out.tw"
    path.write_bytes(STREAM)
    good = POSITIONS[3]
    wrong = [Position(good.frames, good.offset + shift, good.link) for shift in (-1, 1, 16)]
    wrong += [Position(good.frames + 1, good.offset, good.link), Position(good.frames, good.offset, good.link ^ 1)]
    wrong += [Position(9, len(STREAM) + more, 0) for more in (1, 1 << 60)]
    wrong += [Position(9, len(STREAM) - less, 0) for less in (1, 47)]
    for position in wrong:
        with pytest.raises(SequenceError, match="another stream"):
            list(make(path).after(position))


def test_a_source_that_has_changed_is_another_stream() -> None:
    source = Regenerated(lambda: iter([OTHER]))
    with pytest.raises(SequenceError, match="another stream"):
        list(source.after(POSITIONS[-2]))
    assert b"".join(source.after(POSITIONS[1])) == OTHER[POSITIONS[1].offset :]  # the beginning is the same


def test_a_recorded_file_that_shrinks_raises(tmp_path: Path) -> None:
    path = tmp_path / "out.tw"
    path.write_bytes(STREAM * 100)  # more than one read
    chunks = Recorded(path).after(Position())
    next(chunks)
    os.truncate(path, 100)
    with pytest.raises(StorageError, match="shorter"):
        list(chunks)


@pytest.mark.parametrize("what", ["written over", "longer", "replaced", "removed"])
@pytest.mark.parametrize("when", [0, 1, -1])
@pytest.mark.parametrize("kept", [False, True], ids=["", "times put back"])
def test_a_source_that_changes_while_it_is_sent_is_not_received(
    what: str, when: int, kept: bool, tmp_path: Path
) -> None:
    """However late: before the first bytes, in the middle, or once all but the last have gone."""
    path = tmp_path / "in.bin"
    path.write_bytes(RNG.bytes(300_000))
    status = path.stat()

    def make() -> Iterator[Any]:
        buffers = list(tensorwire.encode_file(path, frame_size=65536))
        for number, buffer in enumerate(buffers):
            if number == when % len(buffers):
                change(path, what)
                if kept and path.exists():
                    put_back_times(path, status)
            yield buffer

    source = Regenerated(make, version=lambda: version_of(path))
    error = OSError if what == "removed" else EncodeError
    with pytest.raises(error, match="changed while it was being sent|No such file"):
        receive(tmp_path / "out", b"".join(source.after(Position())))
    sent = bytearray()
    with suppress(EncodeError, OSError):
        sent.extend(b"".join(source.after(Position())))
    assert not sent and not (tmp_path / "out").exists()


def change(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "written over":
        with path.open("r+b") as file:
            file.write(b"new")
    elif how == "longer":
        path.write_bytes(data + b"more")
    else:
        path.unlink()
        if how == "replaced":
            path.write_bytes(data[::-1])


def test_a_source_that_changes_between_two_attempts_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "in.bin"
    path.write_bytes(b"old")
    source = Regenerated(lambda: tensorwire.encode_file(path), version=lambda: version_of(path))
    assert list(source.after(Position()))
    path.write_bytes(b"new")
    with pytest.raises(EncodeError, match="changed while it was being sent"):
        next(source.after(Position()))


def test_only_the_last_bytes_wait_for_the_source_check() -> None:
    given: list[bytes] = []
    looked: list[int] = []

    def make() -> Iterator[Any]:
        for number in range(3):
            yield bytes([number])
            yield b""  # a layer has ended

    source = Regenerated(make, version=lambda: looked.append(len(given)))
    for buffer in source.after(Position()):
        given.append(bytes(buffer))
    assert given == [b"\0", b"", b"\1", b"", b"\2", b""]
    assert looked == [0, 0, 0, 2, 4, 6]


def test_a_recorded_file_may_be_removed_but_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "out.tw"
    path.write_bytes(STREAM * 40)  # more than one read
    source = Recorded(path)
    chunks = source.after(Position())
    sent = bytearray(next(chunks))
    path.unlink()
    assert sent + b"".join(chunks) == STREAM * 40 and source.digest == DIGEST
    path.write_bytes(STREAM * 40)
    chunks = Recorded(path).after(Position())
    next(chunks)
    with path.open("r+b") as file:
        file.write(b"new")
    with pytest.raises(StorageError, match="written to"):
        list(chunks)


def test_the_content_of_a_part_is_verified_again(tmp_path: Path) -> None:
    """Any byte of it changed, or junk behind it: what is before the broken frame stays, the rest is asked for again."""
    path = tmp_path / "m.tw"
    break_off(path, STREAM[:-1])
    (part,) = tmp_path.glob(".*.part")
    whole = part.read_bytes()
    for place in range(0, len(whole), 53):
        part.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        found = Recording(path, b"t")
        found.close()
        assert found.position == max((p for p in POSITIONS if p.offset <= place), key=lambda p: p.offset)
        assert part.stat().st_size == max(found.position.offset, 0)
    part.write_bytes(STREAM + b"junk")
    assert receive(path).digest == DIGEST
    assert path.read_bytes() == STREAM


def test_every_transfer_has_its_own_part(tmp_path: Path) -> None:
    path = tmp_path / "m.tw"
    break_off(path, STREAM[: POSITIONS[3].offset], b"one")
    place = Recording(path, b"two")
    assert place.position == Position()
    place.discard()
    place = Recording(path, b"one")
    assert place.position == POSITIONS[3]
    place.discard()
    assert list(tmp_path.iterdir()) == []


def test_long_names_and_names_with_any_bytes(tmp_path: Path) -> None:
    for name in ("x" * 255, "ü" * 127, os.fsdecode(b"\xff" * 200)):
        assert receive(tmp_path / name).digest == DIGEST
        assert (tmp_path / name).read_bytes() == STREAM


def test_a_second_receiver_of_one_transfer_is_refused(tmp_path: Path) -> None:
    first = Recording(tmp_path / "m.tw", b"t")
    with pytest.raises(StorageError, match="somebody else") as caught:
        Recording(tmp_path / "m.tw", b"t")
    assert caught.value.errno == errno.EWOULDBLOCK
    first.close()
    Recording(tmp_path / "m.tw", b"t").discard()


def test_a_transfer_takes_effect_once(tmp_path: Path) -> None:
    """Asked again before it is known that the sender has its receipt, a receiver answers from its journal."""
    path = tmp_path / "m.tw"
    outcome = receive(path)
    before = path.stat()
    again = Recording(path, b"t")
    assert (again.outcome, again.position) == (outcome, outcome.end)
    assert list(again.steps()) == []
    assert again.commit() == outcome
    assert path.stat() == before
    again.forget()
    assert Recording(path, b"t").position == Position()


@pytest.mark.parametrize(
    "journal",
    [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 60_000, b'{"end": 1, "digest": ""}', b'{"end": {"x": 1}, "digest": ""}'],
)
def test_an_incomplete_journal_is_ignored(journal: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.tw"
    receive(path)
    (note,) = tmp_path.glob(".*.done")
    which = note.read_text().partition("]")[0]
    for text in (journal, f"{which}], ".encode() + journal + b"]", f"{which}], {json.dumps(repr(journal))}]".encode()):
        note.write_bytes(text)
        place = Recording(path, b"t")
        assert place.position == Position()
        place.close()


def test_a_crash_between_journal_and_rename_is_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process had died at each call of the commit in turn; the next attempt has nothing to receive."""
    for call in ("fsync", "replace"):
        for number in range(1, 5):
            path = tmp_path / f"{call}{number}"
            left = [number]

            real = getattr(os, call)

            def die(*arguments: Any, real: Callable = real, left: list[int] = left, **fds: int) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
                return real(*arguments, **fds)

            with monkeypatch.context() as patch:
                patch.setattr(os, call, die)
                try:
                    receive(path)
                except KeyboardInterrupt:
                    assert not path.exists() or path.read_bytes() == STREAM
            again = Recording(path, b"t")
            assert again.position == POSITIONS[-1] and list(again.steps()) == []
            assert again.commit() == Outcome(POSITIONS[-1], DIGEST)
            assert path.read_bytes() == STREAM and json.loads(next(tmp_path.glob(f".{path.name}.*.done")).read_text())
            assert not list(tmp_path.glob(".*.part"))


def test_streams_that_check_refuses_are_removed(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def check() -> Callable:
        names: list[str] = []
        seen.append(names)

        def refuse(item: Any) -> None:
            names.append(item.name)
            if item.name == "b":
                raise SchemaError("not b", item=item.name)

        return refuse

    for _ in range(2):
        with pytest.raises(SchemaError, match="not b"):
            receive(tmp_path / "m.tw", check=check)
        assert list(tmp_path.iterdir()) == []
    assert [names for names in seen if names] == [["", "a", "b"]] * 2


def test_every_reading_starts_a_new_check(tmp_path: Path) -> None:
    """A schema takes each item once."""
    break_off(tmp_path / "m.tw", STREAM[: POSITIONS[6].offset + 1])
    assert receive(tmp_path / "m.tw", check=lambda: tensorwire.schema(MODEL).check).digest == DIGEST


def test_finish_replaces_the_renaming(tmp_path: Path) -> None:
    path = tmp_path / "m"
    receive(path, finish=lambda part: path.write_text(str(Path(part).stat().st_size)))
    assert path.read_text() == str(len(STREAM)) and hidden(tmp_path) == ["done"]

    def unwanted(part: str) -> None:
        raise FormatError("no")

    with pytest.raises(FormatError):
        receive(tmp_path / "n", finish=unwanted)
    assert not list(tmp_path.glob(".n*"))


# The journal. What it says is believed only while the file that it is about stands, unchanged, under the name.


def backwards(part: str, path: str) -> None:
    """What a receiver may make of a stream: another file."""
    write_file(path, [Path(part).read_bytes()[::-1]])


KINDS: dict[str, dict[str, Any]] = {"as it is": {}, "converted": {"convert": backwards}}
kinds = pytest.mark.parametrize("kind", KINDS)


def expected(kind: str) -> bytes:
    return STREAM[::-1] if kind == "converted" else STREAM


def put_back_times(path: Path, status: os.stat_result) -> None:
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def another_file(path: Path) -> None:
    """Of the same size and age."""
    status = path.stat()
    path.rename(path.with_name("moved"))
    path.write_bytes(b"x" * status.st_size)
    put_back_times(path, status)


def a_link_to_it(path: Path) -> None:
    path.symlink_to(path.rename(path.with_name("moved")))


SINCE: dict[str, Callable[[Path], Any]] = {
    "removed": Path.unlink,
    "replaced": another_file,
    "written over": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
    "cut": lambda path: os.truncate(path, 100),
    "a link to it": a_link_to_it,
}


@kinds
@pytest.mark.parametrize("since", SINCE)
def test_later_changes_of_the_file_are_noticed(since: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m"
    receive(path, **KINDS[kind])
    SINCE[since](path)
    assert receive(path, **KINDS[kind]).digest == DIGEST, "received anew"
    assert path.read_bytes() == expected(kind)


def test_a_file_damaged_later_gets_no_second_receipt(tmp_path: Path) -> None:
    """Size, time and inode are as they were: it is read again."""
    path = tmp_path / "m.tw"
    receive(path)
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"rot")
    put_back_times(path, status)
    place = Recording(path, b"t")
    assert place.position == Position()
    place.discard()


@kinds
def test_a_file_moved_to_the_name_is_not_the_received_one(kind: str, tmp_path: Path) -> None:
    """Disk full, or a kill, between journal and name; the part is removed by hand."""
    path = tmp_path / "m"
    path.write_bytes(OLD)

    def die(part: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        receive(path, finish=die, **KINDS[kind])
    assert hidden(tmp_path) == sorted({"done", "part"} | ({"made"} if kind == "converted" else set()))
    for part in tmp_path.glob(".*.part"):
        part.unlink()
    place = Recording(path, b"t", **KINDS[kind])
    assert place.position == Position() and place.outcome is None
    feed(place, STREAM)
    place.commit()
    assert path.read_bytes() == expected(kind) and hidden(tmp_path) == ["done"]


def test_converted_files_keep_the_permissions_of_the_target(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for name, mode in [("new", None), ("old", 0o600), ("wide", 0o666)]:
            path = tmp_path / name
            if mode is not None:
                path.write_bytes(OLD)
                path.chmod(mode)
            receive(path, convert=backwards)
            assert path.stat().st_mode & 0o777 == {"new": 0o644, "old": 0o600, "wide": 0o644}[name]
    finally:
        os.umask(before)


def test_failed_conversions_remove_or_keep_the_part(tmp_path: Path) -> None:
    def unwanted(part: str, path: str) -> None:
        raise FormatError("no")

    def full(part: str, path: str) -> None:
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(FormatError):
        receive(tmp_path / "m", convert=unwanted)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match="what was received stays"):
        receive(tmp_path / "m", convert=full)
    assert hidden(tmp_path) == ["part"]
    assert receive(tmp_path / "m", b"", convert=backwards).digest == DIGEST
    assert hidden(tmp_path) == ["done"]


@pytest.mark.parametrize("trap", ["fifo", "hard link", "folder", "socket"])
def test_anything_but_a_plain_journal_is_ignored(trap: str, tmp_path: Path) -> None:
    path = tmp_path / "m.tw"
    receive(path)
    (journal,) = tmp_path.glob(".*.done")
    whole = journal.read_bytes()
    (tmp_path / "victim").write_bytes(whole)
    journal.unlink()
    if trap == "fifo":
        os.mkfifo(journal)
    elif trap == "hard link":
        os.link(tmp_path / "victim", journal)
    elif trap == "folder":
        journal.mkdir()
    else:
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(journal))
    place = Recording(path, b"t")
    assert place.position == Position()
    feed(place, STREAM)
    if trap == "hard link":
        place.commit()
        assert not journal.samefile(tmp_path / "victim")
    else:
        with pytest.raises(StorageError, match="remove it"):
            place.commit()
    place.close()
    assert (tmp_path / "victim").read_bytes() == whole and path.read_bytes() == STREAM


@pytest.mark.parametrize("number", [1, 20, 60, 97])
def test_frames_before_a_broken_byte_are_kept(number: int, tmp_path: Path) -> None:
    cut = len(STREAM) * number // 100
    broken = STREAM[:cut] + bytes([STREAM[cut] ^ 1]) + STREAM[cut + 1 :]
    place = Recording(tmp_path / "m.tw", b"t")
    with pytest.raises((CorruptError, SequenceError)):
        feed(place, broken)
    reached = place.position
    place.close()
    assert reached == max((p for p in POSITIONS if p.offset <= cut), key=lambda p: p.offset)
    place = Recording(tmp_path / "m.tw", b"t")
    assert place.position == reached
    place.close()


def test_large_frames_are_written_as_they_arrive(tmp_path: Path) -> None:
    value = np.zeros(3 << 20, np.float32)
    tensorwire.save_file(value, tmp_path / "big.tw")
    stream = (tmp_path / "big.tw").read_bytes()
    place = Recording(tmp_path / "m.tw", b"t")
    with pytest.raises(TruncatedError):
        feed(place, stream[: 9 << 20])
    place.close()
    (part,) = tmp_path.glob(".*.part")
    assert 4 << 20 < part.stat().st_size <= 9 << 20
    assert receive(tmp_path / "m.tw", stream).end.offset == len(stream)


def test_limits_are_kept(tmp_path: Path) -> None:
    with pytest.raises(LimitError):
        receive(tmp_path / "m.tw", limits=Limits(stream=1000))
    assert not (tmp_path / "m.tw").exists()


class Failing:
    """`os` for the modules under test, where the N-th call of `name` fails."""

    def __init__(self, name: str, number: int, error: int) -> None:
        self._name, self._left, self._error = name, number, error

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name != self._name:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                if name == "close":  # Linux: the descriptor is gone, whatever close says
                    real(*arguments)
                raise OSError(self._error, os.strerror(self._error))
            return real(*arguments, **options)

        return call


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["open", "pwrite", "preadv", "fstat", "ftruncate", "fsync", "replace", "close"])
def test_the_nth_call_fails_and_the_next_attempt_goes_on(
    call: str, error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, failures = open_files(), 0
    for number in range(1, 6):
        path = tmp_path / f"{number}"
        break_off(path, STREAM[: POSITIONS[4].offset])
        faulty = Failing(call, number, error)
        with monkeypatch.context() as patch:
            replace_os(patch, faulty)
            try:
                receive(path)
            except StorageError as error_found:
                found, failures = error_found, failures + 1
            else:
                found = None
        assert found is None or (found.errno == error and str(path) in str(found))
        place = Recording(path, b"t")
        assert place.position.offset >= POSITIONS[4].offset, "verified bytes were lost"
        feed(place, STREAM[place.position.offset :])
        place.commit()
        assert path.read_bytes() == STREAM
    assert failures or call == "close"
    assert not list(tmp_path.glob(".*.part"))
    assert not left_open(before)


def test_a_missing_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write"):
        Recording(tmp_path / "none" / "m.tw", b"t")


def test_links_are_not_followed(tmp_path: Path) -> None:
    place = Recording(tmp_path / "m.tw", b"t")
    place.discard()
    (tmp_path / "victim").write_text("precious")
    os.symlink(tmp_path / "victim", place._part.path)
    with pytest.raises(StorageError):
        Recording(tmp_path / "m.tw", b"t")
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_journal_that_is_a_link_is_not_written_through_nor_believed(tmp_path: Path) -> None:
    path = tmp_path / "m.tw"
    receive(path)
    (journal,) = tmp_path.glob(".*.done")
    whole = journal.read_bytes()
    (tmp_path / "victim").write_bytes(whole)
    journal.unlink()
    os.symlink(tmp_path / "victim", journal)
    place = Recording(path, b"t")
    assert place.position == Position()  # a link is no journal,
    feed(place, STREAM)
    place.commit()
    assert (tmp_path / "victim").read_bytes() == whole  # and nothing is written where it points
    assert journal.is_file() and not journal.is_symlink()


def test_a_part_that_is_not_a_plain_file_is_refused(tmp_path: Path) -> None:
    place = Recording(tmp_path / "m.tw", b"t")
    part = Path(place._part.path)
    place.discard()
    (tmp_path / "victim").write_text("precious")
    os.link(tmp_path / "victim", part)
    with pytest.raises(StorageError, match="not a plain file"):
        Recording(tmp_path / "m.tw", b"t")
    assert (tmp_path / "victim").read_text() == "precious"
    part.unlink()
    os.mkfifo(part)
    with pytest.raises(StorageError, match="not a plain file"):
        Recording(tmp_path / "m.tw", b"t")


@pytest.mark.parametrize("trap", ["folder", "fifo"])
def test_an_irreplaceable_target_is_refused_at_once(trap: str, tmp_path: Path) -> None:
    path = tmp_path / "m.tw"
    path.mkdir() if trap == "folder" else os.mkfifo(path)
    with pytest.raises(StorageError, match="cannot write"):
        Recording(path, b"t")
    assert hidden(tmp_path) == []


def test_permissions_are_those_of_the_target_or_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        receive(tmp_path / "new")
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
        (tmp_path / "old").write_text("x")
        (tmp_path / "old").chmod(0o600)
        receive(tmp_path / "old")
        assert (tmp_path / "old").stat().st_mode & 0o777 == 0o600
        break_off(tmp_path / "later", STREAM[:500])
        (tmp_path / "later").write_text("x")  # with fewer permissions than the part has
        (tmp_path / "later").chmod(0o400)
        receive(tmp_path / "later")
        assert (tmp_path / "later").stat().st_mode & 0o777 == 0o400
    finally:
        os.umask(before)


def test_a_folder_swapped_for_a_link_redirects_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "elsewhere").mkdir()
    place = Recording(tmp_path / "folder" / "m.tw", b"t")
    feed(place, STREAM)
    (tmp_path / "folder").rename(tmp_path / "moved")
    os.symlink(tmp_path / "elsewhere", tmp_path / "folder")
    place.commit()
    assert (tmp_path / "moved" / "m.tw").read_bytes() == STREAM
    assert not list((tmp_path / "elsewhere").iterdir())


# Crashes, as in test_storage.py: every prefix of what was done to the disk, with any of what was not yet synced lost.


@kinds
@pytest.mark.parametrize("old", [None, OLD], ids=["new", "over an old file"])
def test_a_crash_at_any_point_leaves_the_old_or_new_file(
    old: bytes | None, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.tw"
    if old is not None:
        path.write_bytes(old)
    disk = RecordingOs()
    with monkeypatch.context() as patch:
        replace_os(patch, disk)
        receive(path, **KINDS[kind])
    kinds = [op.kind for op in disk.ops if op.kind not in ("write", "unlink")]
    converted = ["create", "create", "sync", "rename", "sync folder"] if kind == "converted" else []
    assert kinds == ["create", "sync", *converted, "create", "sync", "sync folder", "rename", "sync folder"]
    (journal,) = tmp_path.glob(".*.done")
    synced = 1 + next(number for number, op in enumerate(disk.ops) if op.kind == "sync folder")
    seen = set()
    for done, names in crashes(disk.ops, {} if old is None else {"m.tw": old}):
        found = names.get("m.tw")
        assert found in (old, expected(kind))
        if found == expected(kind):
            assert names.get(journal.name) == journal.read_bytes()  # or it would be received a second time
        else:  # nothing that was verified is lost, once it was synced
            assert done < synced or STREAM in names.values()
        assert done < len(disk.ops) or found == expected(kind)
        seen.add(found)
    assert seen == {old, expected(kind)}


class Dying:
    """`os` for the modules under test; at its N-th change to the disk the process is gone."""

    CHANGES = ("open", "pwrite", "ftruncate", "fchmod", "fsync", "replace", "unlink")

    def __init__(self, number: int) -> None:
        self.left = number

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return functools.partial(self._change, real) if name in self.CHANGES else real

    def _change(self, real: Callable, *arguments: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left <= 0:
            raise KeyboardInterrupt
        return real(*arguments, **options)


@kinds
@pytest.mark.parametrize("old", [None, OLD], ids=["new", "over an old file"])
def test_a_process_that_dies_between_two_steps_resumes(
    old: bytes | None, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is old or new, what comes after finds out which, and then nothing is left but the journal."""
    told = 0
    for number in itertools.count(1):
        path = tmp_path / f"{number}"
        if old is not None:
            path.write_bytes(old)
        dying = Dying(number)
        with monkeypatch.context() as patch:
            replace_os(patch, dying)
            with suppress(KeyboardInterrupt):
                receive(path, **KINDS[kind])
        found = path.read_bytes() if path.exists() else None
        assert found in (old, expected(kind))
        again = Recording(path, b"t", **KINDS[kind])
        if again.outcome is not None and again._done:
            assert found == expected(kind), "a receipt for what does not stand there"
            told += 1
        feed(again, STREAM[again.position.offset :])
        assert again.commit() == Outcome(POSITIONS[-1], DIGEST)
        again.close()
        assert path.read_bytes() == expected(kind)
        assert {each.name.rpartition(".")[2] for each in tmp_path.glob(f".{number}.*")} == {"done"}
        if dying.left > 0:
            break
    assert number > 8 and told >= 2


@pytest.mark.parametrize("missing", ["the stream's", "the journal's", "the folder's before the name", "the folder's"])
def test_the_check_of_crashes_finds_a_sync_that_is_missing(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = RecordingOs()
    with monkeypatch.context() as patch:
        replace_os(patch, disk)
        receive(tmp_path / "m.tw")
    (journal,) = tmp_path.glob(".*.done")
    syncs = [number for number, op in enumerate(disk.ops) if op.kind.startswith("sync")]
    names = ["the stream's", "the journal's", "the folder's before the name", "the folder's"]
    ops = [op for number, op in enumerate(disk.ops) if number != syncs[names.index(missing)]]
    states = [(done, found.get("m.tw"), found.get(journal.name)) for done, found in crashes(ops, {})]
    wrong = [
        (stream, note)
        for done, stream, note in states
        if stream not in (None, STREAM)
        or (stream is not None and note != journal.read_bytes())
        or (done == len(ops) and stream is None)
    ]
    assert wrong
