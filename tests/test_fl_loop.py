"""The loop over real sockets: what it computes and refuses, and that neither faults nor kills change a bit of it."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from proxy import Cut, Flip, Proxy, Reset, Stall

import tensorwire
from tensorwire.cli.settings import options_of
from tensorwire.fl.client import Client
from tensorwire.fl.plan import Plan
from tensorwire.fl.server import Server
from tensorwire.fl.task import Task
from tensorwire.transfer import Offer, Recorded, RefusedError, greet, hear, say, send_stream
from tensorwire.transports import AsyncListener, TcpTransport, client_tls, server_tls
from tensorwire.updates import Terms, encode, views

PACKAGE = Path(tensorwire.__file__).parent
FULL = bool(os.environ.get("TENSORWIRE_EXHAUSTIVE"))


def counting(*, clients: int = 3, pause: float = 0.0) -> Task:
    """A task whose training is arithmetic: deterministic, different for each client and round."""

    def initial() -> dict[str, np.ndarray]:
        rng = np.random.default_rng(7)
        weights = {f"layer{n}.weight": rng.standard_normal((200, 300), np.float32) for n in range(3)}
        return {**weights, "bias": rng.standard_normal(7, np.float32), "steps": np.arange(3)}

    def train(state, client, round):
        time.sleep(pause)
        rng = np.random.default_rng([client, round])
        trained = {
            name: array + rng.standard_normal(array.shape, np.float32) * np.float32(0.01)
            if array.dtype == np.float32
            else array
            for name, array in state.items()
        }
        return trained, client + 1, {"loss": float(client)}

    return Task(initial, train, lambda state: float(np.abs(state["bias"]).sum()))


class Loop:
    """A server in a thread of its own."""

    def __init__(self, folder: Path, plan: Plan, **options) -> None:
        self.rows = []
        self.errors = []
        self.server = Server(plan, counting().initial, folder, on_round=self.rows.append)
        self._options = options
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self):
        listener = AsyncListener(self.server.serve, on_error=self.errors.append, **self._options)
        async with listener:
            self.port = listener.port
            self._ready.set()
            await self.server.run()
            await asyncio.wait_for(self.server.all_told(), 10)

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *exc):
        self._thread.join(30)
        assert not self._thread.is_alive()

    def connect(self):
        return TcpTransport.connect("127.0.0.1", self.port)


def take_part(peer, folder: Path, number: int, *, pause: float = 0.0, **options) -> threading.Thread:
    task, mine = counting(pause=pause), folder / f"client-{number}"
    client = Client(f"client-{number}", number, task, peer.connect, mine, **options)
    thread = threading.Thread(target=client.run)
    thread.start()
    return thread


def undisturbed(folder: Path, plan: Plan) -> dict[str, np.ndarray]:
    """The model after a run in which nothing goes wrong."""
    with Loop(folder / "server", plan) as loop:
        threads = [take_part(loop, folder, number) for number in range(plan.clients)]
        for thread in threads:
            thread.join()
    return loop.server.model


def same(left, right) -> bool:
    return list(left) == list(right) and all(left[n].tobytes() == right[n].tobytes() for n in left)


def test_raw_rounds_are_the_weighted_mean(tmp_path):
    plan = Plan(rounds=2, clients=3, down="raw", up="raw", kind="weights")
    model, expected, task = undisturbed(tmp_path, plan), counting().initial(), counting()
    for number in range(2):
        trained = [task.train(expected, client, number)[0] for client in range(3)]
        for name, array in expected.items():
            if array.dtype == np.float32:
                total = sum((client + 1) * trained[client][name].astype(np.float64) for client in range(3))
                expected[name] = (total / 6).astype(np.float32)
    assert same(model, expected)


@pytest.mark.parametrize("kind", ["weights", "difference"])
def test_the_result_is_the_same_whoever_comes_first(tmp_path, kind):
    plan = Plan(rounds=2, clients=3, kind=kind, feedback=kind == "difference")
    assert same(undisturbed(tmp_path / "a", plan), undisturbed(tmp_path / "b", plan))


def test_bytes_on_the_socket_are_those_of_the_streams(tmp_path):
    plan = Plan(rounds=2, clients=3)
    with Loop(tmp_path / "server", plan) as loop:
        for thread in [take_part(loop, tmp_path, number) for number in range(3)]:
            thread.join()
    model = counting().initial()
    for way, codec in (("down", "bf16"), ("up", "nf4")):
        predicted = 3 * len(tensorwire.dumps(model, codec=codec))
        for row in loop.rows:
            assert predicted <= row[way] < 1.01 * predicted


def test_a_restarted_server_continues_where_it_was(tmp_path):
    expected = undisturbed(tmp_path / "a", Plan(rounds=4, clients=3))
    undisturbed(tmp_path / "b", Plan(rounds=2, clients=3))
    assert same(undisturbed(tmp_path / "b", Plan(rounds=4, clients=3)), expected)
    with pytest.raises(tensorwire.SchemaError, match="holds run 'run'"):
        Server(Plan(name="other", rounds=4, clients=3), counting().initial, tmp_path / "b" / "server")


def deliver(loop: Loop, update: dict[str, np.ndarray], *, name="bad", round=0, transfer=None, **terms):
    """What a client does by hand; returns the receipt."""
    with loop.connect() as transport:
        transport.run(greet())
        transport.run(say({"client": name, "want": "task", "hold": 2}))
        transport.run(hear())
        base = loop.server.base
        terms = {"run": "run", "round": 0, "base": base, "client": name, **terms}
        path = Path(loop.folder) / "by-hand.tw"
        path.write_bytes(b"".join(encode(views(update), Terms(**terms), codec="raw")))
        transport.run(say({"client": name, "want": "deliver"}))
        offer = Offer(transfer or base.encode(), "update", None, {"round": round})
        return transport.run(send_stream(offer, Recorded(path)))


def broken(**changes):
    return {**counting().initial(), **changes}


BAD = {
    "finite": ({"bias": np.full(7, np.nan, np.float32)}, {}),
    "norm": ({"bias": np.full(7, 1e9, np.float32)}, {}),
    "stale": ({}, {"round": 5}),
    "stale base": ({}, {"base": "0" * 64}),
    "client": ({}, {"client": "client-1"}),
    "weight": ({}, {"weight": 1e12}),
    "schema shape": ({"bias": np.zeros(1, np.float32)}, {}),
    "schema dtype": ({"bias": np.zeros(7, np.float64)}, {}),
    "schema extra": ({"more": np.zeros(7, np.float32)}, {}),
}


def test_invalid_updates_are_refused_and_harm_nobody(tmp_path):
    plan = Plan(rounds=1, clients=2, quorum=1, max_norm=1e6)
    with Loop(tmp_path / "server", plan) as loop:
        loop.folder = tmp_path
        for case, (changes, terms) in BAD.items():
            with pytest.raises(RefusedError) as caught:
                deliver(loop, broken(**changes), **terms)
            assert caught.value.kind == case.partition(" ")[0], case
            loop.server.members.add("bad").why = ""  # one bad update a round is enough otherwise
        with pytest.raises(RefusedError) as caught:
            deliver(loop, broken(), round=1)
        assert caught.value.kind == "stale"
        with pytest.raises(RefusedError) as caught:
            deliver(loop, broken(), transfer=b"another")
        assert caught.value.kind == "stale"
        receipt = deliver(loop, broken())
        assert receipt.sent == receipt.size and not list((tmp_path / "server" / "round-0").glob(".*.part"))
        again = deliver(loop, broken())  # as if the receipt had been lost
        assert (again.digest, again.size, again.sent) == (receipt.digest, receipt.size, 0)
        with pytest.raises(tensorwire.SequenceError):  # another update of the same client for the same round
            deliver(loop, broken(bias=np.ones(7, np.float32)))
        deliver(loop, broken(), name="somebody")
        with pytest.raises(RefusedError, match="has its 2 clients"):
            deliver(loop, broken(), name="else")
        for name in ("bad", "somebody"):
            told(loop, name)
    assert {*loop.rows[0]["clients"]} == {"bad", "somebody"}


def told(loop, name):
    with loop.connect() as transport:
        transport.run(greet())
        order = {"task": "wait"}
        while order["task"] != "stop":
            transport.run(say({"client": name, "want": "task", "hold": 1}))
            order = transport.run(hear())


class Chaos:
    """Connections to the server of which one in two meets a fault within what the requests of one round take.

    Two requests in a round carry data, so that more than one in five of those are hit.
    """

    def __init__(self, port: int, seed: int) -> None:
        self._port = port
        self._random = random.Random(seed)
        self._proxies = []
        self.faults = 0

    def connect(self):
        if self._random.random() < 0.5:
            return TcpTransport.connect("127.0.0.1", self._port, timeout=2)
        self.faults += 1
        at = self._random.randrange(200_000)
        fault = self._random.choice([Cut, Reset, Flip, Stall])(at=at)
        way = self._random.choice(["up", "down"])
        if self._proxies:
            self._proxies.pop().__exit__(None, None, None)
        self._proxies.append(Proxy(self._port, **{way: fault}).__enter__())
        return TcpTransport.connect("127.0.0.1", self._proxies[-1].port, timeout=2)

    def close(self):
        for proxy in self._proxies:
            proxy.__exit__(None, None, None)


def start_server(port: int, folder: Path, plan: Plan) -> subprocess.Popen:
    command = [sys.executable, "-m", "tensorwire", "fl", "server", f"--listen=127.0.0.1:{port}", f"--state={folder}"]
    command += ["--task=test_fl_loop:counting", *options_of(plan)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), str(Path(__file__).parent)])}
    return subprocess.Popen(command, env=environment, cwd=PACKAGE.parent, **quiet)


@pytest.mark.parametrize("down", ["weights", "difference", "patch"])
def test_faults_and_kills_do_not_change_a_bit(tmp_path, down):
    plan = Plan(rounds=10 if FULL else 3, clients=5, down_kind=down)
    expected = undisturbed(tmp_path / "calm", plan)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    state, choose = tmp_path / "server", random.Random(3)
    chaos = [Chaos(port, seed) for seed in range(5)]
    server, killed = start_server(port, state, plan), 0
    threads = [take_part(each, tmp_path, n, hold=0.5, pause=0.5) for n, each in enumerate(chaos)]
    try:
        for number in range(plan.rounds):
            until = time.monotonic() + 120
            while not (state / f"round-{number}").exists():
                assert server.poll() is None and time.monotonic() < until
                time.sleep(0.01)
            time.sleep(choose.uniform(0, 0.5))  # less than a round takes
            server.send_signal(signal.SIGKILL)
            server.wait()
            killed += 1
            server = start_server(port, state, plan)
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        assert server.wait(30) == 0
    finally:
        server.kill()
        for each in chaos:
            each.close()
    print(sum(each.faults for each in chaos), "connections with a fault")
    assert killed == plan.rounds and sum(each.faults for each in chaos) >= plan.rounds
    assert same(tensorwire.load_file(state / "model.tw"), expected)


def test_mutual_tls_binds_a_client_to_its_certificate(tmp_path):
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name in ("server", "client-0"):
        certificate = authority.issue_cert("localhost", common_name=name)
        certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / f"{name}.pem")
    ca, ours, theirs = (tmp_path / f"{name}.pem" for name in ("ca", "server", "client-0"))
    plan = Plan(rounds=1, clients=1)
    with Loop(tmp_path / "state", plan, tls=server_tls(ours, ours, ca=ca)) as loop:
        tls = client_tls(ca=ca, certificate=theirs, key=theirs)
        loop.connect = lambda: TcpTransport.connect("localhost", loop.port, tls=tls)
        with loop.connect() as transport:
            transport.run(greet())
            transport.run(say({"client": "client-1", "want": "task", "hold": 0}))
            with pytest.raises(RefusedError, match="not valid for client 'client-1'"):
                transport.run(hear())
        take_part(loop, tmp_path, 0).join()
    assert {*loop.rows[0]["clients"]} == {"client-0"}
