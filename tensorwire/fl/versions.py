"""What a server sends: the model of each round, whole, and the changes from one round to the next.

A version is the model as clients hold it. If a plan sends whole models or patches, it is the model as decoded from
their codec. If it sends differences, it is the previous version plus a difference that was encoded once; what the codec
drops is part of the next difference. Differences and patches give every client with the previous version the same bits.

Each version is a stream in `broadcast-N.tw`, and its name is the digest of that stream, however it was sent. The same
tensors under the same terms are the same bytes, so a client that has applied a step writes the same file as the server,
and verifies it by its digest. `difference-N.tw` or `patch-N.tw` is the step from version N - 1 to version N, and is
kept only while it leads to the newest version. A client that cannot reach the newest version by steps gets it whole:
the version itself or, with patches, `whole-N.tw`, which decodes to the version.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, NamedTuple

import tensorwire
from tensorwire.errors import TensorwireError
from tensorwire.fl.plan import Plan
from tensorwire.limits import DEFAULT, Limits
from tensorwire.storage import write_file
from tensorwire.streams import size_text
from tensorwire.transfer import Recorded
from tensorwire.updates import (
    Arrays,
    Rules,
    Terms,
    Views,
    check_update,
    empty_like,
    encode,
    encode_patch,
    exact_vectors,
    receive,
    subtract,
    terms_of,
    views,
)

STEPS: Final = ("difference", "patch")  # kinds of streams that lead from one version to the next
_OURS: Final = re.compile(rf"(broadcast|whole|{'|'.join(STEPS)})-(\d+)\.tw")


class Way(NamedTuple):
    """A stream that leads from version `held` to the next one, or ("") from nothing to the newest.

    `kind`: its name in an offer: one of `STEPS`; "model", the version itself; or "encoded", which decodes to the
    version.
    """

    kind: str
    path: str
    size: int
    held: str = ""


class Versions:
    """The versions of a run in a folder. `on_note`: called with lines of text for the operator."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        plan: Plan,
        on_note: Callable[[str], None] = lambda line: None,
        *,
        limits: Limits = DEFAULT,
    ) -> None:
        self._folder = os.fspath(folder)
        self._limits = limits
        self._plan = plan
        self._codec = exact_vectors(plan.down)
        self._on_note = on_note
        self._ways: dict[int, Way] = {}  # by the number of the version that each leads to
        self.base = ""  # the name of the newest version

    def begin(self, number: int, model: Arrays) -> None:
        """Make version `number` from `model`, unless it exists undamaged; remove versions that are too old."""
        path = self._path("broadcast", number)
        if not self._standing(path):
            for kind in ("whole", *STEPS):
                self._remove(kind, number)
            self._make(number, model)
        new = self._newest(number)
        # The ways come first, because clients may ask meanwhile: one that hears of the new version can fetch it.
        self._ways, self._whole = self._steps(number, new.size), new
        self.base = Recorded(path).digest
        self._forget(number)

    def way(self, held: object) -> list[Way]:
        """The streams that lead from the version named `held` to the newest one, in order."""
        ways = [*self._ways.values()]
        for first, way in enumerate(ways):
            if way.held == held:
                return ways[first:]
        return [self._whole]

    def _make(self, number: int, model: Arrays) -> None:
        """Write version `number`, after the step that leads to it."""
        path, terms, kind = self._path("broadcast", number), Terms(self._plan.name, number), self._plan.down_kind
        if kind == "weights":
            write_file(path, self._encoded(views(model), terms))
            return
        version = self._sent(model, terms) if kind == "patch" else model
        if number > 0:
            try:
                version = self._step_towards(version, terms)
            except (TensorwireError, OSError) as error:
                self._on_note(f"round {number} is sent whole, and not as a {kind}: {error}")
                self._remove(kind, number)
        write_file(path, stream(views(version), terms.run, number, limits=self._limits))

    def _sent(self, model: Arrays, terms: Terms) -> Arrays:
        """The model as clients decode it."""
        if self._plan.down == "raw":
            return model
        version, path = empty_like(model), self._path("whole", terms.round)
        write_file(path, self._encoded(views(model), terms))
        with open(path, "rb", buffering=0) as file:
            receive(file, version, limits=self._limits)
        return version

    def _step_towards(self, version: Arrays, terms: Terms) -> Arrays:
        """Write the step from the previous version. Returns what it leads to: with differences, nearly `version`."""
        before, path = self._path("broadcast", terms.round - 1), self._path(self._plan.down_kind, terms.round)
        held: Arrays = tensorwire.numpy.load_file(before, limits=self._limits)
        terms = replace(terms, base=Recorded(before).digest)
        if self._plan.down_kind == "patch":
            write_file(path, encode_patch(version, held, terms, limits=self._limits))
            return version
        write_file(path, self._encoded(subtract(version, held), replace(terms, kind="difference")))
        with open(path, "rb", buffering=0) as file:
            # The difference of two finite numbers need not be one.
            check_update(file, held, terms, Rules(limits=self._limits))
        with open(path, "rb", buffering=0) as file:
            receive(file, held, held=terms.base, limits=self._limits)
        return held

    def _encoded(self, tensors: Views, terms: Terms) -> Iterator[Any]:
        seed = self._plan.seed_of(terms.run, terms.round, "")
        return encode(tensors, terms, codec=self._codec, stochastic=seed, limits=self._limits)

    def _newest(self, number: int) -> Way:
        """The whole version `number`: in its codec if there is such a file, otherwise the version itself."""
        kind, path = "encoded", self._path("whole", number)
        if self._standing(path) is None:
            kind, path = "model", self._path("broadcast", number)
        return Way(kind, path, os.path.getsize(path))

    def _steps(self, number: int, most: int) -> dict[int, Way]:
        """The steps that lead to version `number`, as long as they take no more than `most` bytes together.

        Steps that are already known from the previous version are not read again.
        """
        found: dict[int, Way] = {}
        while number > 0:
            way = self._ways.get(number) or self._step(number)
            if way is None or way.size > most:
                if way is not None and way.kind == "patch" and not found:
                    sizes = f"{size_text(way.size)} instead of {size_text(most)}"
                    self._on_note(f"round {number} is sent whole, and not as a patch, which takes {sizes}")
                break
            found[number] = way
            number, most = number - 1, most - way.size
        return dict(sorted(found.items()))

    def _step(self, number: int) -> Way | None:
        for kind in STEPS:
            path = self._path(kind, number)
            terms = self._standing(path)
            if terms is not None and terms.base:
                return Way(kind, path, os.path.getsize(path), terms.base)
        return None

    def _forget(self, number: int) -> None:
        """Remove earlier versions, and steps that no client is sent any more."""
        for name in os.listdir(self._folder):
            if match := _OURS.fullmatch(name):
                kept = self._ways.keys() if match[1] in STEPS else {number}
                if int(match[2]) not in kept:
                    os.unlink(os.path.join(self._folder, name))

    def _standing(self, path: str) -> Terms | None:
        """The terms of the stream in a file, if there is an undamaged one; a damaged one is removed."""
        terms = terms_of(path)
        if terms is None and os.path.lexists(path):
            self._on_note(f"{path} is damaged and removed; it is made again if it is needed")
            os.unlink(path)
        return terms

    def _remove(self, kind: str, number: int) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._path(kind, number))

    def _path(self, kind: str, number: int) -> str:
        return os.path.join(self._folder, f"{kind}-{number}.tw")


def stream(tensors: Views, run: str, number: int, *, limits: Limits = DEFAULT) -> Iterator[Any]:
    """The buffers of a version as a stream: the same for everybody who holds the same tensors."""
    return encode(tensors, Terms(run, number), limits=limits)
