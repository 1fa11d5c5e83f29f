"""What a server hands out: the model of each round, whole, and from one round to the next what has changed.

A version is what clients hold of a model. Where a plan sends whole models, that is what their codec makes of the
model. Where it sends differences, a version is the one before plus a difference that was encoded once: what its codec
drops is part of the next difference. The difference leads whoever holds the version before to the very same bits.

Each version is a stream in `broadcast-N.tw`, and the digest of that stream is its name, however it travelled: the same
tensors under the same terms are the same bytes, so that a client which has added a difference to what it holds writes
the server's file and knows by its digest that it has. `difference-N.tw` leads from version N - 1 to version N and
stands only while it does. A client that holds none of the versions from which differences lead here gets the whole
stream; a lossless patch would be another way, and its place is `way`.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final, NamedTuple

import tensorwire
from tensorwire.errors import TensorwireError
from tensorwire.fl.plan import Plan
from tensorwire.storage import write_file
from tensorwire.transfer import Frames, Recorded
from tensorwire.updates import (
    Arrays,
    Terms,
    Views,
    check_update,
    encode,
    exact_vectors,
    receive,
    subtract,
    views,
)
from tensorwire.wire import StreamStart

_OURS: Final = re.compile(r"(broadcast|difference)-(\d+)\.tw")


class Way(NamedTuple):
    """A stream that takes whoever holds version `held` on: the difference to the next, or a whole one from nothing."""

    held: str
    path: str
    size: int

    @property
    def kind(self) -> str:
        """What it is called when it is offered."""
        return "difference" if self.held else "model"


class Versions:
    """The versions of a run in a folder. `on_note`: called with a line of text for what an operator should know."""

    def __init__(
        self, folder: str | os.PathLike[str], plan: Plan, on_note: Callable[[str], None] = lambda line: None
    ) -> None:
        self._folder = os.fspath(folder)
        self._plan = plan
        self._codec = exact_vectors(plan.down)
        self._on_note = on_note
        self._ways: dict[int, Way] = {}  # by the number of the version that each leads to
        self.base = ""  # the name of the newest version

    def begin(self, number: int, model: Arrays) -> None:
        """Make version `number`, of `model`, where it does not stand there as it was made; forget what is too old."""
        path = self._path("broadcast", number)
        if not self._standing(path):
            with suppress(FileNotFoundError):
                os.unlink(self._path("difference", number))
            if self._plan.down_kind == "weights":
                write_file(path, self._encoded(views(model), Terms(self._plan.name, number)))
            else:
                write_file(path, stream(views(self._next(number, model)), self._plan.name, number))
        new = Way("", path, os.path.getsize(path))
        # In this order, as clients may ask meanwhile: whoever hears of the new version finds the ways to it.
        self._ways, self._whole = self._differences(number, new.size), new
        self.base = Recorded(path).digest
        self._forget(number)

    def way(self, held: object) -> list[Way]:
        """The streams that lead whoever holds the version named `held` to the newest one, one after the other."""
        ways = [*self._ways.values()]
        for first, way in enumerate(ways):
            if way.held == held:
                return ways[first:]
        return [self._whole]

    def _next(self, number: int, model: Arrays) -> Arrays:
        """What clients will hold: the last version and a difference, made here; the model itself where that fails."""
        before, path = self._path("broadcast", number - 1), self._path("difference", number)
        if number == 0:
            return model
        try:
            held: Arrays = tensorwire.numpy.load_file(before)
            terms = Terms(self._plan.name, number, Recorded(before).digest, kind="difference")
            write_file(path, self._encoded(subtract(model, held), terms))
            with open(path, "rb", buffering=0) as file:
                check_update(file, held, terms)  # the difference of two finite numbers need not be one
            with open(path, "rb", buffering=0) as file:
                receive(file, held, held=terms.base)
        except (TensorwireError, OSError) as error:
            self._on_note(f"round {number} is sent whole, and not as a difference: {error}")
            with suppress(FileNotFoundError):
                os.unlink(path)
            return model
        return held

    def _encoded(self, tensors: Views, terms: Terms) -> Iterator[Any]:
        seed = self._plan.seed_of(terms.run, terms.round, "")
        return encode(tensors, terms, codec=self._codec, stochastic=seed)

    def _differences(self, number: int, most: int) -> dict[int, Way]:
        """Those that lead to version `number`, as many as take no more than `most` bytes.

        Those that were found for the version before are not read again.
        """
        found: dict[int, Way] = {}
        while number > 0:
            way = self._ways.get(number) or self._difference(number)
            if way is None or way.size > most:
                break
            found[number] = way
            number, most = number - 1, most - way.size
        return dict(sorted(found.items()))

    def _difference(self, number: int) -> Way | None:
        path = self._path("difference", number)
        terms = self._standing(path)
        return None if terms is None else Way(terms.base, path, os.path.getsize(path))

    def _forget(self, number: int) -> None:
        """Remove versions before this one, and differences that nobody is sent any more."""
        for name in os.listdir(self._folder):
            if match := _OURS.fullmatch(name):
                kept = {number} if match[1] == "broadcast" else self._ways.keys()
                if int(match[2]) not in kept:
                    os.unlink(os.path.join(self._folder, name))

    def _standing(self, path: str) -> Terms | None:
        """The terms of a stream that stands there whole; a damaged one is removed."""
        terms = whole(path)
        if terms is None and os.path.lexists(path):
            self._on_note(f"{path} is damaged, and made anew or done without")
            os.unlink(path)
        return terms

    def _path(self, kind: str, number: int) -> str:
        return os.path.join(self._folder, f"{kind}-{number}.tw")


def stream(tensors: Views, run: str, number: int) -> Iterator[Any]:
    """The buffers of a version as a stream: the same for everybody who holds the same tensors."""
    return encode(tensors, Terms(run, number))


def whole(path: str) -> Terms | None:
    """The terms of a stream on the disk, if it is all there, as it was written."""
    terms = None
    try:
        with open(path, "rb", buffering=0) as file:
            for frame in Frames(file):
                if isinstance(frame.event, StreamStart):
                    terms = Terms.parse(dict(frame.event.info.metadata))
    except (OSError, TensorwireError):
        return None
    return terms
