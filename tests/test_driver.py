"""What all transports share: equal calls and counters, gathered writes that leave in a pause, trying again."""

import asyncio
import inspect
import queue
import ssl
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from network import PATIENCE, Certificates, Server, nothing_left, until

import tensorwire
from tensorwire.errors import CorruptError, SchemaError, TransportError, TruncatedError
from tensorwire.transfer import (
    Backoff,
    Fill,
    Offer,
    Outcome,
    Position,
    Receipt,
    Recording,
    RefusedError,
    Regenerated,
    greet,
    hear,
    receive_stream,
    say,
    send_stream,
    wait,
)
from tensorwire.transfer.resume import send_over
from tensorwire.transports import (
    AsyncListener,
    AsyncTransport,
    MemoryTransport,
    TcpListener,
    TcpTransport,
    client_tls,
    send_resuming,
    send_resuming_async,
    server_tls,
    speaks_for,
)
from tensorwire.transports.driver import Driver, Early, completed, run_of
from tensorwire.transports.tls import peer_names
from tensorwire.wire.drive import as_source, pull
from tensorwire.wire.values import pack_value

MODEL = {"a": np.arange(300_000, dtype=np.float32), "b": np.ones(50, np.float32)}
STREAM = b"".join(tensorwire.encode(MODEL))
DIGEST = STREAM[-32:].hex()
KINDS = ["blocking", "asyncio", "memory"]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@contextmanager
def serving(serve: Callable[[Any], Any], tls: ssl.SSLContext | None = None) -> Iterator[tuple[int, list[Any]]]:
    """A blocking end in a thread of its own: the port, and what `serve` returns or raises."""
    results: list[Any] = []

    def run() -> None:
        try:
            with listener, listener.accept() as transport:
                results.append(serve(transport))
        except BaseException as error:
            results.append(error)

    listener = TcpListener(tls=tls)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listener.port, results
    finally:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def converse(kind: str, ours: Callable[[Any], Any], theirs: Callable[[Any], Any], **tls: ssl.SSLContext) -> list[Any]:
    """Both ends of a connection do what they are told: what `ours` and `theirs` return.

    `ours` of asyncio is a coroutine function, and `theirs` is blocking.
    """
    if kind == "memory":
        left, right = MemoryTransport.pair()
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(theirs(right)))
        thread.start()
        with left:
            mine = ours(left)
        thread.join(PATIENCE)
        right.close()
        return [mine, *results]
    with serving(theirs, tls.get("server")) as (port, results):
        if kind == "blocking":
            with TcpTransport.connect("localhost", port, tls=tls.get("client")) as transport:
                mine = ours(transport)
        else:

            async def main() -> Any:
                async with await AsyncTransport.connect("localhost", port, tls=tls.get("client")) as transport:
                    return await ours(transport)

            mine = asyncio.run(main())
    return [mine, *results]


# Equal skins.


def test_transports_offer_the_same() -> None:
    names = {"sent", "received", "send", "receive", "readinto", "run", "close"}  # and `peer_name`, of each
    for kind in (TcpTransport, AsyncTransport, MemoryTransport):
        assert names <= {*dir(kind)}, kind
        for name in ("run", "readinto"):
            ours, blocking = getattr(kind, name), getattr(TcpTransport, name)
            assert [*inspect.signature(ours).parameters] == [*inspect.signature(blocking).parameters]


def test_listeners_offer_the_same() -> None:
    shared = {"host", "port", "tls", "plaintext", "timeout", "min_rate"}
    options = {kind: {*inspect.signature(kind).parameters} for kind in (TcpListener, AsyncListener)}
    assert options[TcpListener] == shared
    assert options[AsyncListener] == shared | {"serve", "connections", "on_error"}
    with TcpListener("localhost") as listener:
        assert listener.host == "localhost" and listener.port


def test_a_blocking_listener_passes_its_pace_on() -> None:
    with TcpListener(min_rate=123.0, timeout=5) as listener, TcpTransport.connect("127.0.0.1", listener.port):
        with listener.accept() as transport:
            assert transport.driver._pace._min_rate == 123.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_sent_and_every_byte_is_counted(kind: str, tmp_path: Path) -> None:
    def receive(transport: Any) -> Any:
        transport.run(greet("there"), within=PATIENCE)
        received = transport.run(receive_stream(lambda offer: Recording(tmp_path / offer.name, offer.transfer)))
        return received, transport.sent, transport.received, transport.peer_name

    def send(transport: Any) -> Any:
        peer = transport.run(greet("here"), within=PATIENCE)
        receipt = transport.run(send_stream(Offer(b"t", "m.tw"), Regenerated(lambda: [STREAM])))
        return peer.software, receipt, transport.sent, transport.received, transport.peer_name

    async def send_async(transport: AsyncTransport) -> Any:
        peer = await transport.run(greet("here"), within=PATIENCE)
        receipt = await transport.run(send_stream(Offer(b"t", "m.tw"), Regenerated(lambda: [STREAM])))
        return peer.software, receipt, transport.sent, transport.received, transport.peer_name

    with nothing_left(tmp_path):
        ours, theirs = converse(kind, send_async if kind == "asyncio" else send, receive)
    software, receipt, sent, received, name = ours
    (offer, outcome, acknowledged), their_sent, their_received, their_name = theirs
    assert software == "there" and receipt.digest == outcome.digest == DIGEST and acknowledged
    assert (offer.name, isinstance(outcome, Outcome)) == ("m.tw", True)
    assert (sent, received) == (their_received, their_sent) and sent > len(STREAM) > received > 0
    assert (name, their_name) == (None, None)
    assert (tmp_path / "m.tw").read_bytes() == STREAM


def test_both_kinds_know_their_peer_by_its_certificate(certificates: Certificates) -> None:
    tls = {
        "server": server_tls(*certificates.server, ca=certificates.ca),
        "client": client_tls(ca=certificates.ca, certificate=certificates.client[0], key=certificates.client[1]),
    }

    def theirs(transport: TcpTransport) -> tuple[str | None, frozenset[str] | None]:
        transport.run(hear())
        return transport.peer_name, transport.peer_names

    async def ours(transport: AsyncTransport) -> frozenset[str] | None:
        await transport.run(say({}))
        return transport.peer_names

    me = "me", frozenset({"me", "me@example"})
    assert converse("blocking", lambda transport: transport.run(say({})), theirs, **tls)[1] == me
    assert converse("asyncio", ours, theirs, **tls) == [frozenset({"localhost"}), me]
    del tls["client"]
    tls["server"] = server_tls(*certificates.server)  # asks for no certificate
    tls["client"] = client_tls(ca=certificates.ca)
    assert converse("asyncio", ours, theirs, **tls)[1] == (None, None)


NAMES: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set()),
    ({"subject": ((("organizationName", "Partner 7"),),)}, set()),
    ({"subject": ((("commonName", ""),),)}, set()),
    ({"subject": ((("commonName", "a"), ("commonName", "b")),)}, {"a", "b"}),
    ({"subject": ((("commonName", "a"),),), "subjectAltName": (("DNS", "b.example"),)}, {"a", "b.example"}),
    (
        {"subjectAltName": (("DNS", "*.example"), ("URI", "spiffe://org/7"), ("email", "c@d"))},
        {"spiffe://org/7", "c@d"},
    ),
    ({"subjectAltName": (("IP Address", "127.0.0.1"), ("DirName", "x"), ("Registered ID", "1.2"))}, set()),
]


@pytest.mark.parametrize(("certificate", "names"), NAMES)
def test_certificates_decide_which_client_may_speak(certificate: dict[str, Any], names: set[str]) -> None:
    """A certificate without names is nobody's; where none is asked for, a peer may be anybody."""
    claims = ["a", "b", "A", "", "x.example", "b.example", "spiffe://x/7", "c@d", "127.0.0.1", "None", "Partner 7"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for mode in (ssl.CERT_REQUIRED, ssl.CERT_OPTIONAL):
        context.verify_mode = mode
        found = peer_names(context, certificate)
        assert {claim for claim in claims if speaks_for(found, claim)} == names & {*claims}
    context.verify_mode = ssl.CERT_NONE
    assert all(speaks_for(peer_names(context, None), claim) for claim in claims)
    assert all(speaks_for(None, claim) for claim in claims)


# In memory.


def test_a_refusal_in_memory_reaches_the_sender(tmp_path: Path) -> None:
    def check(item: Any) -> None:
        if item.name == "b":
            raise SchemaError("not b", item="b")

    def receive(transport: MemoryTransport) -> Any:
        with pytest.raises(SchemaError):
            transport.run(receive_stream(lambda offer: Recording(tmp_path / "m", b"t", check=lambda: check)))
        transport.close()

    def send(transport: MemoryTransport) -> Any:
        with pytest.raises(RefusedError, match="not b") as caught:
            transport.run(send_stream(Offer(b"t"), Regenerated(lambda: tensorwire.encode(MODEL))))
        return caught.value.kind

    with nothing_left(tmp_path):
        assert converse("memory", send, receive)[0] == "schema"


def test_memory_transports_notice_silent_deaf_and_gone_peers() -> None:
    left, right = MemoryTransport.pair(timeout=0.05)
    with pytest.raises(TransportError, match="receiving: timed out"):
        left.readinto(memoryview(bytearray(1)))
    with pytest.raises(TransportError, match="sending: timed out"):
        left.send([b"x" * (1 << 20)] * 100)
    with pytest.raises(TransportError, match="longer than it is allowed|timed out"):
        left.run(hear(), within=0.01)
    right.close()
    with pytest.raises(TransportError, match="peer has closed"):
        left.send([b"x"])
    assert left.readinto(memoryview(bytearray(1))) == 0
    left.close()
    with pytest.raises(TransportError, match="closed"):
        left.send([b"x"])


def test_memory_transports_do_not_copy_buffers() -> None:
    left, right = MemoryTransport.pair()
    data = bytearray(b"before")
    left.send([data])
    data[:] = b"after!"
    got = bytearray(10)
    assert right.readinto(memoryview(got)[:2]) == 2 and right.readinto(memoryview(got)[2:]) == 4
    assert got[:6] == b"after!"


# A producer that pauses. The receiver answers each layer before the producer goes on to the next: who holds one back
# waits for ever.

LAYERS = [b"small", b"x" * 100_000, b"y" * (3 << 20), b"", b"z" * 17]


class Answers:
    """The layers that the receiver has said it has."""

    def __init__(self) -> None:
        self._come: queue.Queue[int] = queue.Queue()

    def receive(self, transport: Any) -> None:
        for number, layer in enumerate(LAYERS):
            view = memoryview(bytearray(8 + len(layer)))
            done = 0
            while done < len(view):
                done += transport.readinto(view[done:])
            assert bytes(view) == number.to_bytes(8, "little") + layer
            self._come.put(number)

    def wait_for(self, number: int) -> None:
        assert self._come.get(timeout=PATIENCE) == number


def layers(answers: Answers) -> Iterator[bytes]:
    """Each layer in two buffers, as a header and its payload, and an empty one: the next takes its time."""
    for number, layer in enumerate(LAYERS):
        yield number.to_bytes(8, "little")
        if layer:
            yield layer
        yield b""
        answers.wait_for(number)


async def layers_async(answers: Answers) -> AsyncIterator[bytes]:
    """The same, without the empty buffer: that it waits is seen."""
    for number, layer in enumerate(LAYERS):
        yield number.to_bytes(8, "little")
        if layer:
            yield layer
        await asyncio.to_thread(answers.wait_for, number)


SIZE = sum(8 + len(layer) for layer in LAYERS)


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("kind", [*KINDS, "asyncio, async iterable"])
def test_a_layer_is_sent_before_the_next_is_made(kind: str, secure: bool, request: pytest.FixtureRequest) -> None:
    if kind == "memory" and secure:
        pytest.skip("nobody listens in between")
    tls: dict[str, ssl.SSLContext] = {}
    if secure:
        certificates = request.getfixturevalue("certificates")
        tls = {"server": server_tls(*certificates.server), "client": client_tls(ca=certificates.ca)}
    answers = Answers()

    async def send_async(transport: AsyncTransport) -> int:
        return await transport.send(layers_async(answers) if "iterable" in kind else layers(answers))

    ours = send_async if "asyncio" in kind else lambda transport: transport.send(layers(answers))
    with nothing_left():
        assert converse(kind.partition(",")[0], ours, answers.receive, **tls) == [SIZE, None]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_sent_before_the_next_in_a_session(kind: str) -> None:
    """Of a stream that is made anew for its receiver, an empty buffer gets to the transport as well."""
    answers = Answers()
    outgoing = Regenerated(lambda: layers(answers))

    def conversation() -> Any:
        from tensorwire.transfer import Send

        return (yield Send(outgoing.after(Position()), alert=True))

    async def run(transport: AsyncTransport) -> Any:
        return await transport.run(conversation())

    ours = run if kind == "asyncio" else lambda transport: transport.run(conversation())
    assert converse(kind, ours, answers.receive) == [SIZE, None]


def test_an_async_producer_that_fails_or_is_left_ends() -> None:
    ended: list[str] = []

    async def failing() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(0.01)
        raise CorruptError("the producer broke")

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"y"
                await asyncio.sleep(PATIENCE)
        finally:
            ended.append("yes")

    async def ours(transport: AsyncTransport) -> None:
        with pytest.raises(CorruptError):
            await transport.send(failing())
        sending = asyncio.ensure_future(transport.send(endless()))
        await asyncio.sleep(0.01)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending

    def theirs(transport: TcpTransport) -> bytes:
        view = memoryview(bytearray(10))
        done = 0
        while got := transport.readinto(view[done:]):
            done += got
        return bytes(view[:done])

    with nothing_left():
        assert converse("asyncio", ours, theirs)[1] == b"xy"
    assert ended == ["yes"]


# Gathering.


class Writes:
    """A wire that takes what it is given, `most` bytes at a time, and remembers how."""

    peer_name = peer_names = None

    def __init__(self, most: int = 1 << 40) -> None:
        self.early = Early()
        self.calls: list[list[int]] = []
        self.data = bytearray()
        self.says_something_after = 1 << 40
        self._most = most

    async def read(self, buffer: memoryview, patience: float | None) -> int:
        return 0

    async def write(self, views: list[memoryview], patience: float | None) -> int:
        assert all(views)
        self.calls.append([len(view) for view in views])
        taken = b"".join(views)[: self._most]
        self.data += taken
        return len(taken)

    async def flush(self, patience: float | None) -> None: ...

    async def heard(self) -> bool:
        return len(self.data) >= self.says_something_after

    async def work(self, work: Callable[[], Any], pause: float | None, pulse: Any) -> Any:
        return work()

    def close(self) -> None: ...

    async def wait_closed(self) -> None: ...


def written(buffers: list[Any], *, most: int = 1 << 40) -> list[list[int]]:
    wire = Writes(most)
    driver = Driver(wire, timeout=None, min_rate=0)
    assert completed(driver.send(buffers)) == driver.sent == sum(memoryview(buffer).nbytes for buffer in buffers)
    assert wire.data == b"".join(bytes(buffer) for buffer in buffers)
    return wire.calls


def test_small_buffers_are_sent_together() -> None:
    assert written([b"x" * 10] * 130) == [[10] * 64, [10] * 64, [10, 10]]
    assert written([b"h" * 48, bytes(1 << 20), b"h" * 48, bytes(5)]) == [[48, 1 << 20], [48, 5]]
    assert written([b"a", b"", b"b", b"", b""]) == [[1], [1]]
    assert written([]) == written([b""]) == []
    assert written([np.zeros((2, 3), np.int16), np.zeros((0, 3)), np.zeros(2, np.uint8)]) == [[12], [2]]


def test_a_partial_write_is_continued() -> None:
    assert written([b"abc", b"de", b"f"], most=2) == [[3, 2, 1], [1, 2, 1], [1, 1]]


def test_sending_stops_when_the_peer_sends_something() -> None:
    wire = Writes()
    wire.says_something_after = 2 << 20
    driver = Driver(wire, timeout=None, min_rate=0)
    made = []

    def producer() -> Iterator[bytes]:
        for number in range(100):
            made.append(number)
            yield bytes(1 << 20)

    assert completed(driver.send(producer(), alert=True)) == driver.sent == 2 << 20
    assert made == [0, 1, 2]


def test_small_buffers_are_joined_and_large_ones_are_not() -> None:
    small, large = memoryview(b"s" * 100), memoryview(bytes(1 << 20))
    assert run_of([small, small, large]) == b"s" * 200
    assert run_of([large, small]) is large
    assert run_of([small, large]) is small


def test_early_bytes_are_read_first() -> None:
    early = Early()
    early += b"abc"
    buffer = bytearray(2)
    assert (early.take(memoryview(buffer)), buffer, bool(early)) == (2, b"ab", True)
    assert (early.take(memoryview(buffer)), buffer[:1], bool(early)) == (1, b"c", False)
    assert early.take(memoryview(buffer)) == 0


def test_a_blocking_transport_refuses_awaitables() -> None:
    async def waits() -> AsyncIterator[bytes]:
        await asyncio.sleep(0)
        yield b""

    left, _ = MemoryTransport.pair()
    with pytest.raises(RuntimeError, match="use the asyncio one"):
        left.send(waits())  # type: ignore[arg-type]


# Trying again.


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_pauses_grow_and_restart_with_progress() -> None:
    clock = Clock()
    backoff = Backoff(patience=1000, first=0.1, longest=1.0, clock=clock)
    for _ in range(2):
        for most in (0.1, 0.2, 0.4, 0.8, 1.0, 1.0):
            assert most / 2 <= backoff.after(TransportError("x")) <= most
        backoff.reset()
    assert len({backoff.after(TransportError("x")) for _ in range(20)}) > 10  # by chance


def test_patience_counts_from_the_first_failure_since_the_last_progress() -> None:
    clock = Clock()
    backoff = Backoff(patience=10, clock=clock)
    for _ in range(2):
        clock.now += 1e6  # training, or sending, for as long as it takes
        backoff.after(TransportError("x"))
        clock.now += 9
        backoff.after(TransportError("x"))
        backoff.reset()
    clock.now += 9
    backoff.after(TransportError("x"))
    clock.now += 11
    with pytest.raises(CorruptError, match="the last"):
        backoff.after(CorruptError("the last"))


class Line:
    """A connection on which so many bytes leave before it breaks, and time passes. The receiver keeps none of them."""

    def __init__(self, clock: Clock, leave: int, seconds: float) -> None:
        self._clock, self._leave, self._seconds = clock, leave, seconds

    async def converse(self, conversation: Any, *, within: float | None = None) -> Any:
        if within is not None:  # the greeting
            conversation.close()
            return None
        next(conversation)
        message = wire_message("have", {"frames": 0, "offset": 0, "link": 0})
        step = conversation.send(0)
        while isinstance(step, Fill):
            size = len(step.buffer)
            step.buffer[:], message = message[:size], message[size:]
            step = conversation.send(size)
        left = self._leave
        for buffer in step.buffers:
            left -= memoryview(buffer).nbytes
            if left <= 0:
                break
        self._clock.now += self._seconds
        with suppress(StopIteration):
            step = conversation.throw(TransportError("broken"))  # it asks for last words
        raise TransportError("broken")

    async def hang_up(self) -> None: ...


def wire_message(kind: str, fields: dict[str, int]) -> bytes:
    body = pack_value([kind, fields], tensorwire.Limits())
    return b"\x93TWM" + len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(("leave", "attempts"), [([10_000] * 9, 3), ([n * 50_000 for n in range(1, 10)], 9)])
def test_every_byte_of_progress_counts(leave: list[int], attempts: int) -> None:
    """Attempts of 60 s with a patience of 100 s: each comes farther than the one before it, or none does."""
    clock = Clock()
    made: list[Line] = []

    async def connect() -> Line:
        if len(made) == len(leave):
            raise TransportError("the end", retryable=False)
        made.append(Line(clock, leave[len(made)], 60))
        return made[-1]

    async def pause(seconds: float) -> None:
        clock.now += seconds

    sending = send_over(
        connect,
        pause,
        Offer(b"t"),
        Regenerated(lambda: tensorwire.encode(MODEL, frame_size=4096)),
        patience=100,
        greeting=10,
        check_peer=lambda peer: None,
        on_retry=lambda error, seconds: None,
        clock=clock,
    )
    with pytest.raises(TransportError):
        completed(sending)
    assert len(made) == attempts


def test_permanent_errors_are_not_retried() -> None:
    backoff = Backoff(patience=10)
    with pytest.raises(TransportError, match="no use"):
        backoff.after(TransportError("no use", retryable=False))


class Flaky:
    """Ends of pipes whose other end a thread serves; the first ones break once so many bytes have come."""

    def __init__(self, folder: Path, breaks_after: list[int]) -> None:
        self.folder = folder
        self.breaks_after = breaks_after
        self.threads: list[threading.Thread] = []

    def connect(self) -> MemoryTransport:
        ours, theirs = MemoryTransport.pair()
        after = self.breaks_after.pop(0) if self.breaks_after else 1 << 40
        self.threads.append(threading.Thread(target=self._serve, args=(theirs, after)))
        self.threads[-1].start()
        return ours

    def _serve(self, transport: MemoryTransport, breaks_after: int) -> None:
        def open_destination(offer: Offer) -> Recording:
            until(lambda: sum(thread.is_alive() for thread in self.threads) == 1)  # the last one has let go
            return Breaking(self.folder / "m.tw", offer.transfer)

        class Breaking(Recording):
            def buffer_updated(self, size: int) -> None:
                super().buffer_updated(size)
                if transport.received > breaks_after:
                    raise TransportError("broken off")

        with transport:
            try:
                transport.run(greet())
                transport.run(receive_stream(open_destination))
            except (TransportError, TruncatedError):
                pass


class Noting(Regenerated):
    """MODEL, which notes from where on it is asked for."""

    def __init__(self, offsets: list[int]) -> None:
        super().__init__(lambda: tensorwire.encode(MODEL, frame_size=4096))
        self._offsets = offsets

    def after(self, position: Position) -> Iterator[Any]:
        self._offsets.append(position.offset)
        return super().after(position)


def sent_through(flaky: Flaky, outgoing: Noting) -> Receipt:
    receipt = send_resuming(flaky.connect, Offer(b"t"), outgoing)
    for thread in flaky.threads:
        thread.join(PATIENCE)
    return receipt


def test_a_whole_transfer_with_breaks_in_memory(tmp_path: Path) -> None:
    flaky = Flaky(tmp_path, [200_000, 400_000, 0])
    sent: list[int] = []

    outgoing = Noting(sent)
    with nothing_left(tmp_path):
        receipt = sent_through(flaky, outgoing)
    assert receipt.digest == outgoing.digest and (tmp_path / "m.tw").read_bytes()[-32:].hex() == receipt.digest
    assert len(flaky.threads) == 4 and sent == sorted(sent) and 150_000 < sent[1] <= 200_000 < sent[-1]


def test_the_beginning_of_another_stream_is_dropped_once(tmp_path: Path) -> None:
    """Two sources of one name: the second is sent although half of the first is there, over breaks too."""
    other = b"".join(tensorwire.encode({"other": np.ones(200_000, np.float32)}, frame_size=4096))
    place = Recording(tmp_path / "m.tw", b"t")
    with pytest.raises(TruncatedError):
        list(pull(place, as_source(other[:700_000])))
    held = place.position.offset
    place.close()
    flaky = Flaky(tmp_path, [1 << 40, 200_000])
    offsets: list[int] = []

    outgoing = Noting(offsets)
    with nothing_left(tmp_path):
        receipt = sent_through(flaky, outgoing)
    assert (tmp_path / "m.tw").read_bytes()[-32:].hex() == receipt.digest == outgoing.digest
    assert offsets[:2] == [held, 0] and held > 100_000
    assert len(offsets) == 3 and 150_000 < offsets[2] <= 200_000, "begun anew once, then taken up"


def test_a_transfer_resumes_under_asyncio(tmp_path: Path) -> None:
    """The listener's first two connections break off in mid-stream."""
    tries = 0

    async def serve(transport: AsyncTransport) -> None:
        nonlocal tries
        tries += 1
        await transport.run(greet())
        await transport.run(receive_stream(lambda offer: Broken(tmp_path / "m", offer.transfer)))

    class Broken(Recording):
        def buffer_updated(self, size: int) -> None:
            super().buffer_updated(size)
            if tries < 3 and self.position.offset > tries * 100_000:
                raise TransportError("broken off")

    outgoing = Regenerated(lambda: tensorwire.encode(MODEL, frame_size=4096))
    with nothing_left(tmp_path), Server(serve) as server:
        connect = lambda: AsyncTransport.connect("127.0.0.1", server.port)  # noqa: E731
        receipt = asyncio.run(send_resuming_async(connect, Offer(b"t"), outgoing))
    assert tries == 3 and 0 < receipt.sent < receipt.size - 100_000
    assert (tmp_path / "m").read_bytes()[-32:].hex() == receipt.digest


def test_permanent_errors_are_raised_at_once_under_asyncio() -> None:
    async def serve(transport: AsyncTransport) -> None:
        await transport.run(greet())

    def unwanted(peer: Any) -> None:
        raise SchemaError("not this peer")

    with nothing_left(), Server(serve) as server:
        connect = lambda: AsyncTransport.connect("127.0.0.1", server.port)  # noqa: E731
        with pytest.raises(SchemaError, match="not this peer"):
            asyncio.run(send_resuming_async(connect, Offer(b"t"), Regenerated(list), check_peer=unwanted))


def test_a_waiting_peer_is_not_idle() -> None:
    """`wait` between two ends in memory, as over any other transport."""
    left, right = MemoryTransport.pair()

    def answer() -> None:
        for _ in range(3):
            time.sleep(0.01)
            right.run(wait())
        right.run(say({"n": 1}))

    thread = threading.Thread(target=answer)
    thread.start()
    assert left.run(hear()) == {"n": 1}
    thread.join(PATIENCE)
