"""The loop in one process: the same functions as between machines, with streams handed over as bytes.

What a setting does to learning shows here within minutes.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from tensorwire.fl.aggregate import Rules, aggregate, check_update
from tensorwire.fl.task import Task
from tensorwire.fl.updates import ErrorFeedback, Kind, Terms, arrays, encode, receive, views
from tensorwire.streams.codec_choice import CodecChoice


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
    """The loss of the global model after `number` rounds, and the bytes of all messages until then."""

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

        def seed(place: int, number: int = number) -> int | None:
            return number * (clients + 1) + place if plan.stochastic else None

        # Server out, once for all clients; client in, which is the same for each.
        kind: Kind = plan.down_kind if digest else "weights"
        codec = "raw" if kind != plan.down_kind else plan.down
        news = views(state, held if kind == "difference" else None)
        terms = Terms("simulation", number, digest, kind=kind)
        broadcast = b"".join(encode(news, terms, codec=codec, stochastic=seed(clients)))
        _, digest = receive(broadcast, held, held=digest)
        updates = []
        for client, feedback in enumerate(feedbacks):
            # The client's work: plain tensors in, plain tensors out.
            trained, weight, metrics = task.train(held, client, number)
            # Client out, server in.
            terms = Terms("simulation", number, digest, f"client-{client}", plan.up_kind, weight, metrics)
            sent = views(trained, held if plan.up_kind == "difference" else None, feedback)
            recording = b"".join(encode(sent, terms, codec=plan.up, stochastic=seed(client)))
            updates.append(check_update(recording, model, terms, Rules()))
            if feedback is not None:
                feedback.settle(sent, recording)
            total += len(broadcast) + len(recording)
        aggregate(updates, model)
        yield Round(number + 1, task.evaluate(state), total)
