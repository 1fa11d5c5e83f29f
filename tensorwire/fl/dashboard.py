"""A page to look at while a run goes on, and the same figures for Prometheus. Read-only; the extra `dashboard`.

/ is a page that the browser loads anew every few seconds, /metrics is text for Prometheus, /status.json all there is.
There is no password and no TLS: listen on this machine, or behind a proxy that has both.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, Final

from tensorwire.errors import TransportError

Status = dict[str, Any]

_SAFE: Final = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'", "Cache-Control": "no-store"}
_SHOWN: Final = 50  # rounds on the page
_PAGE: Final = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="2">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }} caption {{ text-align: left; font-weight: 600; margin-top: 1.5rem }}
th, td {{ text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top }}
</style><h1>{title}</h1><p>round {round} of {rounds}</p>{clients}{history}"""
_OF_RUN: Final = (("round", "gauge"), ("rounds", "gauge"))
_OF_CLIENTS: Final = (
    ("up", "counter"),
    ("down", "counter"),
    ("refused", "counter"),
    ("seconds", "gauge"),
    ("seen", "gauge"),
)


@contextmanager
def dashboard(status: Callable[[], Status], host: str, port: int) -> Iterator[int]:
    """Serve `status()`, as `Server.status` gives it, in a thread of its own. Gives the port; 0 picks a free one.

    Raises TransportError where it cannot listen.
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
    """The page. What clients say is escaped."""
    clients = _table(
        "Clients",
        ("client", "state", "last seen", "seconds to its update", "bytes up", "bytes down", "refused"),
        [
            (c["name"], c["state"], _ago(c["seen"]), f"{c['seconds']:.1f}", c["up"], c["down"], c["refused"])
            for c in state["clients"]
        ],
    )
    history = _table(
        "Rounds",
        ("round", "loss", "updates", "seconds", "bytes up", "bytes down", "ended by", "brought nothing"),
        [
            (row["round"], _loss(row), len(row["clients"]) if row["counted"] else "too few", f"{row['seconds']:.1f}",
             row["up"], row["down"], row["ended"], "; ".join(f"{name}: {why}" for name, why in row["missing"].items()))
            for row in reversed(state["rows"][-_SHOWN:])
        ],
    )  # fmt: skip
    title = escape(f"tensorwire: {state['run']}")
    return _PAGE.format(title=title, round=state["round"], rounds=state["rounds"], clients=clients, history=history)


def metrics(state: Status) -> str:
    """The figures in the text format of Prometheus."""
    lines = []
    for name, kind in _OF_RUN:
        lines += [f"# TYPE tensorwire_fl_{name} {kind}", f"tensorwire_fl_{name} {state[name]}"]
    if state["rows"] and _loss(state["rows"][-1]):
        lines += ["# TYPE tensorwire_fl_loss gauge", f"tensorwire_fl_loss {_loss(state['rows'][-1])}"]
    for name, kind in _OF_CLIENTS:
        lines.append(f"# TYPE tensorwire_fl_client_{name} {kind}")
        lines += [f'tensorwire_fl_client_{name}{{client="{c["name"]}"}} {c[name]}' for c in state["clients"]]
    return "\n".join(lines) + "\n"


def _loss(row: Status) -> str:
    """The mean of what clients measured: of the model that the round began with, else of their training."""
    for name in ("loss", "train_loss"):
        if values := [report[name] for report in row["clients"].values() if name in report]:
            return f"{sum(values) / len(values):.6g}"
    return ""


def _ago(seen: float) -> str:
    return f"{max(time.time() - seen, 0):.0f} s ago" if seen else "not yet"


def _table(caption: str, head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    def line(cell: str, row: tuple[object, ...]) -> str:
        return "<tr>" + "".join(f"<{cell}>{escape(str(each))}</{cell}>" for each in row)

    return f"<table><caption>{caption}</caption>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"
