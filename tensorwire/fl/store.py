"""The server's state on disk: one folder, in which each file gets its name only when it is complete.

`model.tw` is the model at the beginning of the round; `versions.py` writes what clients receive beside it.
`round-N/asked.json` names the clients that the round asks, if they were drawn. `round-N/update-CLIENT.tw` is an update
that counts; `round-N/closed.json` names the clients whose updates the round counts. Other files are left alone.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

import numpy.typing as npt

import tensorwire
from tensorwire.errors import SchemaError, StorageError, WireError
from tensorwire.fl.members import NAME
from tensorwire.limits import DEFAULT, Limits
from tensorwire.storage import write_file
from tensorwire.storage.parts import discard_parts
from tensorwire.updates import Terms, arrays

Model = dict[str, npt.NDArray[Any]]

_ROUND: Final = re.compile(r"round-(\d+)")
_OURS: Final = re.compile(rf"update-{NAME.pattern}\.tw|(asked|closed)\.json|\..*\.(part|done)")
_UPDATE: Final = re.compile(rf"update-({NAME.pattern})\.tw")


class Store:
    """The folder of one run. `on_note`: called with a line of text for each unexpected or damaged file."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        run: str,
        on_note: Callable[[str], None],
        *,
        limits: Limits = DEFAULT,
    ) -> None:
        self._folder = os.fspath(folder)
        self._limits = limits
        self._run = run
        self._on_note = on_note
        os.makedirs(self._folder, exist_ok=True)

    def load(self, initial: Callable[[], Mapping[str, Any]]) -> tuple[int, Model]:
        """The current round and its model; the first time, `initial()`, whose tensors are then used as the model.

        Raises SchemaError if the folder holds a different run, StorageError if its model is missing.
        """
        path = self._path("model.tw")
        rounds = self._rounds()
        if not os.path.exists(path):
            if rounds:
                raise StorageError(f"{path} is gone, but a run has begun: put it back, or remove {self._folder}")
            model = arrays(initial())
            self.save(0, model)
            return 0, model
        with tensorwire.open_file(path, limits=self._limits) as file:
            terms = Terms.parse(file.metadata)
        if terms.run != self._run:
            raise SchemaError(f"{self._folder} holds run {terms.run!r}, not {self._run!r}")
        return terms.round, self.model()

    def model(self) -> Model:
        """The model on disk. Raises a WireError that says what to do if it is damaged."""
        try:
            model: Model = tensorwire.numpy.load_file(self._path("model.tw"), limits=self._limits)
            return model
        except WireError as error:
            error.detail += f"; put back a copy of the model, or remove {self._folder} to start again"
            raise

    def save(self, number: int, model: Model) -> None:
        """Begin round `number` with `model`, and remove files that only earlier rounds needed."""
        metadata = Terms(self._run, number).metadata()
        tensorwire.numpy.save_file(model, self._path("model.tw"), metadata=metadata, limits=self._limits)
        for other in self._rounds():
            if other < number:
                self._remove(f"round-{other}")
        with suppress(FileNotFoundError):
            os.unlink(self.optimizer(number - 1))

    def optimizer(self, number: int) -> str:
        """The path of the optimizer's state at the beginning of round `number`."""
        return self._path(f"optimizer-{number}.tw")

    def begin(self, number: int) -> None:
        """Create the folder of a round."""
        os.makedirs(self._path(f"round-{number}"), exist_ok=True)

    def update(self, number: int, client: str) -> str:
        """The path of a client's update."""
        return self._path(f"round-{number}", f"update-{client}.tw")

    def delivered(self, number: int) -> list[str]:
        """The clients whose updates are in the folder. Reports other files."""
        found = []
        for name in sorted(os.listdir(self._path(f"round-{number}"))):
            if match := _UPDATE.fullmatch(name):
                found.append(match[1])
            elif not _OURS.fullmatch(name):
                self._on_note(f"{self._path(f'round-{number}', name)} is not an update of this run and is left alone")
        return found

    def drop(self, number: int, client: str, *, parts_only: bool = False) -> None:
        """Remove a client's update with its journal, or a partly received update."""
        with suppress(FileNotFoundError):
            discard_parts(self.update(number, client), notes=not parts_only)
            if not parts_only:
                os.unlink(self.update(number, client))

    def write(self, number: int, what: str, clients: list[str]) -> None:
        """Record the clients that the round asks (`what` is "asked"), or whose updates it counts ("closed")."""
        write_file(self._path(f"round-{number}", f"{what}.json"), [json.dumps(clients).encode()])

    def read(self, number: int, what: str) -> list[str] | None:
        """The recorded clients, if any. Reports an unreadable record, which then counts as not written."""
        path = self._path(f"round-{number}", f"{what}.json")
        try:
            with open(path, encoding="ascii") as file:
                names = json.load(file)
            if isinstance(names, list) and all(isinstance(name, str) and NAME.fullmatch(name) for name in names):
                return names
            self._on_note(f"{path} is not a list of clients, and is decided again")
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            self._on_note(f"{path} cannot be read ({error}), and is decided again")
        return None

    def _remove(self, folder: str) -> None:
        """Remove the files of an earlier round, and its folder unless other files are in it."""
        with suppress(OSError):
            for name in filter(_OURS.fullmatch, os.listdir(self._path(folder))):
                os.unlink(self._path(folder, name))
            os.rmdir(self._path(folder))

    def _rounds(self) -> list[int]:
        return [int(match[1]) for name in os.listdir(self._folder) if (match := _ROUND.fullmatch(name))]

    def _path(self, *names: str) -> str:
        return os.path.join(self._folder, *names)
