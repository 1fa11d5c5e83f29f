"""A whole run on one machine: a server and its clients, each a process of its own, talking over loopback."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import tensorwire
from tensorwire.errors import TensorwireError
from tensorwire.fl.plan import Plan, to_arguments
from tensorwire.fl.task import Task

Row = dict[str, Any]

# As the command `tensorwire` does, which does not look for packages in the current folder.
_COMMAND: Final = "import sys; sys.path = [p for p in sys.path if p]; from tensorwire.cli import main; sys.exit(main())"
_START: Final = 60.0  # seconds that the server has to listen
_END: Final = 30.0  # seconds that each process has to end once the run has


class RunError(TensorwireError):
    """A process of the run failed; its log says why."""


def run(task: Task, plan: Plan, out: Path, asked: Sequence[str]) -> Iterator[Row]:
    """Run a plan, and give a row as each round ends; the first row is the model at the start.

    A row has `round`, the `loss` of the model after it, the `bytes` that went over the sockets until then, `server_mib`
    and `seconds`. `out`: where folders and logs stand. `asked`: options of `tensorwire fl` that name the task.
    Raises RunError where a process fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    tensorwire.save_file(dict(task.initial()), out / "initial.tw")
    with ExitStack() as stack:
        listen = ["--listen=127.0.0.1:0", f"--state={out / 'state'}", f"--initial={out / 'initial.tw'}"]
        server = stack.enter_context(
            _Process(out / "server.log", ["server", *listen, *to_arguments(plan), *asked], piped=True)
        )
        where = f"127.0.0.1:{_port(server)}"
        processes = [server]
        for number in range(plan.clients):
            mine = [f"--number={number}", f"--clients={plan.clients}", f"--folder={out / f'client-{number}'}"]
            mine += ["--evaluate"] if number == 0 else []
            log = out / f"client-{number}.log"
            processes.append(stack.enter_context(_Process(log, ["client", where, *mine, *asked])))
        yield from _rows(task, server, out / "state")
        for process in processes:
            process.finish()


def _rows(task: Task, server: "_Process", state: Path) -> Iterator[Row]:
    before: Row = {"round": 0, "bytes": 0, "server_mib": 0.0, "seconds": 0.0}
    for line in server.lines():
        row = json.loads(line)
        # What a client measured is the loss of the model that the round began with.
        loss = next(report["loss"] for report in row["clients"].values() if "loss" in report)
        yield {**before, "loss": loss}
        moved = before["bytes"] + row["down"] + row["up"]
        before = {
            "round": row["round"] + 1,
            "bytes": moved,
            "server_mib": row["server_mib"],
            "seconds": row["seconds"],
            "clients": row["clients"],
        }
    yield {**before, "loss": task.evaluate(_like(task.initial(), tensorwire.load_file(state / "model.tw")))}


def _like(initial: Any, model: Any) -> Any:
    """Arrays as tensors of the kind that the task works with."""
    if all(type(tensor).__module__.partition(".")[0] != "torch" for tensor in initial.values()):
        return model
    return tensorwire.torch.loads(tensorwire.dumps(model))


class _Process:
    """`tensorwire fl ...` with a log; ended when the block is left."""

    def __init__(self, log: Path, arguments: Sequence[str], *, piped: bool = False) -> None:
        self.log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, "fl", *arguments],
                stdout=subprocess.PIPE if piped else file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                # One core each: more threads than cores only wait for one another.
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                text=True,
            )

    def lines(self) -> Iterator[str]:
        """What it prints."""
        assert self._process.stdout is not None
        yield from self._process.stdout
        self.finish()

    def alive(self) -> bool:
        return self._process.poll() is None

    def finish(self) -> None:
        """Wait for its end. Raises RunError where it failed."""
        try:
            code = self._process.wait(_END)
        except subprocess.TimeoutExpired:
            code = None
        if code != 0:
            last = self.log.read_text(errors="replace").strip().rpartition("\n")[2]
            what = "does not end" if code is None else f"failed ({code})"
            raise RunError(f"{self.log.stem} {what}: {last}; see {self.log}")

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.alive():
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _port(server: _Process) -> int:
    until = time.monotonic() + _START
    while time.monotonic() < until:
        for line in server.log.read_text().splitlines():
            if line.startswith("listening on "):
                return int(line.rpartition(":")[2])
        if not server.alive():
            server.finish()
        time.sleep(0.02)
    raise RunError(f"the server does not listen; see {server.log}")


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Loss over rounds and over bytes, and the server's memory, as one picture; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    rounds, losses = [row["round"] for row in rows], [row["loss"] for row in rows]
    for axes, x, label in zip(
        figure.subplots(1, 3),
        (rounds, [row["bytes"] / 1e6 for row in rows], rounds[1:]),
        ("round", "MB over the sockets", "round"),
        strict=True,
    ):
        memory = axes is figure.axes[2]
        axes.plot(x, [row["server_mib"] for row in rows[1:]] if memory else losses, marker="o", markersize=3)
        axes.set_xlabel(label)
        if label == "round":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("peak memory of the server, MiB" if memory else "loss on held-out data")
        axes.set_ylim(bottom=0) if memory else None
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    return True
