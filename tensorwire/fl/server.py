"""The server of the loop: it sends the model, receives updates, and closes rounds.

In each round it encodes the model once and sends it to every client that asks. An update counts once it is completely
received, checked and synced; only then does its sender get a receipt. To close a round, the server records which
updates count, and then writes the next model. `Store` keeps all of this on disk, so a server killed at any point
continues with the same updates and gets the same model, bit for bit. Memory: the model and a few slices, for any number
of clients.
"""

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final

from tensorwire import Schema
from tensorwire.errors import SchemaError, TensorwireError, TransportError, TruncatedError, WireError, show
from tensorwire.fl.averaging import Averaging
from tensorwire.fl.members import Member, Members
from tensorwire.fl.plan import Order, Plan
from tensorwire.fl.store import Store
from tensorwire.fl.versions import Versions
from tensorwire.limits import DEFAULT, Limits
from tensorwire.storage import rename
from tensorwire.transfer import (
    Offer,
    Position,
    Recorded,
    RefusedError,
    greet,
    hear,
    receive_stream,
    refuse,
    say,
    send_stream,
)
from tensorwire.transports import HANDSHAKE, AsyncTransport, Turns, speaks_for
from tensorwire.updates import (
    BoundedRecording,
    LeftOut,
    Terms,
    Update,
    UpdateError,
    Verdict,
    check_update,
    finite_metrics,
)

_HOLD: Final = 10.0  # seconds that a request for a task may wait for one, at most
_UPLOADS: Final = 2  # received and checked at a time, so that memory does not grow with the number of clients
_LINE: Final = 16  # clients that may wait for this on an open connection; others are told to try again
_MOST_CORRUPT: Final = 3  # broken uploads of one client that a round accepts before it excludes the client
_LAST_WORDS: Final = 10.0  # seconds in which clients can learn that the run is over
_ROWS: Final = 1000  # rows of past rounds kept for `status`


class Server:
    """One run. Hand `serve` to an `AsyncListener` and await `run`.

    `initial`: called for the initial model if `folder` has none yet; the tensors it returns are written to.
    `on_round`: called with a row of figures after each round. `on_note`: called with lines of text for the operator.
    `validate`: as in `tensorwire.updates.Rules`. `limits`: of the updates that are received, which the model itself
    bounds further, and of the files in `folder`.
    """

    def __init__(
        self,
        plan: Plan,
        initial: Callable[[], Mapping[str, Any]],
        folder: str | os.PathLike[str],
        *,
        on_round: Callable[[dict[str, Any]], None] = lambda row: None,
        on_note: Callable[[str], None] = lambda line: None,
        validate: Callable[[Update, Schema], Verdict] | None = None,
        limits: Limits = DEFAULT,
    ) -> None:
        self.plan = plan
        self._averaging = Averaging(plan, validate=validate, limits=limits)
        self.rules = self._averaging.rules
        self.members = Members(plan)
        self.rows: deque[dict[str, Any]] = deque(maxlen=_ROWS)
        self._on_round = on_round
        self._on_note = on_note
        self._store = Store(folder, plan.name, on_note, limits=limits)
        self._versions = Versions(folder, plan, on_note, limits=limits)
        self.round, self.model = self._store.load(initial)
        self._averaging.check(self.model)
        self._load_optimizer()
        self._lock = threading.Lock()  # uploads are checked in threads
        self._open = False
        self._transfers: dict[str, bytes] = {}  # the transfer key of each client's latest upload
        self._traffic = {"down": 0, "up": 0}
        self._changed = asyncio.Condition()
        self._turns = Turns(_UPLOADS, line=_LINE)

    @property
    def base(self) -> str:
        """The digest of the round's version of the model, in hexadecimal; "" before the first."""
        return self._versions.base

    async def run(self) -> None:
        """Run the remaining rounds, then wait until every client present has been told that the run is over.

        The wait takes a few seconds at most. The event loop's default executor is replaced by one with few threads,
        because each thread holds memory.
        """
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_UPLOADS))
        while self.round < self.plan.rounds:
            began = time.monotonic()
            await asyncio.to_thread(self._begin_round)
            await self._tell()
            ended = await self._until_over()
            await asyncio.to_thread(self._end_round, began, ended)
        await self._tell()
        with suppress(asyncio.TimeoutError):  # an absent client cannot be told
            await asyncio.wait_for(self.all_told(), _LAST_WORDS)

    async def all_told(self) -> None:
        """Wait until every client present has been told that the run is over."""
        async with self._changed:
            await self._changed.wait_for(self.members.all_told)

    async def serve(self, transport: AsyncTransport) -> None:
        """Serve one connection until it closes."""
        await transport.run(greet("tensorwire.fl"), within=HANDSHAKE)
        while True:
            request = await transport.run(hear(patient=False))
            try:
                member = self._admitted(request.get("client"), transport)
            except SchemaError as error:
                await transport.run(refuse(error))
                raise
            await self._tell()  # the round's time may have begun
            want = request.get("want")
            if want == "task":
                task = await self._task(member, request.get("hold"))
                await transport.run(say(task))
                if task["task"] == "stop":
                    self.members.told.add(member.name)
            elif want == "model":
                await self._send_model(member, request, transport)
            elif want == "deliver":
                await self._receive_update(member, transport)
            elif want in ("pass", "leave"):
                self._nothing_from(member, request, gone=want == "leave")
                await transport.run(say({}))
            else:
                raise SchemaError(
                    f"a request must want 'task', 'model', 'deliver', 'pass' or 'leave', not {show(want)}"
                )
            await self._tell()

    def status(self) -> dict[str, Any]:
        """The status of the run: its round, a row for each member, and the rows of the last rounds."""
        with self._lock:
            about = {"run": self.plan.name, "round": self.round, "rounds": self.plan.rounds}
            return {**about, "clients": self.members.status(), "rows": list(self.rows)}

    def _admitted(self, client: object, transport: AsyncTransport) -> Member:
        """The member with this name, if it may take part. With mutual TLS, the certificate must carry the name."""
        if not isinstance(client, str):
            raise SchemaError("a request must name its client")
        if not speaks_for(transport.peer_names, client):
            raise SchemaError(f"the certificate of {transport.peer_name!r} is not valid for client {show(client)}")
        with self._lock:
            return self.members.heard(client)

    async def _task(self, member: Member, hold: Any) -> dict[str, Any]:
        """What a client is to do now. `hold`: how many seconds the client is willing to wait here for a task."""
        hold = min(hold, _HOLD) if type(hold) in (int, float) and hold >= 0 else 0
        with suppress(asyncio.TimeoutError):
            async with self._changed:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._wanted(member) != "wait"), hold)
        task = self._wanted(member)
        if task != "train":
            return {"task": task, "seconds": self.members.pause()}
        return {"task": task, **Order.of(self.plan, self.round, self.base).message()}

    def _wanted(self, member: Member) -> str:
        if self.round >= self.plan.rounds:
            return "stop"
        return "train" if self._open and self.members.wanted(member.name) else "wait"

    def _nothing_from(self, member: Member, request: Mapping[str, Any], *, gone: bool) -> None:
        why = ascii(request.get("why", ""))[1:-1]
        with self._lock:
            if gone or (self._open and request.get("round") == self.round):
                self.members.nothing_from(member.name, why or "it gave no reason", gone=gone)

    async def _send_model(self, member: Member, request: Mapping[str, Any], transport: AsyncTransport) -> None:
        """Send the step that leads on from the version that the client holds, or a whole version."""
        if not self.base or request.get("base", self.base) != self.base:
            stale = RefusedError(f"the run is in round {self.round}: ask for its task", kind="stale", retryable=True)
            await transport.run(refuse(stale))
            return
        way, before = self._versions.way(request.get("held"))[0], transport.sent
        model = _Model(way.path)
        try:
            await transport.run(send_stream(Offer(model.digest.encode(), way.kind, way.size), model))
        finally:
            member.down += transport.sent - before
            self._traffic["down"] += transport.sent - before

    async def _receive_update(self, member: Member, transport: AsyncTransport) -> None:
        before, receiving = transport.received, receive_stream(partial(self._open_upload, member))
        try:
            await self._turns.take(transport, receiving, is_working=lambda: member.working)
        except WireError as error:
            member.corrupt += not isinstance(error, (TruncatedError, SchemaError))
            if member.corrupt > _MOST_CORRUPT:
                self.refuse(member, error)
            raise
        finally:
            member.up += transport.received - before
            self._traffic["up"] += transport.received - before
            await self._tell()

    def refuse(self, member: Member, error: TensorwireError) -> None:
        """Accept no more updates from this client in this round."""
        with self._lock:
            member.refused += 1
            self.members.nothing_from(member.name, f"refused: {error}")

    @contextmanager
    def working(self, member: Member) -> Iterator[None]:
        """Mark a client's update as being verified or checked: meanwhile no bytes are expected from the client."""
        member.working = True
        try:
            yield
        finally:
            member.working = False

    def _open_upload(self, member: Member, offer: Offer) -> "_Upload":
        """The recording for an update. Raises RefusedError for an update that could not count."""
        number, name = offer.about.get("round"), member.name
        with self._lock:
            if not self._open or number != self.round:
                raise RefusedError(f"round {number!r:.40} is not open; the run is in round {self.round}", kind="stale")
            if offer.transfer[:32] != self.base[:32].encode():
                raise RefusedError("the update is not based on the model of this round", kind="stale")
            if member.why:
                raise RefusedError("no more updates from this client are accepted in this round", kind="out")
            if not member.asked:
                raise RefusedError("this client is not asked to train in this round", kind="out")
            counts = member.update is not None
            if self._transfers.setdefault(name, offer.transfer) != offer.transfer:  # it will not finish the old upload
                self._store.drop(self.round, name, parts_only=True)
                self._transfers[name] = offer.transfer
        with self.working(member):
            upload = _Upload(self, member, self._store.update(self.round, name), offer.transfer)
        if counts and upload.outcome is None:
            upload.discard()
            raise RefusedError("another update from this client has already been accepted", kind="another")
        return upload

    def accept(self, update: Update, part: str, path: str, number: int) -> None:
        """Accept an update, unless its round has closed in the meantime."""
        with self._lock:
            if not self._open or number != self.round:
                raise RefusedError(f"round {number} has been closed", kind="stale")
            rename(part, path)
            self.members.accept(replace(update, recording=path))

    def check(self, client: str, path: str) -> Update:
        """The update in a recording. Raises UpdateError or a WireError if it must not count."""
        expected = Terms(self.plan.name, self.round, self.base, client)
        with open(path, "rb", buffering=0) as file:
            return check_update(file, self.model, expected, self.rules, recording=path)

    def _begin_round(self) -> None:
        store, number = self._store, self.round
        store.begin(number)
        self._versions.begin(number, self.model)
        with self._lock:
            self.members.begin(number, store.read(number, "asked"))
            self._transfers, self._traffic = {}, {"down": 0, "up": 0}
        self._take_up(store.delivered(number))
        with self._lock:
            self._open = store.read(number, "closed") is None

    def _take_up(self, clients: list[str]) -> None:
        """Accept the valid updates on the disk. The senders of the others may send theirs again."""
        for client in clients:
            path = self._store.update(self.round, client)
            try:
                self.members.accept(self.check(client, path))
            except (TensorwireError, OSError) as error:  # damaged, or the rules have changed
                self._on_note(f"{path} does not count: {error}")
                self._store.drop(self.round, client)

    async def _until_over(self) -> str:
        """Wait for the end of the round. Returns why it is over."""
        async with self._changed:
            while self._open:
                if ended := self.members.ended():
                    return ended
                if self.members.to_draw():
                    self._store.write(self.round, "asked", self.members.draw())
                    self._changed.notify_all()
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), self.members.left())
            return "closed before the server was started again"

    def _end_round(self, began: float, ended: str) -> None:
        store, number = self._store, self.round
        with self._lock:
            self._open = False
            survivors = store.read(number, "closed")
            if survivors is None:
                survivors = sorted(self.members.accepted())
                store.write(number, "closed", survivors)
        updates, left_out = self._average(survivors)
        lost = {name: "its update was lost on the server's disk" for name in survivors if name not in updates}
        for client, reason in left_out:
            lost[client] = f"left out: {reason}"
            del updates[client]
        with self._lock:
            missing = {**self.members.close(), **lost}
        self._averaging.save(store.optimizer(number + 1))
        store.save(number + 1, self.model)
        self.round += 1
        clients = {
            name: {**finite_metrics(each.terms.metrics)[0], "weight": each.terms.weight, "norm": each.norm}
            for name, each in updates.items()
        }
        row = {"round": number, "seconds": time.monotonic() - began, **self._traffic, "clients": clients}
        row |= {"missing": missing, "ended": ended, "counted": len(updates) >= self.plan.quorum}
        with self._lock:
            self.rows.append(row)
        self._on_round(row)

    def _average(self, survivors: list[str]) -> tuple[dict[str, Update], list[LeftOut]]:
        """Make the next model. Returns the undamaged updates of `survivors`, and those of them that were left out.

        With fewer updates than the quorum the model stays as it is.
        """
        while True:
            accepted = self.members.accepted()
            updates = {name: accepted[name] for name in survivors if name in accepted}
            if len(updates) < self.plan.quorum:
                return updates, []
            try:
                return updates, self._averaging.average([*updates.values()], self.model)
            except (TensorwireError, OSError) as error:  # an update on the disk has changed since it was checked
                self._on_note(f"round {self.round} is averaged again: {error}")
                for name, array in self._store.model().items():
                    self.model[name][...] = array
                self._load_optimizer()
                for member in self.members.everyone():
                    member.update = None
                self._take_up([*updates])
                if self.members.accepted().keys() >= updates.keys():
                    raise  # none is damaged, so trying again cannot help

    def _load_optimizer(self) -> None:
        path = self._store.optimizer(self.round)
        try:
            self._averaging.load(path)
        except (TensorwireError, OSError) as error:
            self._on_note(f"the optimizer starts from scratch: {path}: {error}")

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class _Model(Recorded):
    """A version, or a step to one, that is being sent."""

    def after(self, position: Position) -> Iterator[Any]:
        """The buffers from `position` on. Raises TransportError if the round has ended."""
        try:
            yield from super().after(position)
        except FileNotFoundError:
            raise TransportError("the round has ended") from None


class _Upload(BoundedRecording):
    """An update that is being received. It gets its file name, and counts, once it has been checked."""

    def __init__(self, server: Server, member: Member, path: str, transfer: bytes) -> None:
        self._server = server
        self._member = member
        self._round = server.round
        super().__init__(path, transfer, server.model, finish=self._check_and_accept, limits=server.rules.limits)

    def forget(self) -> None:
        """Do nothing: the journal stays for the whole round, for a client that asks for its receipt again."""

    def steps(self) -> Generator[Any, None, None]:
        """As `Recording.steps`. A client whose tensors do not match the model's is refused in this round."""
        try:
            yield from super().steps()
        except SchemaError as error:
            self._server.refuse(self._member, error)
            raise

    def _check_and_accept(self, part: str) -> None:
        with self._server.working(self._member):
            try:
                update = self._server.check(self._member.name, part)
                self._server.accept(update, part, self.path, self._round)
            except (UpdateError, SchemaError) as error:
                self._server.refuse(self._member, error)
                self.discard()
                raise RefusedError(str(error), kind=getattr(error, "reason", "schema")) from error
            except RefusedError:
                self.discard()
                raise
