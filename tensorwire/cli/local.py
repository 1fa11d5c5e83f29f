"""`tensorwire fl run`: a server and its clients, each a process of its own, talking over loopback."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, Final

import tensorwire
from tensorwire.cli.common import limit_options
from tensorwire.cli.settings import options_of
from tensorwire.errors import TensorwireError
from tensorwire.fl.plan import Plan
from tensorwire.fl.task import Task
from tensorwire.limits import DEFAULT, Limits
from tensorwire.transfer import greet, hear, say
from tensorwire.transports import TcpTransport

Row = dict[str, Any]

# Like the installed command, this does not look for packages in the current folder.
_COMMAND: Final = "import sys; sys.path = [p for p in sys.path if p]; from tensorwire.cli.local import child; child()"
_START: Final = 60.0  # seconds within which the server must listen
_END: Final = 5.0  # seconds within which clients must exit once the run is over
_LOOK: Final = 0.05  # seconds between two checks of the processes
_SHOWN: Final = 5  # lines shown of the log of a failed process
_STOP: Final = 0.5  # seconds within which all processes must exit once they are told to


class RunError(TensorwireError):
    """A process of the run failed; its log says why."""


def run(
    task: Task,
    plan: Plan,
    out: Path,
    asked: Sequence[str],
    *,
    on_note: Callable[[str], None] = lambda text: None,
    limits: Limits = DEFAULT,
) -> Iterator[Row]:
    """Run a plan and yield a row as each round ends; the first row describes the initial model.

    A row has `round`, the `loss` of the model after it (None where nobody measured it), the `bytes` that went over the
    sockets until then and the `fp32_bytes` of the same tensors without codecs, `server_mib`, `seconds`, and of the
    round `clients`, `missing`, `ended` and `counted`. `out`: where folders and logs stand. `asked`: options of
    `tensorwire fl` that name the task. `on_note`: called with a text when a client dies, without which the run goes
    on. `limits`: of all that is sent, received and kept. Raises RunError where the server fails, or all clients have
    died.
    """
    out.mkdir(parents=True, exist_ok=True)
    tensorwire.save_file(dict(task.initial()), out / "initial.tw", limits=limits)
    asked = [*asked, *(f"--limit={each}" for each in limit_options(limits))]
    clients: list[_Process] = []
    listen = ["--listen=127.0.0.1:0", f"--state={out / 'state'}", f"--initial={out / 'initial.tw'}"]
    server = _Process(out, "server", [*listen, *options_of(plan), *asked])
    try:
        port = _port(server)
        for number in range(plan.clients):
            mine = [f"--number={number}", f"--clients={plan.clients}", f"--folder={out / f'client-{number}'}"]
            mine += ["--evaluate"] if number == 0 else []
            clients.append(_Process(out, f"client-{number}", [f"127.0.0.1:{port}", *mine, *asked]))
        yield from _rows(task, _watched(server, clients, port, on_note), out / "state", plan, limits)
        until = time.monotonic() + _END
        while time.monotonic() < until and any(client.alive() for client in clients):
            time.sleep(_LOOK)
        for client in clients:
            if client.alive():
                on_note(f"{client.name} is still running after the end of the run, and is stopped")
    finally:
        _stop([server, *clients])


def _watched(
    server: "_Process", clients: Sequence["_Process"], port: int, on_note: Callable[[str], None]
) -> Iterator[str]:
    """The lines that the server prints. When a client dies, `on_note` and the server are told."""
    living = [*clients]
    begun = ""  # the beginning of a line that the server is still writing
    with server.output.open() as output:
        while True:
            ended = not server.alive()  # checked before its last output is read
            *lines, begun = (begun + output.read()).split("\n")
            yield from lines
            if ended:
                break
            for client in [client for client in living if not client.alive()]:
                living.remove(client)
                if client.code() != 0:
                    on_note(client.obituary())
                    _tell_of_death(client, port)
            if not living and all(client.code() != 0 for client in clients):
                raise RunError(f"no client is left; {clients[-1].obituary()}")
            time.sleep(_LOOK)
    if server.code() != 0:
        raise RunError(server.obituary())


def _tell_of_death(client: "_Process", port: int) -> None:
    with suppress(TensorwireError), TcpTransport.connect("127.0.0.1", port) as transport:
        transport.run(greet("tensorwire.fl"))
        transport.run(say({"client": client.name, "want": "leave", "why": client.failed()}))
        transport.run(hear())


def child() -> None:
    """The main function of each process of a run. It ends when the run's own process ends, even if that was killed."""
    from tensorwire.cli import main

    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(main())


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # nobody writes to this pipe: the read ends when the run's process does
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_STOP)
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def _stop(processes: "Sequence[_Process]") -> None:
    """End all processes that still run, at the same time."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + _STOP
    while time.monotonic() < until and any(process.alive() for process in processes):
        time.sleep(0.01)
    for process in processes:
        process.close()


def leftovers(out: Path) -> list[Path]:
    """Files of an earlier run in a folder, and anything else under the names that a run would write to."""
    names = ("state", "initial.tw", "rows.json", "curves.png", "server.log", "server.out", "client-*")
    return sorted(path for name in names for path in out.glob(name))


def _rows(task: Task, lines: Iterable[str], state: Path, plan: Plan, limits: Limits) -> Iterator[Row]:
    # What a round would move without codecs: the model to every client that it asks, and as much back.
    plain = 2 * plan.asked_of(plan.clients) * sum(4 * _elements(tensor) for tensor in task.initial().values())
    before: Row = {"round": 0, "bytes": 0, "fp32_bytes": 0, "server_mib": 0.0, "seconds": 0.0}
    for line in lines:
        row = json.loads(line)
        # A client measures the loss of the model that the round began with.
        loss = next((report["loss"] for report in row["clients"].values() if "loss" in report), None)
        yield {**before, "loss": loss}
        number = row["round"] + 1
        before = {
            "round": number,
            "bytes": before["bytes"] + row["down"] + row["up"],
            "fp32_bytes": number * plain,
            **{name: row[name] for name in ("server_mib", "seconds", "clients", "missing", "ended", "counted")},
        }
    model = tensorwire.load_file(state / "model.tw", limits=limits)
    yield {**before, "loss": task.evaluate(_like(task.initial(), model, limits))}


def _elements(tensor: Any) -> int:
    return prod(tensor.shape)


def _like(initial: Any, model: Any, limits: Limits) -> Any:
    """Arrays as tensors of the kind that the task works with."""
    if all(type(tensor).__module__.partition(".")[0] != "torch" for tensor in initial.values()):
        return model
    return tensorwire.torch.loads(tensorwire.dumps(model, limits=limits), limits=limits)


class _Process:
    """`tensorwire fl PART ...` with a log. `output`: the file that gets its standard output."""

    def __init__(self, out: Path, name: str, arguments: Sequence[str]) -> None:
        self.name = name
        self.output, self._log = out / f"{name}.out", out / f"{name}.log"
        with self.output.open("wb") as output, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, "fl", name.partition("-")[0], *arguments],
                stdout=output,
                stderr=log,
                stdin=subprocess.PIPE,
                # One core each: more threads than cores only wait for one another.
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            )

    def alive(self) -> bool:
        return self._process.poll() is None

    def code(self) -> int | None:
        return self._process.poll()

    def said(self) -> list[str]:
        """The lines of its log."""
        return self._log.read_text(errors="replace").splitlines()

    def obituary(self) -> str:
        """A text that says that it has failed, and how its log ends."""
        end = "\n".join(f"  {line}" for line in self.said()[-_SHOWN:])
        return f"{self.failed()}; {self._log} ends with\n{end}"

    def failed(self) -> str:
        """A text that says that it has failed."""
        return f"{self.name} has failed (exit code {self.code()})"

    def terminate(self) -> None:
        """Tell it to end."""
        if self.alive():
            self._process.terminate()

    def close(self) -> None:
        """Kill it if it still runs, and wait for it."""
        if self.alive():
            self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def _port(server: _Process) -> int:
    until = time.monotonic() + _START
    while time.monotonic() < until:
        for line in server.said():
            if line.startswith("listening on "):
                return int(line.rpartition(":")[2])
        if not server.alive():
            break
        time.sleep(0.02)
    raise RunError(f"the server does not listen: {server.obituary()}")
