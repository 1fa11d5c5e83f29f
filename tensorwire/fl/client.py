"""A client of the loop: fetches the model, trains, delivers what came of it. Ask, and do as told, until told to stop.

What must outlive a killed process stands in its folder: the model being received, and the encoded update until the
server has acknowledged it, so that the same update is delivered again and none is trained twice.
"""

import os
import re
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

import numpy as np

from tensorwire.errors import CorruptError, SchemaError, TransportError, TruncatedError
from tensorwire.fl.task import Task
from tensorwire.fl.updates import ErrorFeedback, Terms, encode, receive, views
from tensorwire.storage.atomic import write_file
from tensorwire.transfer import (
    Backoff,
    Offer,
    Recorded,
    Recording,
    RefusedError,
    greet,
    hear,
    receive_stream,
    say,
    send_stream,
)
from tensorwire.transports import HANDSHAKE, TIMEOUT, TcpTransport

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
_HOLD: Final = 10.0
_FIELDS: Final = {
    "task": str,
    "run": str,
    "round": int,
    "base": str,
    "codec": str,
    "kind": str,
    "feedback": bool,
    "stochastic": bool,
}


class Client:
    """One client of a run. `number`: which share of the task's data is its own. `connect` opens a connection to the server,
    as often as it takes; `patience`: seconds without success after which the last error is raised. `hold`: seconds that the server may keep us waiting
    for a task, less than the connection's time-out. `on_refusal`: told when the server does
    not want an update; the client then waits for the next round.
    """

    def __init__(
        self,
        name: str,
        number: int,
        task: Task,
        connect: Callable[[], TcpTransport],
        folder: str | os.PathLike,
        *,
        patience: float = TIMEOUT,
        hold: float = _HOLD,
        on_refusal: Callable[[RefusedError], None] = lambda error: None,
    ) -> None:
        self.name = name
        self._number = number
        self._task = task
        self._connect = connect
        self._folder = os.fspath(folder)
        self._patience = patience
        self._hold = hold
        self._on_refusal = on_refusal
        os.makedirs(self._folder, exist_ok=True)

    def run(self) -> None:
        """Take part until the server says that the run is over. Raises TransportError, AuthError, RefusedError."""
        backoff = Backoff(patience=self._patience, first=_FIRST_PAUSE, longest=_LONGEST_PAUSE)
        while True:
            try:
                with self._connect() as transport:
                    transport.run(greet("tensorwire.fl"), within=HANDSHAKE)
                    while self._step(transport):
                        backoff.reset()
                    return
            except (TransportError, CorruptError, TruncatedError) as error:
                pause = backoff.after(error)
            time.sleep(pause)

    def _step(self, transport: TcpTransport) -> bool:
        """Ask what to do and do it. Returns whether there may be more."""
        transport.run(say({"client": self.name, "want": "task", "hold": self._hold}))
        order = transport.run(hear())
        if order.get("task") == "train":
            update = self._path(f"update-{_checked(order)['base'][:16]}.tw")
            if not os.path.exists(update):
                self._fetch_model(transport, order)
                self._train(order, update)
            self._deliver(transport, order, update)
        return order.get("task") != "stop"

    def _fetch_model(self, transport: TcpTransport, order: Mapping[str, Any]) -> None:
        path = self._path("model.tw")
        if not os.path.exists(path) or Recorded(path).digest != order["base"]:
            transport.run(say({"client": self.name, "want": "model"}))
            transport.run(receive_stream(lambda offer: Recording(path, offer.transfer)))

    def _train(self, order: Mapping[str, Any], update: str) -> None:
        """Make the update that answers an order, and put it on disk."""
        base = {name: _empty_like(tensor) for name, tensor in self._task.initial().items()}
        with open(self._path("model.tw"), "rb", buffering=0) as file:
            terms, digest = receive(file, base)
        if (terms.run, terms.round, digest) != (order["run"], order["round"], order["base"]):
            raise SchemaError(f"the model is of round {terms.round}, the order of round {order['round']}")
        state, weight, metrics = self._task.train(base, self._number, order["round"])
        differs, settled = order["kind"] == "difference", self._settled()
        feedback = ErrorFeedback(settled) if differs and order["feedback"] else None
        sent = views(state, base if differs else None, feedback)
        mine = Terms(order["run"], order["round"], order["base"], self.name, order["kind"], weight, metrics)
        seed = zlib.crc32(f"{order['base']}{self.name}".encode()) if order["stochastic"] else None
        part = self._path("update.part")
        write_file(part, encode(sent, mine, codec=order["codec"], stochastic=seed))
        if feedback is not None:
            with open(part, "rb", buffering=0) as file:
                feedback.settle(sent, file)
            feedback.save(f"{update}.residual")
        os.replace(part, update)

    def _deliver(self, transport: TcpTransport, order: Mapping[str, Any], update: str) -> None:
        transport.run(say({"client": self.name, "want": "deliver"}))
        about = {"round": order["round"]}
        offer = Offer(order["base"].encode(), "update", os.path.getsize(update), about)
        counted = True
        try:
            transport.run(send_stream(offer, Recorded(update)))
        except RefusedError as error:
            if error.retryable:
                raise
            self._on_refusal(error)
            counted = False
        # What this update's quantization dropped replaces what earlier ones did only if it counts.
        if os.path.exists(residual := f"{update}.residual"):
            os.replace(residual, self._path("residual.tw")) if counted else os.unlink(residual)
        os.unlink(update)

    def _settled(self) -> str:
        """The residual of the last update that counted. One whose fate we never learned leaves none: dropped, not
        counted twice.
        """
        path = self._path("residual.tw")
        for name in os.listdir(self._folder):
            if name.startswith("update-"):
                os.unlink(self._path(name))
                with suppress(FileNotFoundError):
                    os.unlink(path)
        return path

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)


def _checked(order: Mapping[str, Any]) -> Mapping[str, Any]:
    if order.keys() != _FIELDS.keys() or any(type(order[name]) is not kind for name, kind in _FIELDS.items()):
        raise SchemaError("the server's order is none")
    if not re.fullmatch("[0-9a-f]{64}", order["base"]):
        raise SchemaError("the server's order has no digest for its model")
    return order


def _empty_like(tensor: Any) -> Any:
    return np.empty_like(tensor) if isinstance(tensor, np.ndarray) else tensor.new_empty(tensor.shape)
