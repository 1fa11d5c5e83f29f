"""A web page that shows a run, and the same figures for Prometheus. Read-only; needs the extra `dashboard`.

/ is a page that the browser reloads every few seconds, /metrics is text for Prometheus, /status.json has everything.
There is no password and no TLS: listen on the local machine, or behind a proxy that has both.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from html import escape
from operator import itemgetter
from typing import Any, Final

from tensorwire.errors import TransportError
from tensorwire.streams import size_text

Status = dict[str, Any]
Columns = dict[str, tuple[str, Callable[[Status], str]]]

_SAFE: Final = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'", "Cache-Control": "no-store"}
_SHOWN: Final = 50  # rounds on the page
_GOOD: Final = ("delivered", "training", "not asked")  # states that need nobody's attention
_CURVE: Final = (600, 120)  # width and height of the picture of the loss
_PAGE: Final = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="2">
<meta name="viewport" content="width=device-width"><title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }}
div {{ overflow-x: auto }} svg {{ max-width: 100% }} progress {{ width: 12rem }}
table {{ border-collapse: collapse; width: 100% }} caption {{ text-align: left; font-weight: 600; margin-top: 1.5rem }}
th, td {{ text-align: left; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid #8884; vertical-align: top }}
th, td {{ white-space: nowrap; font-variant-numeric: tabular-nums }}
.number {{ text-align: right }} .text {{ white-space: normal; min-width: 16rem; width: 99% }} .bad {{ color: #c33 }}
</style><h1>{title}</h1><p><progress value="{round}" max="{rounds}"></progress> round {round} of {rounds},
{delivered} of {asked} clients have delivered{curve}{clients}{history}"""
_OF_RUN: Final = {"round": "gauge", "rounds": "gauge"}
_OF_CLIENTS: Final = {"up": "counter", "down": "counter", "refused": "counter", "seconds": "gauge", "seen": "gauge"}


@contextmanager
def dashboard(status: Callable[[], Status], host: str, port: int) -> Iterator[int]:
    """Serve the results of `status` (as `Server.status`) in a separate thread; yields the port. `port`: 0 picks one.

    Raises TransportError if it cannot listen.
    """
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Route

    def answer(kind: type[Response], make: Callable[[Status], str]) -> Callable[[Any], Response]:
        return lambda request: kind(make(status()), headers=_SAFE)

    def as_json(state: Status) -> str:
        return json.dumps(state, allow_nan=False)

    routes = {"/": (HTMLResponse, page), "/metrics": (PlainTextResponse, metrics), "/status.json": (Response, as_json)}
    app = Starlette(routes=[Route(path, answer(*made)) for path, made in routes.items()])
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", ws="none")
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise TransportError(f"the dashboard cannot listen on {host}:{port}: {error}", retryable=False) from error
    with listening:
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def page(state: Status) -> str:
    """The page. Text from clients is escaped."""
    clients, rows = state["clients"], state["rows"]
    states = [client["state"] for client in clients]
    return _PAGE.format(
        title=escape(f"tensorwire: {state['run']}"),
        round=state["round"],
        rounds=state["rounds"],
        delivered=states.count("delivered"),
        asked=len(states) - states.count("not asked"),
        curve=_curve([float(loss) for row in rows if (loss := _loss(row))]),
        clients=_table("Clients", _CLIENT, clients),
        history=_table("Rounds", _ROUND, reversed(rows[-_SHOWN:])),
    )


def metrics(state: Status) -> str:
    """The figures in the text format of Prometheus."""
    lines = []
    for name, kind in _OF_RUN.items():
        lines += [f"# TYPE tensorwire_fl_{name} {kind}", f"tensorwire_fl_{name} {state[name]}"]
    if state["rows"] and _loss(state["rows"][-1]):
        lines += ["# TYPE tensorwire_fl_loss gauge", f"tensorwire_fl_loss {_loss(state['rows'][-1])}"]
    for name, kind in _OF_CLIENTS.items():
        lines.append(f"# TYPE tensorwire_fl_client_{name} {kind}")
        lines += [f'tensorwire_fl_client_{name}{{client="{c["name"]}"}} {c[name]}' for c in state["clients"]]
    return "\n".join(lines) + "\n"


def _loss(row: Status) -> str:
    """The mean of the losses that clients report: of the round's initial model, or else of their training."""
    for name in ("loss", "train_loss"):
        if values := [report[name] for report in row["clients"].values() if name in report]:
            return f"{sum(values) / len(values):.6g}"
    return ""


def _ago(seen: float) -> str:
    return f"{max(time.time() - seen, 0):.0f} s ago" if seen else "not yet"


def _curve(losses: list[float]) -> str:
    """The loss over rounds as a picture; none of a single value."""
    if len(losses) < 2:
        return ""
    (width, height), low, high = _CURVE, min(losses), max(losses)
    step, scale = width / (len(losses) - 1), (height - 4) / ((high - low) or 1.0)
    points = " ".join(f"{step * at:.1f},{2 + scale * (high - loss):.1f}" for at, loss in enumerate(losses))
    line = f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
    picture = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">{line}</svg>'
    return f"<p>loss {losses[0]:.4g} to {losses[-1]:.4g}<br>{picture}"


# The columns of the two tables: for each name the class of its cells, and a function that gives their text.
_CLIENT: Final[Columns] = {
    "client": ("", itemgetter("name")),
    "state": ("text", itemgetter("state")),
    "last seen": ("number", lambda client: _ago(client["seen"])),
    "seconds to its update": ("number", lambda client: f"{client['seconds']:.1f}"),
    "up": ("number", lambda client: size_text(client["up"])),
    "down": ("number", lambda client: size_text(client["down"])),
    "refused": ("number", lambda client: str(client["refused"])),
}
_ROUND: Final[Columns] = {
    "round": ("number", lambda row: str(row["round"])),
    "loss": ("number", _loss),
    "updates": ("number", lambda row: str(len(row["clients"])) if row["counted"] else "too few"),
    "seconds": ("number", lambda row: f"{row['seconds']:.1f}"),
    "up": ("number", lambda row: size_text(row["up"])),
    "down": ("number", lambda row: size_text(row["down"])),
    "ended by": ("", itemgetter("ended")),
    "brought nothing": ("text", lambda row: "; ".join(f"{name}: {why}" for name, why in row["missing"].items())),
}


def _table(caption: str, columns: Columns, rows: Iterable[Status]) -> str:
    head = "".join(f'<th class="{look}">{name}</th>' for name, (look, _) in columns.items())
    body = ""
    for row in rows:
        cells = [(name, look, text(row)) for name, (look, text) in columns.items()]
        line = (f'<td class="{look}{_alarm(name, text)}">{escape(text)}</td>' for name, look, text in cells)
        body += f"<tr>{''.join(line)}</tr>"
    return f"<div><table><caption>{caption}</caption><tr>{head}</tr>{body}</table></div>"


def _alarm(column: str, text: str) -> str:
    """The class of a cell that needs attention, or none."""
    return " bad" if column == "state" and text not in _GOOD else ""
