"""A whole run on one machine: a server and its clients, each a process of its own, talking over loopback."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, Final

import tensorwire
from tensorwire.errors import TensorwireError
from tensorwire.fl.plan import Plan, to_arguments
from tensorwire.fl.task import Task

Row = dict[str, Any]

# As the command `tensorwire` does, which does not look for packages in the current folder.
_COMMAND: Final = "import sys; sys.path = [p for p in sys.path if p]; from tensorwire.fl.local import child; child()"
_START: Final = 60.0  # seconds that the server has to listen
_END: Final = 30.0  # seconds that each process has to end once the run has
_STOP: Final = 0.5  # seconds that all processes have to end once they are told to


class RunError(TensorwireError):
    """A process of the run failed; its log says why."""


def run(task: Task, plan: Plan, out: Path, asked: Sequence[str]) -> Iterator[Row]:
    """Run a plan, and give a row as each round ends; the first row is the model at the start.

    A row has `round`, the `loss` of the model after it, the `bytes` that went over the sockets until then and the
    `fp32_bytes` of the same tensors without codecs, `server_mib` and `seconds`. `out`: where folders and logs stand.
    `asked`: options of `tensorwire fl` that name the task. Raises RunError where a process fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    tensorwire.save_file(dict(task.initial()), out / "initial.tw")
    processes: list[_Process] = []
    try:
        listen = ["--listen=127.0.0.1:0", f"--state={out / 'state'}", f"--initial={out / 'initial.tw'}"]
        server = _Process(out / "server.log", ["server", *listen, *to_arguments(plan), *asked], piped=True)
        processes.append(server)
        where = f"127.0.0.1:{_port(server)}"
        for number in range(plan.clients):
            mine = [f"--number={number}", f"--clients={plan.clients}", f"--folder={out / f'client-{number}'}"]
            mine += ["--evaluate"] if number == 0 else []
            processes.append(_Process(out / f"client-{number}.log", ["client", where, *mine, *asked]))
        yield from _rows(task, server, out / "state", plan)
        for process in processes:
            process.finish()
    finally:
        _stop(processes)


def child() -> None:
    """One process of a run, which ends with the run's own: also where that was killed, or just about to know of us."""
    from tensorwire.cli import main

    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(main())


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # a pipe that nobody writes to: it ends with whoever holds its other end
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_STOP)
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def _stop(processes: "Sequence[_Process]") -> None:
    """End what still runs, all at once."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + _STOP
    while time.monotonic() < until and any(process.alive() for process in processes):
        time.sleep(0.01)
    for process in processes:
        process.close()


def leftovers(out: Path) -> list[Path]:
    """What a run has left in a folder, or what stands where one would write."""
    names = ("state", "initial.tw", "rows.json", "curves.png", "server.log", "client-*")
    return sorted(path for name in names for path in out.glob(name))


def _rows(task: Task, server: "_Process", state: Path, plan: Plan) -> Iterator[Row]:
    # What a round would move without codecs: the model to every client, and as much back.
    plain = 2 * plan.clients * sum(4 * _elements(tensor) for tensor in task.initial().values())
    before: Row = {"round": 0, "bytes": 0, "fp32_bytes": 0, "server_mib": 0.0, "seconds": 0.0}
    for line in server.lines():
        row = json.loads(line)
        # What a client measured is the loss of the model that the round began with.
        loss = next(report["loss"] for report in row["clients"].values() if "loss" in report)
        yield {**before, "loss": loss}
        number = row["round"] + 1
        before = {
            "round": number,
            "bytes": before["bytes"] + row["down"] + row["up"],
            "fp32_bytes": number * plain,
            "server_mib": row["server_mib"],
            "seconds": row["seconds"],
            "clients": row["clients"],
        }
    yield {**before, "loss": task.evaluate(_like(task.initial(), tensorwire.load_file(state / "model.tw")))}


def _elements(tensor: Any) -> int:
    return prod(tensor.shape)


def _like(initial: Any, model: Any) -> Any:
    """Arrays as tensors of the kind that the task works with."""
    if all(type(tensor).__module__.partition(".")[0] != "torch" for tensor in initial.values()):
        return model
    return tensorwire.torch.loads(tensorwire.dumps(model))


class _Process:
    """`tensorwire fl ...` with a log."""

    def __init__(self, log: Path, arguments: Sequence[str], *, piped: bool = False) -> None:
        self.log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, "fl", *arguments],
                stdout=subprocess.PIPE if piped else file,
                stderr=file,
                stdin=subprocess.PIPE,
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

    def terminate(self) -> None:
        """Tell it to end."""
        if self.alive():
            self._process.terminate()

    def close(self) -> None:
        """Whatever it does, it is gone after this."""
        if self.alive():
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


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


def draw(rows: Sequence[Row], plan: Plan, path: Path) -> bool:
    """Loss over rounds and over bytes, and the server's memory, as one picture; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False
    figure = Figure(figsize=(12, 4), layout="constrained")
    sent = "differences" if plan.kind == "difference" else plan.kind
    figure.suptitle(f"{plan.clients} clients, {sent} up as {plan.up}, models down as {plan.down}")
    by_round, by_bytes, memory = figure.subplots(1, 3)
    rounds, losses = [row["round"] for row in rows], [row["loss"] for row in rows]
    unit, name = (1e6, "MB") if rows[-1]["fp32_bytes"] >= 1e6 else (1e3, "kB")
    moved = [row["bytes"] / unit for row in rows]
    plain = [row["fp32_bytes"] / unit for row in rows]
    peaks = [row["server_mib"] for row in rows[1:]]
    by_round.plot(rounds, losses, marker="o", markersize=3)
    by_bytes.plot(moved, losses, marker="o", markersize=3, label=f"{plan.up} up, {plan.down} down")
    by_bytes.plot(plain, losses, linestyle="--", color="#666666", label="the same rounds as fp32")
    by_bytes.legend(frameon=False)
    memory.plot(rounds[1:], peaks, marker="o", markersize=3)
    memory.set_ylim(0, 1.15 * max(peaks))
    for axes, x, y in (
        (by_round, "round", "loss on held-out data"),
        (by_bytes, f"{name} over the sockets", "loss on held-out data"),
        (memory, "round", "peak memory of the server, MiB"),
    ):
        axes.set(xlabel=x, ylabel=y)
        axes.spines[["top", "right"]].set_visible(False)
        if x == "round":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=100)
    return True
