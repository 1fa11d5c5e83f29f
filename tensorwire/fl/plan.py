"""All settings of a run. Orders to clients, the checks of settings and the command line are derived from them.

A new setting is one line: its name, type and default, and for the command line its help text and an optional
placeholder. A setting that clients must know goes into `Answer`, and so into every order; others go into `Plan`.
"""

import random
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import UnionType
from typing import Annotated, Any, Final, Literal, TypeVar, get_args, get_origin

import tensorwire
from tensorwire.errors import SchemaError, counted

T = TypeVar("T")

_DIGEST: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What clients must send. Raises ValueError for a field of the wrong type or value."""

    up: Annotated[str, "codec for the updates", "SPEC"] = "nf4"
    kind: Annotated[Literal["weights", "difference"], "what clients send"] = "difference"
    feedback: Annotated[bool, "clients carry over what quantization dropped to their next difference"] = False
    stochastic: Annotated[bool, "round up or down at random where the codec is bf16"] = False
    age: Annotated[float, "factor on what a client carries over, for each round that did not ask it", "X"] = 0.9

    def seed_of(self, run: str, number: int, who: str) -> int | None:
        """The seed for stochastic rounding in one round, by a client or the server (""); None: round to nearest."""
        return zlib.crc32(f"{run}/{number}/{who}".encode()) if self.stochastic else None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not _fits(value, each.type):
                raise ValueError(f"{each.name} cannot be {value!r:.80}")
        tensorwire.codec(self.up)
        if self.feedback and self.kind != "difference":
            raise ValueError("feedback is for differences; leave it out where clients send weights")
        if not 0 < self.age <= 1:
            raise ValueError(f"age must be above 0 and at most 1, not {self.age}")


@dataclass(frozen=True, kw_only=True)
class Plan(Answer):
    """The settings of a run. Raises ValueError for settings that make no sense.

    A round asks all clients, or a new draw of `sample` or `fraction` of those present. It ends when no client that it
    asked can still deliver, and at the latest `deadline` seconds after the first contact with one of them. With fewer
    than `quorum` updates the model stays unchanged.
    """

    name: Annotated[str, "name of the run"] = "run"
    rounds: Annotated[int, "number of rounds", "N"] = 10
    clients: Annotated[int, "number of clients in the run", "N"] = 4
    sample: Annotated[int | None, "number of clients that a round asks to train (all)", "N"] = None
    fraction: Annotated[float | None, "fraction of the clients present that a round asks to train (all)", "X"] = None
    seed: Annotated[int, "seed for choosing the clients that a round asks", "N"] = 0
    quorum: Annotated[int, "number of updates that a round needs to count", "N"] = 1
    deadline: Annotated[float, "seconds that a round may take", "S"] = 600.0
    down: Annotated[str, "codec for the models, or for their differences", "SPEC"] = "bf16"
    down_kind: Annotated[
        Literal["weights", "difference", "patch"], "what the server sends to clients that hold the previous model"
    ] = "weights"
    max_weight: Annotated[float, "refuse updates with a larger weight", "X"] = 1e9
    max_norm: Annotated[float | None, "the largest L2 norm of an update (any)", "X"] = None
    on_norm: Annotated[Literal["reject", "clip"], "what to do with updates above the largest norm"] = "reject"
    keep_outliers: Annotated[bool, "also count updates that stand out from the others"] = False
    trim: Annotated[float | None, "fraction of the values that the mean leaves out at each end (none)", "X"] = None
    optimizer: Annotated[
        Literal["average", "momentum", "adagrad", "adam", "yogi"], "what the server does with the mean"
    ] = "average"
    rate: Annotated[float, "the server's learning rate; with average, how far it moves towards the mean", "X"] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        tensorwire.codec(self.down)
        for name, value in asdict(self).items():
            if isinstance(value, (int, float)) and name != "seed" and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        if self.trim is not None and self.trim >= 0.5:
            raise ValueError(f"trim must be less than 0.5, not {self.trim}")
        if self.sample is not None and self.fraction is not None:
            raise ValueError("sample and fraction set the same thing; leave one out")
        if self.fraction is not None and self.fraction > 1:
            raise ValueError(f"fraction must be at most 1, not {self.fraction}")
        if self.quorum > self.asked_of(self.clients):
            raise ValueError(
                f"quorum is {self.quorum}, but a round asks {counted(self.asked_of(self.clients), 'client')}"
            )

    @property
    def samples(self) -> bool:
        """Whether rounds ask only some of the clients."""
        return self.sample is not None or self.fraction is not None

    def draw(self, number: int, present: Sequence[T]) -> list[T]:
        """The members of `present` that round `number` asks, in their order. Depends only on the seed and the round."""
        chosen = random.Random(f"{self.seed}/{number}").sample(range(len(present)), self.asked_of(len(present)))
        return [present[place] for place in sorted(chosen)]

    def asked_of(self, present: int) -> int:
        """How many clients a round asks when `present` are there."""
        if self.sample is not None:
            return min(self.sample, present)
        return present if self.fraction is None else max(1, round(self.fraction * present))


@dataclass(frozen=True, kw_only=True)
class Order(Answer):
    """The server's order to a client: train the model with digest `base`, and answer as the settings state."""

    run: str
    round: int
    base: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _DIGEST.fullmatch(self.base):
            raise ValueError("base is not the digest of a model")

    @classmethod
    def of(cls, plan: Plan, number: int, base: str) -> "Order":
        """The order for round `number`, which starts from the model with digest `base`."""
        answer = {each.name: getattr(plan, each.name) for each in fields(Answer)}
        return cls(run=plan.name, round=number, base=base, **answer)

    def message(self) -> dict[str, Any]:
        """The order as a message."""
        return asdict(self)

    @classmethod
    def parse(cls, message: Mapping[str, Any]) -> "Order":
        """The order in a message from the server. Raises SchemaError for anything else."""
        wanted = {each.name for each in fields(cls)}
        if missing := wanted - message.keys():
            raise SchemaError(f"the server's order lacks {', '.join(sorted(missing))}")
        if message.keys() != wanted:
            raise SchemaError("the server's order has fields that this client does not know")
        try:
            return cls(**message)
        except ValueError as error:
            raise SchemaError(f"the server's order cannot be followed: {error}") from None


def _fits(value: object, annotation: Any) -> bool:
    """Whether a value is of an annotated type: a class, a Literal, or a union of them. True is no int."""
    if get_origin(annotation) is Annotated:
        return _fits(value, get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if isinstance(annotation, UnionType):
        return any(_fits(value, each) for each in get_args(annotation))
    return type(value) is annotation or (annotation is float and type(value) is int)
