"""The loop in one process: the same functions as between machines, with streams handed over as files.

What a setting does to learning shows here within minutes. Memory is that of the model, whatever the number of clients:
what they send, and what their error feedback keeps, stands in a temporary folder.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorwire.errors import NonFiniteError
from tensorwire.fl.averaging import Averaging
from tensorwire.fl.plan import Plan
from tensorwire.fl.task import Task
from tensorwire.fl.tensors import copies, matched, numbers, plain
from tensorwire.storage import write_file
from tensorwire.updates import (
    ErrorFeedback,
    Rules,
    Terms,
    Update,
    UpdateError,
    UpdateKind,
    arrays,
    check_update,
    encode,
    exact_vectors,
    receive,
    subtract,
    views,
)


@dataclass(frozen=True)
class Round:
    """The loss of the global model after `number` rounds, and the bytes of all messages until then.

    `missing`: of those whom the round asked, who brought nothing, and why.
    """

    number: int
    loss: float
    bytes: int
    missing: tuple[str, ...] = ()


def simulate(task: Task, plan: Plan, *, down_kind: UpdateKind = "weights") -> Iterator[Round]:
    """Federated averaging, round by round; the first `Round` given is the start.

    `down_kind`: what travels from the server: whole weights, as between machines, or after the first round, which is
    sent raw, the difference to what the clients hold.
    """
    state = copies(task.initial())
    model = arrays(state)  # the same memory: averaging writes what evaluation reads
    held = copies(state)  # what the clients hold
    averaging = Averaging(plan)
    averaging.check(model)
    digest, total = "", 0
    yield Round(0, task.evaluate(state), 0)
    with tempfile.TemporaryDirectory() as folder:
        clients = [_Client(task, plan, number, Path(folder)) for number in range(plan.clients)]
        for number in range(plan.rounds):
            # Server out, once for all clients; client in, which is the same for each.
            kind: UpdateKind = down_kind if digest else "weights"
            news = views(state) if kind == "weights" else subtract(state, held)
            terms = Terms(plan.name, number, digest, kind=kind)
            codec, seed = averaging.down if kind == down_kind else "raw", _seed(plan, number, plan.clients)
            path = Path(folder, "broadcast.tw")
            size = write_file(path, encode(news, terms, codec=codec, stochastic=seed))
            with path.open("rb", buffering=0) as file:
                _, digest = receive(file, held, held=digest)
            asked = plan.draw(number, clients)
            updates, missing = [], []
            for client in asked:
                try:
                    updates.append(client.update(held, model, number, digest, averaging.rules))
                    total += os.path.getsize(client.path)
                except (UpdateError, NonFiniteError) as error:
                    missing.append(f"{client.name}: {error}")
            if len(updates) >= plan.quorum:
                missing += [f"{client}: left out: {reason}" for client, reason in averaging.average(updates, model)]
            total += size * len(asked)
            yield Round(number + 1, task.evaluate(state), total, tuple(missing))


class _Client:
    """One client, whose memory between rounds is its files."""

    def __init__(self, task: Task, plan: Plan, number: int, folder: Path) -> None:
        self.name = f"client-{number}"
        self.path = folder / f"{self.name}.tw"
        self._residual = folder / f"{self.name}.residual"
        self._task = task
        self._plan = plan
        self._number = number
        self._last = -1  # the round that it last took part in

    def update(self, held: Any, model: Any, number: int, digest: str, rules: Rules) -> Update:
        """Train and send: the client's work, and what the server makes of it. Raises UpdateError, NonFiniteError."""
        plan = self._plan
        mine = copies(held)
        state, weight, metrics = self._task.train(mine, self._number, number)
        counted = plain(weight)
        if counted is None or not counted > 0:
            raise UpdateError(f"its weight is {weight!r:.40}", reason="weight")
        terms = Terms(plan.name, number, digest, self.name, plan.kind, counted, numbers(metrics)[0])
        sent = matched(state, held)
        if plan.kind == "difference":
            sent = subtract(sent, held)
        feedback = ErrorFeedback(self._residual) if plan.feedback else None
        if feedback is not None:
            feedback.age(plan.age ** (number - self._last - 1))
            sent = feedback.add(sent)
        seed = _seed(plan, number, self._number)
        write_file(self.path, encode(sent, terms, codec=exact_vectors(plan.up), stochastic=seed))
        with self.path.open("rb", buffering=0) as file:
            update = check_update(file, model, terms, rules, recording=self.path)
        if feedback is not None:
            with self.path.open("rb", buffering=0) as file:
                feedback.settle(sent, file)
            feedback.save(self._residual)
            self._last = number
        return update


def _seed(plan: Plan, number: int, place: int) -> int | None:
    return number * (plan.clients + 1) + place if plan.stochastic else None
