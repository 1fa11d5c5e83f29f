"""A client of the loop: it asks the server for orders and carries them out, until it is told to stop.

It is connected only while data moves, not while it trains or waits. Its folder holds what must survive a killed
process: the model being received, and the encoded update until the server has acknowledged it. A restarted client
therefore delivers the same update again and never trains a round twice.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final

from tensorwire.errors import (
    AuthError,
    CorruptError,
    EncodeError,
    FormatError,
    NonFiniteError,
    SchemaError,
    SequenceError,
    StorageError,
    TensorwireError,
    TransportError,
    TruncatedError,
    WireError,
    counted,
    show,
)
from tensorwire.fl.plan import Order
from tensorwire.fl.task import Task
from tensorwire.fl.versions import STEPS, stream
from tensorwire.limits import DEFAULT, Limits, at_least_default
from tensorwire.storage import rename, write_file
from tensorwire.storage.parts import discard_parts
from tensorwire.streams import size_text
from tensorwire.transfer import (
    Backoff,
    Offer,
    Recorded,
    RefusedError,
    Watched,
    greet,
    hear,
    receive_stream,
    say,
    send_stream,
)
from tensorwire.transports import HANDSHAKE, TIMEOUT, TcpTransport
from tensorwire.updates import (
    BoundedRecording,
    ErrorFeedback,
    Terms,
    as_number,
    empty_like,
    exact_vectors,
    fingerprint,
    finite_metrics,
    receive,
    receive_patch,
    terms_of,
    views,
    write_update,
)

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
_SHORTEST_WAIT: Final = 0.05  # seconds between two requests, whatever the server says
_FOR_GOOD: Final = ("schema", "unsupported")  # kinds of refusals that every later update would meet too
_ON_THE_WAY: Final = ("corrupt", "format", "limit", "sequence", "truncated")  # kinds for which sending again may help
_FAREWELL: Final = 2.0  # seconds to tell the server that we leave
_WHY: Final = 200  # characters of a reason
_SHOWN: Final = 10  # names of metrics
_MOST_ROTTEN: Final = 3  # models in a row that were damaged on the disk


class Client:
    """One client of a run.

    `number`: selects its share of the task's data. `connect`: opens a connection to the server; called as often as
    needed. `patience`: seconds without success after which the last error is raised. `hold`: seconds after which a
    waiting client asks again, at most. `on_refusal`: called when the server refuses an update; the client then waits
    for the next round. `on_step`: called with a line of text for each step. `limits`: of the models that are received,
    which the task's own bounds further, and of the files in `folder`.
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
        limits: Limits = DEFAULT,
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
        self._limits = limits
        self._reached = 0  # bytes of the transfer in progress that the receiver has
        self._nothing: tuple[str, str] | None = None  # the base for which we have no update, and why
        self._rotten = 0
        os.makedirs(self._folder, exist_ok=True)

    def run(self) -> None:
        """Take part until the server says that the run is over.

        Raises TransportError, AuthError, RefusedError; SchemaError if the task's model does not match the server's;
        and whatever the task raises. Before an error leaves this function, the server is told not to wait for us.
        """
        try:
            while (order := self._next_order()) is not None:
                self._answer(order)
        except BaseException as error:
            self._leave(error)
            raise
        self._on_step("the run is over")

    def _next_order(self) -> Order | None:
        """Deliver a pending update and ask what to do, over as many connections as it takes; None: the run is over."""
        backoff = Backoff(patience=self._patience, first=_FIRST_PAUSE, longest=_LONGEST_PAUSE)
        while True:
            before = self._reached
            try:
                with self._connect() as transport:
                    transport.run(greet("tensorwire.fl"), within=HANDSHAKE)
                    answer = self._errands(transport)
                if not isinstance(answer, float):
                    return answer
                pause = answer
                backoff.reset()
            except (TransportError, CorruptError, TruncatedError, FormatError, SequenceError) as error:
                busy = isinstance(error, RefusedError) and error.kind == "busy"
                if busy or self._reached > before:
                    backoff.reset()
                pause = backoff.after(error)
                self._on_step(f"{error}; trying again")
            time.sleep(pause)

    def _errands(self, transport: TcpTransport) -> Order | float | None:
        """Everything that needs a connection. Returns an order, seconds to wait, or None when the run is over."""
        while True:
            answer = self._request(transport, want="task")
            task = answer.pop("task", None)
            if task == "stop":
                return None
            if task == "wait":
                seconds = as_number(answer.get("seconds")) or 0.0
                return min(max(_SHORTEST_WAIT, seconds), self._hold)  # in this order, NaN becomes the shortest wait
            if task != "train":
                raise SchemaError(f"the server says {show(task)}, which this version of the client does not know")
            order = Order.parse(answer)
            held = self._held()
            self._tidy(order, held)
            if self._nothing is not None and self._nothing[0] == order.base:
                self._request(transport, want="pass", round=order.round, why=self._nothing[1])
                return _SHORTEST_WAIT
            if os.path.exists(self._update(order)):
                if not self._deliver(transport, order):
                    return _SHORTEST_WAIT
            elif held == order.base:
                return order
            else:
                self._fetch(transport, order, held)

    def _request(self, transport: TcpTransport, **request: Any) -> dict[Any, Any]:
        transport.run(say({"client": self.name, **request}))
        return transport.run(hear())

    def _held(self) -> str:
        """The digest of the model that is here; "" for none."""
        try:
            return Recorded(self._path("model.tw")).digest
        except FileNotFoundError:
            return ""
        except OSError as error:  # too short to be a model, or not a file
            _remove(self._path("model.tw"), error)
            return ""

    def _fetch(self, transport: TcpTransport, order: Order, held: str) -> None:
        """Receive the model of an order, or a step towards it from the version that we hold.

        Only the tensors of the task are accepted, and the file's name is ours, not the server's.
        """
        path = self._path("model.tw")
        transport.run(say({"client": self.name, "want": "model", "base": order.base, "held": held}))
        recordings: list[BoundedRecording] = []
        kind = "model"

        def open_recording(offer: Offer) -> BoundedRecording:
            nonlocal kind
            kind = offer.name if offer.name == "encoded" or (held and offer.name in STEPS) else "model"
            convert = None if kind == "model" else partial(self._follow, order, kind)
            key, patch = _transfer(order, kind, held), kind == "patch"
            model, limits = self._task.initial(), self._limits
            recordings.append(BoundedRecording(path, key, model, patch=patch, convert=convert, limits=limits))
            return recordings[0]

        try:
            _, outcome, _ = transport.run(receive_stream(open_recording))
        finally:
            self._reached = recordings[0].position.offset if recordings else 0
        self._reached = 0
        what = f"a {kind}" if kind in STEPS else "the model"
        self._on_step(f"round {order.round}: received {what}, {size_text(outcome.end.offset)}")
        if kind not in STEPS and self._held() != order.base:
            raise SchemaError(
                f"the server sent a different model from the one that its order names for round {order.round}"
            )

    def _follow(self, order: Order, kind: str, received: str, made: str) -> None:
        """Make the version that a stream leads to. If the server does not know it, it answers with a whole one."""
        held, before = "", -1
        if kind in STEPS:
            model, terms, held = self._read()
            before = terms.round
        else:
            model = empty_like(self._task.initial())
        with open(received, "rb", buffering=0) as file:
            if kind == "patch":
                terms = receive_patch(file, model, held=held, limits=self._limits)
            else:
                terms, _ = receive(file, model, held=held, limits=self._limits)
        if not before < terms.round <= order.round:  # so that it comes to an end
            raise SchemaError(f"a {kind} leads from round {before} to {terms.round}, not towards the order's")
        write_file(made, stream(views(model), terms.run, terms.round, limits=self._limits))

    def _read(self) -> tuple[dict[str, Any], Terms, str]:
        """The model that is here, its terms and its digest. A damaged file is removed, and its error raised."""
        path, model = self._path("model.tw"), empty_like(self._task.initial())
        try:
            with open(path, "rb", buffering=0) as file:
                return model, *receive(file, model, limits=self._limits)
        except (WireError, OSError) as error:
            _remove(path, error)
            raise

    def _load(self, order: Order) -> dict[str, Any]:
        """The model of an order. Raises as `_read`, and SchemaError if the model here is a different one."""
        base, terms, digest = self._read()
        if (terms.run, terms.round, digest) != (order.run, order.round, order.base):
            raise SchemaError(f"the model is that of round {terms.round}, but the order is for round {order.round}")
        return base

    def _answer(self, order: Order) -> None:
        """Train, and write the update that answers an order to disk, or note why there is none."""
        try:
            base = self._load(order)
        except SchemaError:
            raise
        except (WireError, OSError) as error:
            self._rotten += 1
            if self._rotten > _MOST_ROTTEN:
                raise
            self._on_step(f"round {order.round}: the model on the disk is damaged and fetched again ({error})")
            return
        self._rotten = 0
        untouched, began = fingerprint(base), time.monotonic()
        state, weight, metrics = self._task.train(base, self._number, order.round)
        kept, dropped = finite_metrics(metrics)
        shown = "".join(f", {name} {value:.4g}" for name, value in kept.items())
        self._on_step(f"round {order.round}: trained for {time.monotonic() - began:.1f} s{shown}")
        if dropped:
            names = ", ".join(dropped[:_SHOWN])
            why = "as they are no finite numbers, or too many"
            left_out = f"left {counted(len(dropped), 'metric')} out of the report"
            self._on_step(f"round {order.round}: {left_out}, {why}: {names}")
        number = as_number(weight)
        if number is None:
            raise SchemaError(f"training must give a number as its weight, not {show(weight)}")
        if not 0 < number < math.inf:
            self._add_nothing(order, f"training has the weight {number:g}")
            return
        if fingerprint(base) != untouched:
            self._on_step(f"round {order.round}: training changed the model in place, so the original is read again")
            base = self._load(order)
        try:
            self._encode(order, base, state, Terms(
                order.run, order.round, order.base, self.name, order.kind, number, kept))  # fmt: skip
        except NonFiniteError as error:
            self._add_nothing(order, f"the result of training cannot be sent as {order.up}: {error}")

    def _encode(self, order: Order, base: Mapping[str, Any], state: Any, terms: Terms) -> None:
        feedback = self._feedback(order, base) if order.feedback else None
        update, part = self._update(order), self._path("update.part")
        codec, seed = exact_vectors(order.up), order.seed_of(terms.run, terms.round, terms.client)
        write_update(part, state, base, terms, codec=codec, stochastic=seed, feedback=feedback, limits=self._limits)
        if feedback is not None:
            feedback.save(f"{update}.residual", limits=at_least_default(self._limits))
        rename(part, update)

    def _add_nothing(self, order: Order, why: str) -> None:
        self._on_step(f"round {order.round}: nothing to add: {why}")
        self._nothing = order.base, why

    def _deliver(self, transport: TcpTransport, order: Order) -> bool:
        """Send the update. Returns whether it counts."""
        update = self._update(order)
        if terms_of(update) is None:
            self._on_step(f"round {order.round}: the update on the disk is damaged and made again")
            os.unlink(update)
            return False
        size, outgoing = os.path.getsize(update), Watched(Recorded(update))
        # Every update has a transfer key of its own, because the server may hold the beginning of a different update.
        transfer = f"{order.base[:32]}{outgoing.digest[:32]}".encode()
        transport.run(say({"client": self.name, "want": "deliver"}))
        counted = True
        try:
            transport.run(send_stream(Offer(transfer, "update", size, {"round": order.round}), outgoing))
            self._on_step(f"round {order.round}: delivered the update, {size_text(size)} as {order.up}")
        except RefusedError as error:
            if error.kind in _FOR_GOOD:
                raise SchemaError(f"{error.detail}; this client and the server have different models") from error
            if error.kind in _ON_THE_WAY:
                raise TransportError(error.detail) from error
            if error.retryable:
                raise
            self._on_refusal(error)
            counted = False
        except SequenceError as error:
            self._on_refusal(RefusedError(error.detail, kind="another"))
            counted = False
        finally:
            self._reached = outgoing.reached
        self._reached = 0
        # The residual of this update replaces the earlier one only if the update counts.
        if os.path.exists(residual := f"{update}.residual"):
            if counted:
                rename(residual, self._path("residual.tw"))
            else:
                os.unlink(residual)
        os.unlink(update)
        return counted

    def _feedback(self, order: Order, base: Mapping[str, Any]) -> ErrorFeedback:
        """What the last counted update left out, reduced for each round since then that did not ask us."""
        try:
            feedback = ErrorFeedback(self._path("residual.tw"), limits=at_least_default(self._limits))
            feedback.add(views(base))
        except (WireError, EncodeError, OSError) as error:  # damaged, or of another model
            self._on_step(f"round {order.round}: nothing is carried over: {error}")
            feedback = ErrorFeedback()
        feedback.begin(order.round, order.age)
        return feedback

    def _tidy(self, order: Order, held: str) -> None:
        """Remove the files of earlier rounds.

        If we never learned whether an update counted, its residual is dropped, so that nothing is counted twice.
        """
        mine = os.path.basename(self._update(order))
        names = os.listdir(self._folder)
        if any(name.startswith("update-") and name.endswith(".tw") and name != mine for name in names):
            with suppress(FileNotFoundError):
                os.unlink(self._path("residual.tw"))
        for name in names:
            if name.startswith("update-") and not name.startswith(mine):
                os.unlink(self._path(name))
        begun = [_transfer(order, kind, held) for kind in ("model", "encoded", *STEPS)]
        discard_parts(self._path("model.tw"), but=begun)

    def _leave(self, error: BaseException) -> None:
        """Tell the server that nothing more will come from us, if that is quickly possible."""
        if isinstance(error, (TransportError, AuthError)):
            return
        why = f"left: {type(error).__name__}: {error}"[:_WHY]

        def say_so() -> None:
            with suppress(TensorwireError, OSError), self._connect() as transport:
                transport.run(greet("tensorwire.fl"), within=HANDSHAKE)
                self._request(transport, want="leave", why=why)

        farewell = threading.Thread(target=say_so, daemon=True)
        farewell.start()
        farewell.join(_FAREWELL)

    def _update(self, order: Order) -> str:
        return self._path(f"update-{order.base[:16]}.tw")

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)


def _transfer(order: Order, kind: str, held: str) -> bytes:
    """The transfer key of a stream that leads to the version of an order, or part of the way from the version held."""
    return f"{kind} {order.base} {held if kind in STEPS else ''}".encode()


def _remove(path: str, reason: Exception) -> None:
    try:
        os.unlink(path)
    except OSError as error:
        raise StorageError(
            f"{path} is not a model ({reason}) and cannot be removed: {error}", errno=error.errno
        ) from error
