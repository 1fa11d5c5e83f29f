"""The server of the loop: hands out the model, takes updates in, closes rounds.

A round, seen from here:

    broadcast.tw      the model, encoded once, sent to whoever asks
    CLIENT.tw         an update that was received whole, checked, synced: it counts. Its sender gets a receipt after that
    closed.json       whose updates the round counts, written once
    model.tw          the next round's model; with it the round is over

All of it stands in one folder, each file under its name only when complete, so that a server that was killed at any
point goes on from there, with the same updates and so, bit for bit, with the same model. Memory: the model and a few
slices, for any number of clients.
"""

import asyncio
import json
import os
import re
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import numpy as np

import tensorwire
from tensorwire.errors import CorruptError, SchemaError, WireError
from tensorwire.fl.aggregate import Rules, Update, UpdateError, aggregate, check_update
from tensorwire.fl.updates import Kind, Terms, arrays, encode, views
from tensorwire.storage.atomic import write_file
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
from tensorwire.transports import HANDSHAKE, AsyncTransport

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")  # it becomes part of a file's name
_POLL: Final = 10.0  # seconds that a client with nothing to do is kept at most, before it asks again
_UPLOADS: Final = 2  # that are received and checked at a time, so that memory does not grow with the clients
_MOST_CORRUPT: Final = 3  # broken uploads of one client in a round before it is out of it


@dataclass(frozen=True)
class Plan:
    """What a run is. `down`, `up`: codec specs of broadcasts and updates. `kind`: whether clients send their weights or the
    difference to what they were sent. `feedback`: clients carry over what quantization dropped (differences only).
    `stochastic`: items under bf16 are rounded up or down at random.

    A round closes when `clients` updates are in, or, `deadline` seconds after it began, with at least `quorum` of them.
    """

    run: str
    rounds: int
    clients: int
    quorum: int | None = None
    deadline: float = 600.0
    down: str = "bf16"
    up: str = "nf4"
    kind: Kind = "difference"
    feedback: bool = False
    stochastic: bool = False
    rules: Rules = field(default_factory=Rules)


class Server:
    """One run. `initial` is taken where `folder` has no model of the run yet; its tensors are written to.

    Hand `serve` to an `AsyncListener` and await `run`. `on_round` is called with a row of figures after each.
    """

    def __init__(
        self,
        plan: Plan,
        initial: Callable[[], Mapping[str, Any]],
        folder: str | os.PathLike,
        *,
        on_round: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> None:
        self.plan = plan
        self._on_round = on_round
        self._store = _Store(folder, plan.run)
        self.round, self.model = self._store.load(initial)
        self.schema = tensorwire.schema(self.model)
        self._lock = threading.Lock()  # uploads are checked in threads
        self._accepted: dict[str, Update] = {}
        self._corrupt: dict[str, int] = {}
        self._out: set[str] = set()  # whose update of this round is not wanted any more
        self._members: set[str] = set()
        self._told: set[str] = set()  # that the run is over
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
            request = await transport.run(hear())
            client, want = request.get("client"), request.get("want")
            try:
                self._admit(client, transport)
            except SchemaError as error:
                await transport.run(refuse(error))
                raise
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
                raise SchemaError("a request for neither a task, the model, nor to deliver")

    def _admit(self, client: Any, transport: AsyncTransport) -> None:
        """A run has as many members as its plan says, and with mutual TLS a client is who its certificate says."""
        if type(client) is not str or not _NAME.fullmatch(client):
            raise SchemaError("a request without the name of a client: 1 to 64 of A-Z, a-z, 0-9, '_' and '-'")
        if transport.peer_name not in (None, client):
            raise SchemaError(f"the certificate of {transport.peer_name!r} does not speak for {client!r}")
        with self._lock:
            if client not in self._members and len(self._members) >= self.plan.clients:
                raise SchemaError(f"the run has its {self.plan.clients} clients")
            self._members.add(client)

    async def _task(self, client: str, hold: Any) -> dict[str, Any]:
        """What a client is to do now. One that has delivered waits here for the next round, `hold` seconds at most."""
        hold = min(hold, _POLL) if type(hold) in (int, float) and hold >= 0 else 0
        try:
            async with self._changed:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._wanted(client) != "wait"), hold)
        except asyncio.TimeoutError:
            pass
        task = self._wanted(client)
        if task != "train":
            return {"task": task}
        plan = self.plan
        return {
            "task": "train",
            "run": plan.run,
            "round": self.round,
            "base": self._store.broadcast_digest(self.round),
            "codec": plan.up,
            "kind": plan.kind,
            "feedback": plan.feedback,
            "stochastic": plan.stochastic,
        }

    def _wanted(self, client: str) -> str:
        if self.round >= self.plan.rounds:
            return "stop"
        return "train" if self._open and client not in self._accepted and client not in self._out else "wait"

    async def _send_model(self, transport: AsyncTransport) -> None:
        path, before = self._store.broadcast(self.round), transport.sent
        offer = Offer(f"{self.plan.run}/{self.round}".encode(), "model", os.path.getsize(path))
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
        """A turn to be received and checked, which takes some frames of memory; the client is kept awake until it comes."""
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
                raise RefusedError(f"round {number!r:.40} is not open, this is {self.round}", kind="stale")
            if offer.transfer != self._store.broadcast_digest(number).encode():
                raise RefusedError("an update is named by the digest of the model that it is based on", kind="stale")
            if client in self._out:
                raise RefusedError("no more updates from you in this round", kind="out")
            return _Upload(self, client, self._store.update(self.round, client), offer.transfer)

    def _accept(self, update: Update, part: str, path: str, number: int) -> None:
        """Let an update count, unless its round has been closed meanwhile."""
        with self._lock:
            if not self._open or number != self.round:
                raise RefusedError(f"round {number} has been closed", kind="stale")
            os.replace(part, path)
            self._accepted[update.client] = replace(update, recording=path)

    def check(self, client: str, path: str) -> Update:
        """The update in a recording. Raises UpdateError or a WireError for what must not count."""
        base = self._store.broadcast_digest(self.round)
        expected = Terms(self.plan.run, self.round, base, client)
        with open(path, "rb", buffering=0) as file:
            return check_update(file, self.model, expected, self.plan.rules, recording=path)

    def _begin_round(self) -> None:
        store, number = self._store, self.round
        if not os.path.exists(store.broadcast(number)):
            terms = Terms(self.plan.run, number)
            write_file(store.broadcast(number), encode(views(self.model), terms, codec=self.plan.down))
        self._accepted = {}
        for client in store.delivered(number):  # before this server was started again
            path = store.update(number, client)
            try:
                self._accepted[client] = self.check(client, path)
            except (WireError, UpdateError):  # it has rotted, or the rules have changed; its sender may come again
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
                try:
                    await asyncio.wait_for(self._changed.wait(), left if left > 0 else None)
                except asyncio.TimeoutError:
                    pass

    def _end_round(self, began: float) -> None:
        store, number = self._store, self.round
        with self._lock:
            self._open = False
            survivors = store.closed(number)
        if survivors is None:
            survivors = sorted(self._accepted)
            store.close(number, survivors)
        updates = [self._accepted[client] for client in survivors]
        aggregate(updates, self.model, limits=self.plan.rules.limits)
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
            limits=server.plan.rules.limits,
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


class _Store:
    """What the server must not forget."""

    def __init__(self, folder: str | os.PathLike, run: str) -> None:
        self._folder = os.fspath(folder)
        self._run = run
        os.makedirs(self._folder, exist_ok=True)

    def load(self, initial: Callable[[], Mapping[str, Any]]) -> tuple[int, dict[str, np.ndarray]]:
        """The round that the run is in, and its model."""
        path = os.path.join(self._folder, "model.tw")
        if not os.path.exists(path):
            model = arrays(initial())
            self.save(0, model)
            return 0, model
        with tensorwire.open_file(path) as file:
            terms = Terms.parse(file.metadata)
        if terms.run != self._run:
            raise SchemaError(f"{self._folder} holds run {terms.run!r}, not {self._run!r}")
        return terms.round, tensorwire.load_file(path)

    def save(self, number: int, model: Mapping[str, np.ndarray]) -> None:
        """Let round `number` begin with `model`; what the one before it needed is removed."""
        path = os.path.join(self._folder, "model.tw")
        tensorwire.save_file(model, path, metadata=Terms(self._run, number).metadata())
        shutil.rmtree(self._round(number - 1), ignore_errors=True)
        os.makedirs(self._round(number), exist_ok=True)

    def broadcast(self, number: int) -> str:
        """The path of the round's encoded model."""
        return os.path.join(self._round(number), "broadcast.tw")

    def broadcast_digest(self, number: int) -> str:
        """The digest of the round's encoded model, in hexadecimal."""
        return Recorded(self.broadcast(number)).digest

    def update(self, number: int, client: str) -> str:
        """The path of a client's update."""
        return os.path.join(self._round(number), f"update-{client}.tw")

    def delivered(self, number: int) -> list[str]:
        """The clients whose updates are in."""
        names = (name for name in os.listdir(self._round(number)) if name.startswith("update-"))
        return sorted(name.removeprefix("update-").removesuffix(".tw") for name in names)

    def close(self, number: int, clients: list[str]) -> None:
        """Write down whose updates the round counts."""
        write_file(os.path.join(self._round(number), "closed.json"), [json.dumps(clients).encode()])

    def closed(self, number: int) -> list[str] | None:
        """Whose updates the round counts, if that has been decided."""
        try:
            with open(os.path.join(self._round(number), "closed.json"), encoding="ascii") as file:
                return json.load(file)
        except FileNotFoundError:
            return None

    def _round(self, number: int) -> str:
        return os.path.join(self._folder, f"round-{number}")
