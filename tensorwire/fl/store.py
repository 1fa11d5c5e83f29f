"""What the server must not forget: one folder, each file under its name only when complete.

`model.tw` is the model that the round begins with, `round-N/broadcast.tw` that model encoded, once, to be sent to
whoever asks. `round-N/update-CLIENT.tw` is an update that counts; `round-N/closed.json` says whose the round counts.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

import tensorwire
from tensorwire.errors import SchemaError
from tensorwire.storage import write_file
from tensorwire.transfer import Recorded
from tensorwire.updates import Terms, arrays

Model = dict[str, npt.NDArray[Any]]


class Store:
    """The folder of one run."""

    def __init__(self, folder: str | os.PathLike[str], run: str) -> None:
        self._folder = os.fspath(folder)
        self._run = run
        os.makedirs(self._folder, exist_ok=True)

    def load(self, initial: Callable[[], Mapping[str, Any]]) -> tuple[int, Model]:
        """The round that the run is in, and its model; the first time `initial()`, whose tensors become the model's.

        Raises SchemaError where the folder holds another run.
        """
        path = os.path.join(self._folder, "model.tw")
        if not os.path.exists(path):
            model = arrays(initial())
            self.save(0, model)
            return 0, model
        with tensorwire.open_file(path) as file:
            terms = Terms.parse(file.metadata)
        if terms.run != self._run:
            raise SchemaError(f"{self._folder} holds run {terms.run!r}, not {self._run!r}")
        return terms.round, tensorwire.numpy.load_file(path)

    def save(self, number: int, model: Model) -> None:
        """Let round `number` begin with `model`, and remove what only the round before it needed."""
        path = os.path.join(self._folder, "model.tw")
        tensorwire.numpy.save_file(model, path, metadata=Terms(self._run, number).metadata())
        shutil.rmtree(self._round(number - 1), ignore_errors=True)
        os.makedirs(self._round(number), exist_ok=True)

    def broadcast(self, number: int) -> str:
        """The path of the round's encoded model."""
        return os.path.join(self._round(number), "broadcast.tw")

    def broadcast_digest(self, number: int) -> str:
        """The digest of the round's encoded model, in hexadecimal."""
        return Recorded(self.broadcast(number)).digest

    def update(self, number: int, client: str) -> str:
        """The path of a client's update."""
        return os.path.join(self._round(number), f"update-{client}.tw")

    def delivered(self, number: int) -> list[str]:
        """The clients whose updates are in."""
        names = (name for name in os.listdir(self._round(number)) if name.startswith("update-"))
        return sorted(name.removeprefix("update-").removesuffix(".tw") for name in names)

    def close(self, number: int, clients: list[str]) -> None:
        """Write down whose updates the round counts."""
        write_file(os.path.join(self._round(number), "closed.json"), [json.dumps(clients).encode()])

    def closed(self, number: int) -> list[str] | None:
        """Whose updates the round counts, if that has been decided."""
        try:
            with open(os.path.join(self._round(number), "closed.json"), encoding="ascii") as file:
                return [str(client) for client in json.load(file)]
        except FileNotFoundError:
            return None

    def _round(self, number: int) -> str:
        return os.path.join(self._folder, f"round-{number}")
