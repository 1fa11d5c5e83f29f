"""A client of the loop: it asks the server what to do and does it, until it is told to stop.

What must outlive a killed process stands in its folder: the model being received, and the encoded update until the
server has acknowledged it, so that the same update is delivered again and none is trained twice.
"""

import os
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import numpy as np

from tensorwire.errors import CorruptError, SchemaError, SequenceError, TransportError, TruncatedError
from tensorwire.fl.plan import Order
from tensorwire.fl.task import Task
from tensorwire.storage import rename, write_file
from tensorwire.streams import size_text
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
from tensorwire.updates import ErrorFeedback, Terms, encode, receive, subtract, views

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0


class Client:
    """One client of a run.

    `number`: which share of the task's data is its own. `connect`: opens a connection to the server, as often as it
    takes. `patience`: seconds without success after which the last error is raised. `hold`: seconds that the server may
    let us wait for a task, less than the connection's time-out. `on_refusal`: called when the server refuses an update;
    the client then waits for the next round. `on_step`: called with a line of text for each thing that is done.
    """

    def __init__(
        self,
        name: str,
        number: int,
        task: Task,
        connect: Callable[[], TcpTransport],
        folder: str | os.PathLike[str],
        *,
        patience: float = TIMEOUT,
        hold: float = 10.0,
        on_refusal: Callable[[RefusedError], None] = lambda error: None,
        on_step: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.name = name
        self._number = number
        self._task = task
        self._connect = connect
        self._folder = os.fspath(folder)
        self._patience = patience
        self._hold = hold
        self._on_refusal = on_refusal
        self._on_step = on_step
        self._anew = False
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
                self._on_step(f"{error}; trying again")
            time.sleep(pause)

    def _step(self, transport: TcpTransport) -> bool:
        """Ask what to do and do it. Returns whether there may be more."""
        transport.run(say({"client": self.name, "want": "task", "hold": self._hold}))
        answer = transport.run(hear())
        task = answer.pop("task", None)
        if task == "stop":
            self._on_step("the run is over")
        if task == "train":
            order = Order.parse(answer)
            update = self._path(f"update-{order.base[:16]}.tw")
            if not os.path.exists(update):
                self._fetch_model(transport, order)
                self._train(order, update)
            self._deliver(transport, order, update)
        return bool(task != "stop")

    def _fetch_model(self, transport: TcpTransport, order: Order) -> None:
        path = self._path("model.tw")
        if not os.path.exists(path) or Recorded(path).digest != order.base:
            transport.run(say({"client": self.name, "want": "model"}))
            transport.run(receive_stream(lambda offer: Recording(path, offer.transfer)))
            self._on_step(f"round {order.round}: received the model, {size_text(os.path.getsize(path))}")

    def _train(self, order: Order, update: str) -> None:
        """Make the update that answers an order, and put it on disk."""
        base = {name: _empty_like(tensor) for name, tensor in self._task.initial().items()}
        with open(self._path("model.tw"), "rb", buffering=0) as file:
            terms, digest = receive(file, base)
        if (terms.run, terms.round, digest) != (order.run, order.round, order.base):
            raise SchemaError(f"the model is of round {terms.round}, the order of round {order.round}")
        began = time.monotonic()
        state, weight, metrics = self._task.train(base, self._number, order.round)
        shown = "".join(f", {name} {value:.4g}" for name, value in metrics.items())
        self._on_step(f"round {order.round}: trained for {time.monotonic() - began:.1f} s{shown}")
        settled = self._settled()
        sent = views(state) if order.kind == "weights" else subtract(state, base)
        feedback = ErrorFeedback(settled) if order.feedback else None
        if feedback is not None:
            sent = feedback.add(sent)
        mine = Terms(order.run, order.round, order.base, self.name, order.kind, weight, metrics)
        seed = zlib.crc32(f"{order.base}{self.name}".encode()) if order.stochastic else None
        part = self._path("update.part")
        write_file(part, encode(sent, mine, codec=order.up, stochastic=seed))
        if feedback is not None:
            with open(part, "rb", buffering=0) as file:
                feedback.settle(sent, file)
            feedback.save(f"{update}.residual")
        rename(part, update)

    def _deliver(self, transport: TcpTransport, order: Order, update: str) -> None:
        transport.run(say({"client": self.name, "want": "deliver"}))
        about = {"round": order.round}
        size = os.path.getsize(update)
        offer = Offer(order.base.encode(), "update", size, about, anew=self._anew)
        self._anew = False
        counted = True
        try:
            transport.run(send_stream(offer, Recorded(update)))
            self._on_step(f"round {order.round}: delivered the update, {size_text(size)} as {order.up}")
        except RefusedError as error:
            if error.retryable:
                raise
            self._on_refusal(error)
            counted = False
        except SequenceError as error:  # the server has the beginning of one that was lost with an earlier folder
            self._anew = True
            raise TransportError(f"{error}; it is asked to begin anew") from error
        # What this update's quantization dropped replaces what earlier ones did only if it counts.
        if os.path.exists(residual := f"{update}.residual"):
            rename(residual, self._path("residual.tw")) if counted else os.unlink(residual)
        os.unlink(update)

    def _settled(self) -> str:
        """The path of the residual that the last update left, once it counted.

        Of an update whose fate we never learned nothing is carried over: what it dropped is lost, not counted twice.
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


def _empty_like(tensor: Any) -> Any:
    return np.empty_like(tensor) if isinstance(tensor, np.ndarray) else tensor.new_empty(tensor.shape)
