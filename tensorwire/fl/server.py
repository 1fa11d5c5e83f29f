"""The server of the loop: it hands out the model, takes updates in, and closes rounds.

In a round it encodes the model once and sends that to whoever asks. An update that was received whole, checked and
synced counts, and its sender gets a receipt after that. Closing the round, the server writes down whose updates count,
and then the next model. `Store` keeps all of it, so that a server that was killed at any point goes on from there with
the same updates and so, bit for bit, with the same model. Memory: the model and a few slices, however many the clients.
"""

import asyncio
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final

import tensorwire
from tensorwire import Schema
from tensorwire.errors import CorruptError, SchemaError, WireError
from tensorwire.fl.plan import Order, Plan
from tensorwire.fl.store import Store
from tensorwire.limits import DEFAULT, Limits
from tensorwire.storage import rename, write_file
from tensorwire.transfer import (
    Offer,
    Recorded,
    Recording,
    RefusedError,
    greet,
    hear,
    receive_stream,
    refuse,
    say,
    send_stream,
    wait,
)
from tensorwire.transports import HANDSHAKE, AsyncTransport, speaks_for
from tensorwire.updates import Rules, Terms, Update, UpdateError, Verdict, average, check_update, encode, views

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")  # it becomes part of a file's name
_POLL: Final = 10.0  # seconds that a client with nothing to do is kept at most, before it asks again
_UPLOADS: Final = 2  # that are received and checked at a time, so that memory does not grow with the clients
_MOST_CORRUPT: Final = 3  # broken uploads of one client in a round before it is out of it


class Server:
    """One run. Hand `serve` to an `AsyncListener` and await `run`.

    `initial`: gives the model to start from where `folder` has none of this run yet; its tensors are written to.
    `on_round`: called with a row of figures after each round. `validate`: as in `tensorwire.updates.Rules`.
    """

    def __init__(
        self,
        plan: Plan,
        initial: Callable[[], Mapping[str, Any]],
        folder: str | os.PathLike[str],
        *,
        on_round: Callable[[dict[str, Any]], None] = lambda row: None,
        validate: Callable[[Update, Schema], Verdict] | None = None,
        limits: Limits = DEFAULT,
    ) -> None:
        self.plan = plan
        self.rules = Rules(plan.max_weight, plan.max_norm, plan.on_norm, validate, limits)
        self._on_round = on_round
        self._store = Store(folder, plan.name)
        self.round, self.model = self._store.load(initial)
        self.schema = tensorwire.schema(self.model)
        self._lock = threading.Lock()  # uploads are checked in threads
        self._accepted: dict[str, Update] = {}
        self._corrupt: dict[str, int] = {}
        self._out: set[str] = set()  # may deliver no more in this round
        self._members: set[str] = set()
        self._told: set[str] = set()  # have heard that the run is over
        self._open = False
        self._traffic = {"down": 0, "up": 0}
        self._changed = asyncio.Condition()
        self._slots = asyncio.Semaphore(_UPLOADS)

    async def run(self) -> None:
        """All rounds that are still to come. Sets the event loop's executor: each thread of one keeps memory."""
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_UPLOADS))
        while self.round < self.plan.rounds:
            began = time.monotonic()
            await asyncio.to_thread(self._begin_round)
            await self._tell()
            await self._until_enough(began)
            await asyncio.to_thread(self._end_round, began)
        await self._tell()

    async def all_told(self) -> None:
        """Wait until every client has heard that the run is over."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._told >= self._members)

    async def serve(self, transport: AsyncTransport) -> None:
        """One connection, for as long as it lasts."""
        await transport.run(greet("tensorwire.fl"), within=HANDSHAKE)
        while True:
            request = await transport.run(hear(patient=False))
            try:
                client = self._admitted(request.get("client"), transport)
            except SchemaError as error:
                await transport.run(refuse(error))
                raise
            want = request.get("want")
            if want == "task":
                task = await self._task(client, request.get("hold"))
                await transport.run(say(task))
                if task["task"] == "stop":
                    self._told.add(client)
                    await self._tell()
            elif want == "model":
                await self._send_model(transport)
            elif want == "deliver":
                await self._receive_update(client, transport)
            else:
                raise SchemaError("a request must want a task, the model, or to deliver")

    def _admitted(self, client: object, transport: AsyncTransport) -> str:
        """The name of a client that may take part.

        A run has as many members as its plan says, and with mutual TLS a client is who its certificate says.
        """
        if not isinstance(client, str) or not _NAME.fullmatch(client):
            raise SchemaError("a request must name its client in 1 to 64 characters of A-Z, a-z, 0-9, '_' and '-'")
        if not speaks_for(transport.peer_names, client):
            raise SchemaError(f"the certificate of {transport.peer_name!r} does not speak for {client!r}")
        with self._lock:
            if client not in self._members and len(self._members) >= self.plan.clients:
                raise SchemaError(f"the run has its {self.plan.clients} clients")
            self._members.add(client)
        return client

    async def _task(self, client: str, hold: Any) -> dict[str, Any]:
        """What a client is to do now. One that has delivered waits here for the next round, `hold` seconds at most."""
        hold = min(hold, _POLL) if type(hold) in (int, float) and hold >= 0 else 0
        with suppress(asyncio.TimeoutError):
            async with self._changed:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._wanted(client) != "wait"), hold)
        task = self._wanted(client)
        if task != "train":
            return {"task": task}
        order = Order.of(self.plan, self.round, self._store.broadcast_digest(self.round))
        return {"task": task, **order.message()}

    def _wanted(self, client: str) -> str:
        if self.round >= self.plan.rounds:
            return "stop"
        return "train" if self._open and client not in self._accepted and client not in self._out else "wait"

    async def _send_model(self, transport: AsyncTransport) -> None:
        path, before = self._store.broadcast(self.round), transport.sent
        offer = Offer(f"{self.plan.name}/{self.round}".encode(), "model", os.path.getsize(path))  # noqa: ASYNC240 - one call to the system
        try:
            await transport.run(send_stream(offer, Recorded(path)))
        finally:
            self._traffic["down"] += transport.sent - before

    async def _receive_update(self, client: str, transport: AsyncTransport) -> None:
        before = transport.received
        try:
            async with self._upload_slot(transport):
                await transport.run(receive_stream(partial(self._open_upload, client)))
        except CorruptError:
            self._corrupt[client] = self._corrupt.get(client, 0) + 1
            if self._corrupt[client] > _MOST_CORRUPT:
                self._out.add(client)
            raise
        finally:
            self._traffic["up"] += transport.received - before
        await self._tell()

    @asynccontextmanager
    async def _upload_slot(self, transport: AsyncTransport) -> AsyncIterator[None]:
        """A turn to be received and checked, which takes some frames of memory; the client is told to wait for it."""
        turn = asyncio.ensure_future(self._slots.acquire())
        try:
            while not (await asyncio.wait([turn], timeout=_POLL))[0]:
                await transport.run(wait())
            yield
        finally:
            if not turn.cancel():
                self._slots.release()

    def _open_upload(self, client: str, offer: Offer) -> "_Upload":
        """Where an update goes. Raises RefusedError for one that could not count anyway."""
        number = offer.about.get("round")
        with self._lock:
            if not self._open or number != self.round:
                raise RefusedError(f"round {number!r:.40} is not open; the run is in round {self.round}", kind="stale")
            if offer.transfer != self._store.broadcast_digest(number).encode():
                raise RefusedError("the update is based on another model than this round's", kind="stale")
            if client in self._out:
                raise RefusedError("no more updates of this client are taken in this round", kind="out")
            return _Upload(self, client, self._store.update(self.round, client), offer.transfer)

    def _accept(self, update: Update, part: str, path: str, number: int) -> None:
        """Let an update count, unless its round has been closed meanwhile."""
        with self._lock:
            if not self._open or number != self.round:
                raise RefusedError(f"round {number} has been closed", kind="stale")
            rename(part, path)
            self._accepted[update.client] = replace(update, recording=path)

    def check(self, client: str, path: str) -> Update:
        """The update in a recording. Raises UpdateError or a WireError for what must not count."""
        base = self._store.broadcast_digest(self.round)
        expected = Terms(self.plan.name, self.round, base, client)
        with open(path, "rb", buffering=0) as file:
            return check_update(file, self.model, expected, self.rules, recording=path)

    def _begin_round(self) -> None:
        store, number = self._store, self.round
        if not os.path.exists(store.broadcast(number)):
            terms = Terms(self.plan.name, number)
            write_file(store.broadcast(number), encode(views(self.model), terms, codec=self.plan.down))
        self._accepted = {}
        for client in store.delivered(number):  # before this server was started again
            path = store.update(number, client)
            try:
                self._accepted[client] = self.check(client, path)
            except (WireError, UpdateError):  # damaged, or the rules have changed; its sender may come again
                os.unlink(path)
            self._members.add(client)
        self._corrupt, self._out = {}, set()
        self._traffic = {"down": 0, "up": 0}
        self._open = store.closed(number) is None

    async def _until_enough(self, began: float) -> None:
        quorum = self.plan.quorum or self.plan.clients
        async with self._changed:
            while self._open and len(self._accepted) < self.plan.clients:
                left = began + self.plan.deadline - time.monotonic()
                if left <= 0 and len(self._accepted) >= quorum:
                    break
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), left if left > 0 else None)

    def _end_round(self, began: float) -> None:
        store, number = self._store, self.round
        with self._lock:
            self._open = False
            survivors = store.closed(number)
        if survivors is None:
            survivors = sorted(self._accepted)
            store.close(number, survivors)
        updates = [self._accepted[client] for client in survivors]
        average(updates, into=self.model, limits=self.rules.limits)
        store.save(number + 1, self.model)
        self.round += 1
        row = {"round": number, "seconds": time.monotonic() - began, **self._traffic}
        clients = {u.client: {"weight": u.terms.weight, "norm": u.norm, **u.terms.metrics} for u in updates}
        self._on_round({**row, "clients": clients})

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class _Upload(Recording):
    """An update on its way in. It takes its name, and counts, once it has been checked."""

    def __init__(self, server: Server, client: str, path: str, transfer: bytes) -> None:
        self._server = server
        self._client = client
        self._round = server.round
        super().__init__(
            path,
            transfer,
            check=lambda: tensorwire.schema(server.schema).check,
            finish=self._check_and_accept,
            limits=server.rules.limits,
        )

    def forget(self) -> None:
        """The journal stays as long as the round, for a client that asks once more."""

    def _check_and_accept(self, part: str) -> None:
        try:
            update = self._server.check(self._client, part)
            self._server._accept(update, part, self.path, self._round)
        except UpdateError as error:
            self._server._out.add(self._client)
            self.discard()
            raise RefusedError(str(error), kind=error.reason) from error
        except RefusedError:
            self.discard()
            raise
