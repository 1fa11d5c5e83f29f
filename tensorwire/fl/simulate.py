"""The loop in one process: the same functions as between machines, with streams handed over as bytes.

What a setting does to learning shows here in minutes; `tensorwire fl run` shows the rest.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from tensorwire.fl.aggregate import Rules, aggregate, check_update
from tensorwire.fl.task import Task
from tensorwire.fl.updates import ErrorFeedback, Kind, Terms, arrays, encode, receive, views
from tensorwire.streams.rules import CodecChoice


@dataclass(frozen=True)
class Plan:
    """How models and updates travel.

    `down`, `up`: codecs. `down_kind`: weights, or after the first round (which is sent raw) the difference to
    what the clients hold. `up_kind`: weights, or the difference to what the client began from. `feedback`:
    clients keep what quantizing their differences dropped. `stochastic`: bf16 rounds at random.
    """

    down: CodecChoice = "raw"
    up: CodecChoice = "raw"
    down_kind: Kind = "weights"
    up_kind: Kind = "weights"
    feedback: bool = False
    stochastic: bool = False


@dataclass(frozen=True)
class Round:
    """After `number` rounds: the loss of the global model, and bytes that all clients have received and sent
    so far.
    """

    number: int
    loss: float
    bytes: int


def simulate(task: Task, plan: Plan, *, clients: int, rounds: int) -> Iterator[Round]:
    """Federated averaging, round by round; the first one given is the start."""
    state = copy.deepcopy(dict(task.initial()))
    model = arrays(state)  # the same memory: aggregation writes what evaluation reads
    held = copy.deepcopy(state)  # what the clients hold
    digest = ""
    feedbacks = [ErrorFeedback() if plan.feedback else None for _ in range(clients)]
    total = 0
    yield Round(0, task.evaluate(state), 0)
    for number in range(rounds):
        # Server out, once for all clients; client in, which is the same for each.
        difference = plan.down_kind == "difference" and digest != ""
        seeds = (
            [number * (clients + 1) + place for place in range(clients + 1)]
            if plan.stochastic
            else [None] * (clients + 1)
        )
        broadcast = b"".join(
            encode(
                views(state, held if difference else None),
                Terms("simulation", number, digest, kind="difference" if difference else "weights"),
                codec="raw" if plan.down_kind == "difference" and not difference else plan.down,
                stochastic=seeds[clients],
            )
        )
        _, digest = receive(broadcast, held, held=digest)
        updates = []
        for client, feedback in enumerate(feedbacks):
            # The client's work: plain tensors in, plain tensors out.
            trained, weight, metrics = task.train(held, client, number)
            # Client out, server in.
            terms = Terms("simulation", number, digest, f"client-{client}", plan.up_kind, weight, metrics)
            sent = views(trained, held if plan.up_kind == "difference" else None, feedback)
            recording = b"".join(encode(sent, terms, codec=plan.up, stochastic=seeds[client]))
            updates.append(check_update(recording, model, terms, Rules()))
            if feedback is not None:
                feedback.settle(sent, recording)
            total += len(broadcast) + len(recording)
        aggregate(updates, model)
        yield Round(number + 1, task.evaluate(state), total)
