"""The loop in one process: the same functions as between machines, with files in place of connections.

It shows the effect of a setting on learning within minutes. Memory does not grow with the number of clients, whose
updates and error feedback are kept in a temporary folder.
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
from tensorwire.fl.versions import Versions
from tensorwire.updates import (
    ErrorFeedback,
    Rules,
    Terms,
    Update,
    UpdateError,
    arrays,
    as_number,
    check_update,
    copies,
    exact_vectors,
    finite_metrics,
    receive,
    write_update,
)


@dataclass(frozen=True)
class Round:
    """The loss of the global model after `number` rounds, and the bytes of all messages until then.

    `missing`: the clients that the round asked and that did not deliver, with the reasons.
    """

    number: int
    loss: float
    bytes: int
    missing: tuple[str, ...] = ()


def simulate(task: Task, plan: Plan) -> Iterator[Round]:
    """Federated averaging, round by round; the first `Round` is the initial model."""
    state = copies(task.initial())
    model = arrays(state)  # the same memory: averaging writes what evaluation reads
    held = copies(state)  # what the clients hold
    averaging = Averaging(plan)
    averaging.check(model)
    total = 0
    yield Round(0, task.evaluate(state), 0)
    with tempfile.TemporaryDirectory() as folder:
        versions = Versions(folder, plan)
        clients = [_Client(task, plan, number, Path(folder)) for number in range(plan.clients)]
        for number in range(plan.rounds):
            # The server encodes once for all clients, and all of them decode the same model.
            versions.begin(number, model)
            with open(versions.way("")[0].path, "rb", buffering=0) as file:
                receive(file, held)
            updates, missing = [], []
            for client in plan.draw(number, clients):
                total += sum(way.size for way in versions.way(client.base))
                client.base = versions.base
                try:
                    updates.append(client.update(held, model, number, averaging.rules))
                    total += os.path.getsize(client.path)
                except (UpdateError, NonFiniteError) as error:
                    missing.append(f"{client.name}: {error}")
            if len(updates) >= plan.quorum:
                missing += [f"{client}: left out: {reason}" for client, reason in averaging.average(updates, model)]
            yield Round(number + 1, task.evaluate(state), total, tuple(missing))


class _Client:
    """One client, whose memory between rounds is its files."""

    def __init__(self, task: Task, plan: Plan, number: int, folder: Path) -> None:
        self.name = f"client-{number}"
        self.path = folder / f"{self.name}.tw"
        self.base = ""  # the version of the model that it holds
        self._residual = folder / f"{self.name}.residual"
        self._task = task
        self._plan = plan
        self._number = number

    def update(self, held: Any, model: Any, number: int, rules: Rules) -> Update:
        """Train, write the update, and check it as the server does. Raises UpdateError, NonFiniteError."""
        plan = self._plan
        state, weight, metrics = self._task.train(copies(held), self._number, number)
        counted = as_number(weight)
        if counted is None or not counted > 0:
            raise UpdateError(f"its weight is {weight!r:.40}", reason="weight")
        terms = Terms(plan.name, number, self.base, self.name, plan.kind, counted, finite_metrics(metrics)[0])
        feedback = ErrorFeedback(self._residual) if plan.feedback else None
        if feedback is not None:
            feedback.begin(number, plan.age)
        codec, seed = exact_vectors(plan.up), plan.seed_of(plan.name, number, self.name)
        write_update(self.path, state, held, terms, codec=codec, stochastic=seed, feedback=feedback)
        with self.path.open("rb", buffering=0) as file:
            update = check_update(file, model, terms, rules, recording=self.path)
        if feedback is not None:
            feedback.save(self._residual)
        return update
