"""`tensorwire fl`: the reference federated-learning loop, on this machine or with its parts on several."""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

import tensorwire
from tensorwire.bench import highest
from tensorwire.cli.common import UsageError, add_limits, print_json, verb
from tensorwire.cli.network import PORT, SECURITY, add_security, address, connection_tls, listener_tls
from tensorwire.cli.network import where as show_address
from tensorwire.cli.outputs import add_force
from tensorwire.cli.process import run_async
from tensorwire.cli.settings import add_settings, plan_of
from tensorwire.errors import TensorwireError, TransportError, counted
from tensorwire.fl.plan import Plan
from tensorwire.storage import write_file
from tensorwire.streams import size_text

_TEXT: Final = f"""\
A task is a function "module:function" that returns a `tensorwire.fl.task.Task`; --set NAME=VALUE passes parameters
to it. The default trains a small language model on the Python standard library (needs the extra `fl`).

{SECURITY}
examples:
  tensorwire fl run --clients 4 --rounds 10 --up nf4 --down bf16 --out run
  tensorwire fl run --clients 2 --rounds 3 --set lora=4 \\
      --kind difference --feedback --out adapters
  tensorwire fl server --listen 0.0.0.0 --cert server.pem --key server.key \\
      --clients 2 --rounds 10 --state state
  tensorwire fl client host.example --ca authority.pem --number 0 --folder me
"""
_TASK: Final = "tensorwire.fl.task:language_model"


def add_parser(verbs: Any) -> None:
    """Add this command to the command line."""
    parser = verb(verbs, "fl", None, summary="run the reference federated-learning loop", text=_TEXT)
    parts = parser.add_subparsers(title="parts", metavar="PART", required=True)

    run = parts.add_parser("run", help="a server and its clients on this machine; curves and rows under --out")
    add_settings(run)
    _add_task(run)
    run.add_argument("--out", metavar="DIR", default="fl-run", help="rows.json, curves.png and the model (fl-run)")
    run.add_argument("--json", action="store_true", help="also print the rows as JSON on stdout")
    add_limits(run)
    add_force(run, "the files of an earlier run in DIR")
    run.set_defaults(run=_run)

    server = parts.add_parser("server", help="the server; a row of JSON on stdout for each round")
    add_settings(server)
    _add_task(server)
    server.add_argument(
        "--listen",
        metavar="HOST:PORT",
        type=address,
        default=("127.0.0.1", PORT),
        help=f"address to listen on (127.0.0.1:{PORT})",
    )
    server.add_argument(
        "--state", metavar="DIR", required=True, help="folder for persistent state, from which a restart continues"
    )
    server.add_argument(
        "--initial", metavar="FILE", help="a .tw file to start from instead of the task's initial model"
    )
    server.add_argument(
        "--dashboard", metavar="HOST:PORT", type=address, help="serve a read-only page about the run at this address"
    )
    add_security(server, listens=True)
    add_limits(server)
    server.set_defaults(run=_server)

    client = parts.add_parser("client", help="one client")
    _add_task(client)
    client.add_argument("address", metavar="HOST:PORT", type=address, help="where the server listens")
    client.add_argument("--number", type=int, required=True, help="this client's share of the data: 0, 1, ...")
    client.add_argument("--clients", type=int, default=4, help="number of shares (4)")
    client.add_argument("--name", help="name of this client; as in its certificate, if it has one (client-NUMBER)")
    client.add_argument(
        "--folder", metavar="DIR", required=True, help="folder for persistent state, from which a restart continues"
    )
    client.add_argument("--evaluate", action="store_true", help="also report the loss of each model received")
    client.add_argument(
        "--patience", type=float, default=60, metavar="S", help="give up after S s without success (60)"
    )
    add_security(client, listens=False)
    add_limits(client)
    client.set_defaults(run=_client)


def _add_task(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task", default=_TASK, metavar="MODULE:FUNCTION", help="what to train (a small language model)"
    )
    parser.add_argument(
        "--set", dest="options", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the task"
    )


def _plan(arguments: argparse.Namespace) -> Plan:
    try:
        return plan_of(arguments)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _task(arguments: argparse.Namespace) -> Any:
    from tensorwire.fl import task

    options = {}
    for option in arguments.options:
        name, equals, value = option.partition("=")
        if not equals:
            raise UsageError(f"--set takes NAME=VALUE, not {option!r}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    try:
        return task.load(arguments.task)(clients=arguments.clients, **options)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    except ImportError as error:
        needed = "for the language model: pip install torch transformers peft"
        raise UsageError(f"the task imports {error.name}, which is not installed ({needed})") from None


def _server(arguments: argparse.Namespace) -> int:
    from tensorwire.fl.server import Server

    limits = arguments.limits

    def initial() -> Any:
        if arguments.initial:
            return tensorwire.load_file(arguments.initial, limits=limits)
        return _task(arguments).initial()

    def on_round(row: dict[str, Any]) -> None:
        print(json.dumps({**row, "server_mib": highest() / (1 << 20)}), flush=True)

    server = Server(_plan(arguments), initial, arguments.state, on_round=on_round, on_note=_say, limits=limits)
    with ExitStack() as stack:
        if arguments.dashboard:
            _open_dashboard(stack, server, *arguments.dashboard)
        run_async(_serve(server, arguments))
    return 0


def _open_dashboard(stack: ExitStack, server: Any, host: str, port: int) -> None:
    from tensorwire.fl.dashboard import dashboard

    try:
        port = stack.enter_context(dashboard(server.status, host, port))
    except ImportError as error:
        raise UsageError(f"the dashboard needs {error.name}: pip install 'tensorwire[dashboard]'") from None
    _say(f"dashboard on http://{show_address(host, port)}/")


async def _serve(server: Any, arguments: argparse.Namespace) -> None:
    from tensorwire.transports import AsyncListener

    host, port = arguments.listen
    options = {"tls": listener_tls(arguments, host), "plaintext": arguments.plaintext}
    async with AsyncListener(server.serve, host, port, on_error=_complain, **options) as listener:
        print(f"listening on {host}:{listener.port}", file=sys.stderr, flush=True)
        await server.run()


def _client(arguments: argparse.Namespace) -> int:
    from tensorwire.fl.client import Client
    from tensorwire.transports import TcpTransport

    host, port = arguments.address
    if not 0 <= arguments.number < arguments.clients:
        raise UsageError(
            f"--number must be at least 0 and less than --clients ({arguments.clients}), not {arguments.number}"
        )
    tls = connection_tls(arguments, host)
    task = _task(arguments)
    if arguments.evaluate:
        task = _evaluating(task)
    Client(
        arguments.name or f"client-{arguments.number}",
        arguments.number,
        task,
        lambda: TcpTransport.connect(host, port, tls=tls, plaintext=arguments.plaintext),
        arguments.folder,
        patience=arguments.patience,
        on_refusal=_complain,
        on_step=_say,
        limits=arguments.limits,
    ).run()
    return 0


def _evaluating(task: Any) -> Any:
    """The same task, which also reports the loss of each model that it gets."""
    from tensorwire.fl.task import Task

    def train(state: Any, client: int, round: int) -> Any:
        loss = task.evaluate(state)
        state, weight, metrics = task.train(state, client, round)
        return state, weight, {**metrics, "loss": loss}

    return Task(task.initial, train, task.evaluate)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _complain(error: TensorwireError) -> None:
    if isinstance(error, TransportError) and error.retryable:  # clients come and go
        return
    _say(f"tensorwire: {error}")


def _run(arguments: argparse.Namespace) -> int:
    from tensorwire.cli import local

    out = Path(arguments.out)
    left = local.leftovers(out)
    if left and not arguments.force:
        raise UsageError(f"'{left[0]}' exists: give another --out, or --force to replace the run in it")
    plan, task = _plan(arguments), _task(arguments)
    for path in left:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    asked = [f"--task={arguments.task}", *(f"--set={option}" for option in arguments.options)]
    rows = list(_tracked(local.run(task, plan, out, asked, on_note=_say, limits=arguments.limits), plan.rounds))
    write_file(out / "rows.json", [json.dumps(rows, indent=1).encode()])
    drawn = _drawn(rows, plan, out / "curves.png")
    if arguments.json:
        print_json(rows)
    last = rows[-1]
    loss = f"loss {_shown(rows[0]['loss'])} -> {_shown(last['loss'])} in {counted(last['round'], 'round')}"
    print(f"{loss}, {size_text(last['bytes'])} moved (fp32: {size_text(last['fp32_bytes'])})", file=sys.stderr)
    print(f"{out}/rows.json{', curves.png' if drawn else ''}, state/model.tw", file=sys.stderr)
    return 0


def _drawn(rows: list[dict[str, Any]], plan: Plan, path: Path) -> bool:
    """Draw the curves. Returns False if matplotlib is missing."""
    try:
        from tensorwire.bench.plots import draw_run
    except ImportError:
        return False
    draw_run(rows, plan, path)
    return True


def _shown(loss: float | None) -> str:
    return "not measured" if loss is None else f"{loss:.4f}"


def _tracked(rows: Iterator[dict[str, Any]], rounds: int) -> Iterator[dict[str, Any]]:
    """`rows`, with a progress bar of rounds if stderr is a terminal and tqdm is installed."""
    bar: Any = None
    if sys.stderr.isatty():
        with suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(total=rounds, unit="round")
    try:
        for row in rows:
            yield row
            if bar is not None:
                bar.set_postfix(loss=_shown(row["loss"]))
                bar.update(row["round"] - bar.n)
    finally:
        if bar is not None:
            bar.close()
