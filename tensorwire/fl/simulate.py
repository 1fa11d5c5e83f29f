"""The loop in one process: the same functions as between machines, with streams handed over as bytes.

What a setting does to learning shows here within minutes.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from tensorwire.fl.plan import Plan
from tensorwire.fl.task import Task
from tensorwire.updates import (
    ErrorFeedback,
    Terms,
    UpdateKind,
    arrays,
    average,
    check_update,
    encode,
    receive,
    subtract,
    views,
)


@dataclass(frozen=True)
class Round:
    """The loss of the global model after `number` rounds, and the bytes of all messages until then."""

    number: int
    loss: float
    bytes: int


def simulate(task: Task, plan: Plan, *, down_kind: UpdateKind = "weights") -> Iterator[Round]:
    """Federated averaging, round by round; the first `Round` given is the start.

    `down_kind`: what travels from the server: whole weights, as between machines, or after the first round, which is
    sent raw, the difference to what the clients hold.
    """
    state = copy.deepcopy(dict(task.initial()))
    model = arrays(state)  # the same memory: averaging writes what evaluation reads
    held = copy.deepcopy(state)  # what the clients hold
    digest = ""
    feedbacks = [ErrorFeedback() if plan.feedback else None for _ in range(plan.clients)]
    total = 0
    yield Round(0, task.evaluate(state), 0)
    for number in range(plan.rounds):

        def seed(place: int, number: int = number) -> int | None:
            return number * (plan.clients + 1) + place if plan.stochastic else None

        # Server out, once for all clients; client in, which is the same for each.
        kind: UpdateKind = down_kind if digest else "weights"
        news = views(state) if kind == "weights" else subtract(state, held)
        terms = Terms(plan.name, number, digest, kind=kind)
        codec = plan.down if kind == down_kind else "raw"
        broadcast = b"".join(encode(news, terms, codec=codec, stochastic=seed(plan.clients)))
        _, digest = receive(broadcast, held, held=digest)
        updates = []
        for client, feedback in enumerate(feedbacks):
            # The client's work: plain tensors in, plain tensors out.
            trained, weight, metrics = task.train(held, client, number)
            # Client out, server in.
            terms = Terms(plan.name, number, digest, f"client-{client}", plan.kind, weight, metrics)
            sent = views(trained) if plan.kind == "weights" else subtract(trained, held)
            if feedback is not None:
                sent = feedback.add(sent)
            message = b"".join(encode(sent, terms, codec=plan.up, stochastic=seed(client)))
            updates.append(check_update(message, model, terms))
            if feedback is not None:
                feedback.settle(sent, message)
            total += len(broadcast) + len(message)
        average(updates, into=model)
        yield Round(number + 1, task.evaluate(state), total)
