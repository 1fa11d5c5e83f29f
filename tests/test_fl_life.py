"""The loop under ordinary life: what training gives, what disks keep, who comes, stays and goes; over real sockets."""

import asyncio
import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from network import nothing_left

import tensorwire
from tensorwire.errors import SchemaError, StorageError, TransportError
from tensorwire.fl.client import Client
from tensorwire.fl.plan import Order, Plan
from tensorwire.fl.server import Server
from tensorwire.fl.simulate import simulate
from tensorwire.fl.task import Task
from tensorwire.fl.versions import STEPS
from tensorwire.transfer import (
    Offer,
    Recorded,
    Recording,
    RefusedError,
    Regenerated,
    greet,
    hear,
    receive_stream,
    say,
    send_stream,
    wait,
)
from tensorwire.transports import AsyncListener, TcpListener, TcpTransport
from tensorwire.updates import Terms, copies, encode, views


@pytest.fixture(autouse=True)
def _nothing_is_left():
    with nothing_left():
        yield


def initial():
    return {"w": np.zeros(64, np.float32)}


def stepping(state, client, round):
    return {name: tensor + 1 for name, tensor in state.items()}, 1, {"loss": 1.0}


def task_of(train=stepping, start=initial):
    return Task(start, train, lambda state: 0.0)


def exact(**settings):
    return Plan(**{"rounds": 1, "clients": 1, "down": "raw", "up": "raw"} | settings)


class Loop:
    """A server in a thread of its own, and clients that are told what became of them."""

    def __init__(self, folder: Path, plan: Plan, *, start=initial, within=60.0, **listener) -> None:
        self.rows, self.notes, self.unhandled, self.ends = [], [], [], {}
        self.steps: dict[str, list[str]] = {}
        self.refusals = []
        self._folder, self._within, self._listener = folder, within, listener
        self.server = Server(plan, start, folder / "state", on_round=self.rows.append, on_note=self.notes.append)
        self._ready, self._clients = threading.Event(), []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self):
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: self.unhandled.append(context))
        async with AsyncListener(self.server.serve, **self._listener) as listener:
            self.port = listener.port
            self._ready.set()
            try:
                await asyncio.wait_for(self.server.run(), self._within)
            except asyncio.TimeoutError:
                self.notes.append("the run did not end in time")

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *exc):
        for client in self._clients:
            client.join(60)
        self._thread.join(60)
        assert not self._thread.is_alive() and not self.unhandled
        assert "the run did not end in time" not in self.notes

    def connect(self, **options):
        return TcpTransport.connect("127.0.0.1", self.port, **options)

    def client(self, name, task=None, *, number=0, connect=None, folder=None, **options):
        steps = self.steps.setdefault(name, [])
        options = {"patience": 10, "on_step": steps.append, "on_refusal": self.refusals.append, **options}
        where = self._folder / (folder or name)
        client = Client(name, number, task or task_of(), connect or self.connect, where, **options)

        def run():
            try:
                client.run()
                self.ends[name] = None
            except BaseException as error:
                self.ends[name] = error

        thread = threading.Thread(target=run)
        thread.start()
        self._clients.append(thread)
        return thread


# Patience, places


def test_training_takes_as_long_as_it_takes_and_no_connection(tmp_path):
    """Time-outs and patience are of connections: none is held while a client trains, or waits for the others."""
    held, loop = [], Loop(tmp_path, exact(rounds=2, clients=2), timeout=0.5)

    def train(state, client, round):
        time.sleep(1.5 if client == 0 else 0)
        held.append(loop.server.members.everyone()[client].state)
        return stepping(state, client, round)

    with loop:
        for number in range(2):
            loop.client(
                f"c{number}", task_of(train), number=number, connect=lambda: loop.connect(timeout=0.5), patience=0.5
            )
    assert loop.ends == {"c0": None, "c1": None} and len(loop.rows) == 2
    assert held == ["training"] * 4


def test_more_clients_than_connections(tmp_path):
    with Loop(tmp_path, exact(rounds=2, clients=6), connections=2) as loop:
        for number in range(6):
            loop.client(f"c{number}", number=number, patience=20)
    assert set(loop.ends.values()) == {None}
    assert [len(row["clients"]) for row in loop.rows] == [6, 6]


def test_patience_is_counted_from_when_failing_began(tmp_path):
    """A server that is away for less than that, after training that took longer."""
    away = []

    def connect():
        if len(away) == 1:
            away.append(time.monotonic())
        if len(away) == 2 and time.monotonic() - away[1] < 0.5:
            raise TransportError("away")
        return loop.connect()

    def train(state, client, round):
        time.sleep(1.5)
        away.append(0.0)
        return stepping(state, client, round)

    with Loop(tmp_path, exact()) as loop:
        loop.client("c", task_of(train), connect=connect, patience=1)
    assert loop.ends == {"c": None}


# Who can still deliver


def not_a_number(state, client, round):
    return {name: tensor + np.float32("nan" if client == 1 else 1) for name, tensor in state.items()}, 1, {}


@pytest.mark.parametrize("up", ["raw", "nf4", "bf16"])
def test_nan_means_no_update_this_round(tmp_path, up):
    with Loop(tmp_path, exact(rounds=2, clients=2, up=up, kind="weights")) as loop:
        for number in range(2):
            loop.client(f"c{number}", task_of(not_a_number), number=number)
    assert loop.ends == {"c0": None, "c1": None}
    for row in loop.rows:
        assert [*row["clients"]] == ["c0"] and row["counted"] and row["ended"] == "everybody has answered"
        assert "NaN" in row["missing"]["c1"] or "nan" in row["missing"]["c1"]


def test_a_round_without_valid_updates_keeps_the_model(tmp_path):
    with Loop(tmp_path, exact(rounds=2, clients=2, quorum=2)) as loop:
        for number in range(2):
            loop.client(f"c{number}", task_of(not_a_number), number=number)
    assert [row["counted"] for row in loop.rows] == [False, False]
    assert not loop.server.model["w"].any()


def test_a_task_that_fails_ends_its_client_and_no_round_waits_for_it(tmp_path):
    def train(state, client, round):
        if client == 1:
            raise ValueError("no data")
        return stepping(state, client, round)

    with Loop(tmp_path, exact(rounds=2, clients=2)) as loop:
        for number in range(2):
            loop.client(f"c{number}", task_of(train), number=number)
    assert isinstance(loop.ends["c1"], ValueError) and loop.ends["c0"] is None
    assert loop.rows[0]["missing"] == {"c1": "left: ValueError: no data"}
    assert [row["counted"] for row in loop.rows] == [True, True]


def test_a_client_that_dies_silently_costs_one_deadline(tmp_path):
    with Loop(tmp_path, exact(rounds=4, clients=2, deadline=1.0)) as loop:
        with loop.connect() as transport:
            transport.run(greet())
            transport.run(say({"client": "dead", "want": "task", "hold": 5}))
            assert transport.run(hear())["task"] == "train"
        loop.client("c")
    assert [row["ended"] for row in loop.rows] == ["the deadline"] + ["nobody else is there"] * 3
    assert loop.rows[0]["missing"] == {"dead": "nothing came by the deadline"}


def test_a_round_asks_a_part_of_the_clients(tmp_path):
    with Loop(tmp_path, exact(rounds=4, clients=4, sample=2, seed=3)) as loop:
        for number in range(4):
            loop.client(f"c{number}", number=number)
    plan = loop.server.plan
    expected = [plan.draw(number, [f"c{each}" for each in range(4)]) for number in range(4)]
    assert [sorted(row["clients"]) for row in loop.rows] == expected
    assert set(loop.ends.values()) == {None} and (loop.server.model["w"] == 4).all()


# What training gives


@pytest.mark.parametrize(
    ("weight", "metrics", "kept"),
    [
        (10, {"loss": float("nan")}, {}),
        (10, {"loss": np.float32(1.5)}, {"loss": 1.5}),
        (10, {"loss": np.array([1.5]), "text": "x", "none": None, "list": [1], "big": 10**400}, {"loss": 1.5}),
        (np.int64(10), {}, {}),
        (np.array(10.0), None, {}),
        (10, {1: True, "inf": -np.inf}, {"1": 1.0}),
        (10, {"n" * 100: 1.0, **{f"m{number}": 2 for number in range(2000)}}, {f"m{n}": 2.0 for n in range(500)}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_numbers_of_any_library_are_numbers(tmp_path, weight, metrics, kept):
    with Loop(tmp_path, exact()) as loop:
        loop.client("c", task_of(lambda state, client, round: (stepping(state, client, round)[0], weight, metrics)))
    assert loop.ends == {"c": None}
    report = loop.rows[0]["clients"]["c"]
    assert {name: value for name, value in report.items() if name != "norm"} == {"weight": 10.0, **kept}
    json.dumps(loop.rows, allow_nan=False)
    dropped = any("out of the report" in step for step in loop.steps["c"])
    assert dropped == (len(kept) < len(metrics or {}))


@pytest.mark.parametrize("weight", [0, np.float32(0), -1, float("nan"), float("inf")])
def test_no_examples_means_no_update_this_round(tmp_path, weight):
    def train(state, client, round):
        return stepping(state, client, round)[0], weight if client == 1 else 1, {}

    with Loop(tmp_path, exact(rounds=2, clients=2)) as loop:
        for number in range(2):
            loop.client(f"c{number}", task_of(train), number=number)
    assert loop.ends == {"c0": None, "c1": None}
    assert [row["missing"] for row in loop.rows] == [{"c1": f"training has the weight {weight:g}"}] * 2


@pytest.mark.parametrize("kind", ["weights", "difference"])
@pytest.mark.parametrize(
    ("gives", "says"),
    [
        (lambda state: {"w": state["w"].astype(np.float64)}, "float64"),
        (lambda state: {"w": state["w"][:3]}, "[3]"),
        (lambda state: {**state, "more": state["w"]}, "which the model does not have"),
        (lambda state: {}, "which the model has"),
        (lambda state: [state["w"]], "a mapping"),
        (lambda state: {"w": 1.0}, "tensors"),
    ],
)
def test_a_client_with_another_model_ends_with_a_clear_error(tmp_path, kind, gives, says):
    trained = []

    def train(state, client, round):
        trained.append(round)
        return gives(state), 1, {}

    with Loop(tmp_path, exact(kind=kind)) as loop:
        loop.client("c", task_of(train))
    assert says in str(loop.ends["c"]) and isinstance(loop.ends["c"], tensorwire.TensorwireError)
    assert trained == [0] and says in loop.rows[0]["missing"]["c"]


def test_a_client_with_another_model_keeps_no_files(tmp_path):
    with Loop(tmp_path, exact()) as loop:
        loop.client("c", task_of(start=lambda: {"other": np.zeros(3, np.float32)}))
    assert isinstance(loop.ends["c"], SchemaError) and not [*(tmp_path / "c").iterdir()]


def in_place(state, client, round):
    state["w"] -= 0.5 * (state["w"] - 3)
    return state, 1, {}


def in_place_and_copied(state, client, round):
    in_place(state, client, round)
    return {"w": state["w"].copy()}, 1, {}


@pytest.mark.parametrize("train", [in_place, in_place_and_copied])
@pytest.mark.parametrize("kind", ["weights", "difference"])
def test_training_in_place_learns(tmp_path, kind, train):
    plan = exact(rounds=4, clients=2, kind=kind)
    with Loop(tmp_path, plan) as loop:
        for number in range(2):
            loop.client(f"c{number}", task_of(train), number=number)
    assert loop.server.model["w"] == pytest.approx(3 * (1 - 0.5**4))
    assert any("in place" in step for step in loop.steps["c0"])
    seen = []
    task = Task(initial, train, lambda state: seen.append(state["w"].copy()) or 0.0)
    list(simulate(task, plan))
    assert seen[-1] == pytest.approx(3 * (1 - 0.5**4))


def tied():
    torch = pytest.importorskip("torch")
    model = SimpleNamespace(embed=torch.nn.Embedding(16, 4), head=torch.nn.Linear(4, 16, bias=False))
    model.head.weight = model.embed.weight
    return {"embed": model.embed.weight.detach(), "norm": torch.ones(4), "head": model.head.weight.detach()}


@pytest.mark.parametrize("apart", [False, True])
def test_tied_weights_stay_tied_and_are_sent_once(tmp_path, apart):
    """Also where training gives the one tensor twice, in memory of its own each time."""

    def train(state, client, round):
        assert state["embed"].data_ptr() == state["head"].data_ptr()
        new = state["embed"] + 1
        return {"head": new.clone() if apart else new, "embed": new, "norm": state["norm"]}, 1, {}

    start = tied()
    before = start["embed"].clone()
    with Loop(tmp_path, exact(rounds=2), start=lambda: start) as loop:
        loop.client("c", task_of(train, lambda: start))
    assert loop.ends == {"c": None}
    model = loop.server.model
    assert np.shares_memory(model["embed"], model["head"]) and np.allclose(model["embed"], before.numpy() + 2)
    assert len([*simulate(task_of(train, tied), exact())]) == 2


def test_tied_weights_trained_apart_raise_a_clear_error(tmp_path):
    def train(state, client, round):
        return {**state, "head": state["head"] + 1}, 1, {}

    start = tied()
    with Loop(tmp_path, exact(), start=lambda: start) as loop:
        loop.client("c", task_of(train, lambda: start))
    assert "training gave two" in str(loop.ends["c"])


# What disks keep


class Killed(BaseException):
    pass


def killed_in_training(loop, name="c", task=None):
    """A client that is killed, not ended: nobody is told."""

    def train(state, client, round):
        raise Killed

    task = Task((task or task_of()).initial, train, lambda state: 0.0)
    client = Client(name, 0, task, loop.connect, loop._folder / name)
    client._leave = lambda error: None
    with pytest.raises(Killed):
        client.run()


def flipped(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize(
    "damage",
    [flipped, lambda data: data[:20], lambda data: b"", lambda data: bytes(len(data) - 32) + data[-32:]],
    ids=["a flipped bit", "cut", "empty", "zeros but for the tail"],
)
def test_a_damaged_model_is_fetched_again(tmp_path, damage):
    with Loop(tmp_path, exact()) as loop:
        killed_in_training(loop)
        path = tmp_path / "c" / "model.tw"
        path.write_bytes(damage(path.read_bytes()))
        loop.client("c")
    assert loop.ends == {"c": None} and loop.rows[0]["counted"]


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:20], lambda data: b""])
def test_a_damaged_update_is_made_again(tmp_path, damage):
    with Loop(tmp_path, exact(feedback=True)) as loop:
        killed_in_training(loop)
        (tmp_path / "c" / f"update-{loop.server.base[:16]}.tw").write_bytes(damage(bytes(1000)))
        loop.client("c")
    assert loop.ends == {"c": None} and "damaged" in "".join(loop.steps["c"])


def test_a_damaged_residual_is_dropped_with_a_message(tmp_path):
    (tmp_path / "c").mkdir()
    tensorwire.numpy.save_file({"w": np.ones(3, np.float32)}, tmp_path / "c" / "residual.tw")  # of another model
    with Loop(tmp_path, exact(feedback=True, up="nf4")) as loop:
        loop.client("c")
    assert loop.ends == {"c": None} and "nothing is carried over" in "".join(loop.steps["c"])
    (tmp_path / "c" / "residual.tw").write_bytes(b"damaged")
    with Loop(tmp_path, exact(rounds=2, feedback=True, up="nf4")) as loop:
        loop.client("c")
    assert loop.ends == {"c": None} and "nothing is carried over" in "".join(loop.steps["c"])
    assert [path.name for path in (tmp_path / "c").glob("residual*")] == ["residual.tw"]


def test_a_folder_in_place_of_the_model_is_named(tmp_path):
    (tmp_path / "c" / "model.tw" / "x").mkdir(parents=True)
    with Loop(tmp_path, exact()) as loop:
        loop.client("c")
    assert isinstance(loop.ends["c"], StorageError) and "model.tw" in str(loop.ends["c"])


def test_files_of_missed_rounds_are_removed(tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    for name in ("update-0123.tw", "update-0123.tw.residual", ".model.tw.0123456789abcdef.part", "residual.tw"):
        (folder / name).write_bytes(b"old")
    (folder / "mine.txt").write_bytes(b"not ours")
    with Loop(tmp_path, exact()) as loop:
        loop.client("c")
    assert sorted(path.name for path in folder.iterdir()) == ["mine.txt", "model.tw"]


def test_a_client_started_again_without_its_folder_may_deliver_something_else(tmp_path):
    """The server holds the beginning of an update that nobody has any more."""
    count = iter(range(1, 100))

    def train(state, client, round):
        return {"w": state["w"] + next(count)}, 1, {}

    shape = lambda: {"w": np.zeros((1000, 1000), np.float32)}  # noqa: E731
    with Loop(tmp_path, exact(), start=shape) as loop:
        with loop.connect() as transport:
            transport.run(greet())
            transport.run(say({"client": "c", "want": "task", "hold": 5}))
            base = transport.run(hear())["base"]
            half = tmp_path / "half"
            half.write_bytes(b"".join(encode(views(shape()), Terms("run", 0, base, "c", "difference"))))
            transport.run(say({"client": "c", "want": "deliver"}))

            class Half(Recorded):
                def after(self, position):
                    for number, buffer in enumerate(super().after(position)):
                        if number == 20:
                            raise KeyboardInterrupt
                        yield buffer

            with pytest.raises(KeyboardInterrupt):
                transport.run(send_stream(Offer(base.encode(), about={"round": 0}), Half(half)))
        loop.client("c", task_of(train, shape))
    assert loop.ends == {"c": None} and (loop.server.model["w"] == 1).all()
    with Loop(tmp_path / "again", exact(clients=2)) as loop:  # a second client of the same name, after the first
        loop.client("c").join(0.5)
        loop.client("c", folder="d").join(0.5)
        loop.client("e")
    assert loop.ends["e"] is None and [*loop.rows[0]["clients"]] == ["c", "e"]


# What servers say


class Fake:
    """A server that says what it is told to, until its block ends."""

    def __init__(self, *answers) -> None:
        self._listener, self._answers = TcpListener(), answers
        self.asked, self._closed = 0, False
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._closed = True
        self.connect().close()  # so that it wakes up
        self._thread.join(60)
        self._listener.close()
        assert not self._thread.is_alive()

    def connect(self):
        return TcpTransport.connect("127.0.0.1", self._listener.port, timeout=3)

    def _serve(self):
        while not self._closed:
            try:
                with self._listener.accept() as transport:
                    transport.run(greet())
                    while not self._closed:
                        transport.run(hear())
                        answer = self._answers[min(self.asked, len(self._answers) - 1)]
                        self.asked += 1
                        transport.run(answer() if callable(answer) else say(answer))
            except tensorwire.TensorwireError:
                pass


ORDER = {"task": "train", **Order.of(exact(), 0, "0" * 64).message()}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"task": "dance"}, "dance"),
        ({}, "does not know"),
        ({**ORDER, "up": "nf5"}, "nf5"),
        ({"task": "train"}, "lacks"),
    ],
)
def test_an_unknown_order_ends_a_client_with_a_clear_error(tmp_path, answer, says):
    with Fake(answer) as server, pytest.raises(SchemaError, match=says):
        Client("c", 0, task_of(), server.connect, tmp_path, patience=5).run()


@pytest.mark.parametrize("seconds", [0, -1, "soon", float("nan"), 1e300, None])
def test_a_server_that_says_wait_is_asked_again_at_a_sensible_pace(tmp_path, seconds):
    with Fake({"task": "wait", "seconds": seconds}) as server:
        client = Client("c", 0, task_of(), server.connect, tmp_path, hold=0.1, patience=0.1)

        def wait_until_nobody_answers():
            with pytest.raises(tensorwire.TensorwireError):
                client.run()

        waiting = threading.Thread(target=wait_until_nobody_answers)
        waiting.start()
        time.sleep(0.6)
        assert 2 <= server.asked <= 20
    waiting.join(60)
    assert not waiting.is_alive()


def test_a_malicious_server_cannot_fill_the_disk(tmp_path):
    """Whatever it sends, under whatever name: the client keeps none of it."""

    def stream(tensors, **terms):
        outgoing = Regenerated(lambda: tensorwire.encode(tensors, frame_size=4096, **terms))
        return lambda: send_stream(Offer(b"any", "model"), outgoing)

    for number, tensors in enumerate(({"junk": np.zeros(1 << 20, np.float32)}, {"w": np.zeros(1 << 20, np.float32)})):
        with Fake(ORDER, stream(tensors)) as server, pytest.raises(tensorwire.TensorwireError):
            Client("c", 0, task_of(), server.connect, tmp_path / str(number), patience=1).run()
        assert not [*(tmp_path / str(number)).iterdir()]


def test_a_round_that_closes_while_its_model_is_fetched_is_the_next_round(tmp_path):
    trained = []

    def train(state, client, round):
        trained.append((client, round))
        return {"w": state["w"] + 1}, 1, {}

    start = lambda: {"w": np.zeros(1 << 21, np.float32)}  # noqa: E731
    slow = threading.Event()

    class Slow(TcpTransport):
        def run(self, conversation, **options):
            result = super().run(conversation, **options)
            if isinstance(result, tuple):  # a stream was received
                slow.wait(30)
            return result

    with Loop(tmp_path, exact(rounds=3, clients=2, deadline=0.5), start=start) as loop:
        loop.client("slow", task_of(train, start), number=1, connect=lambda: Slow.connect("127.0.0.1", loop.port))
        loop.client("c", task_of(train, start))
        while len(loop.rows) < 1:
            time.sleep(0.01)
        slow.set()
    assert (1, 0) not in trained and set(loop.ends.values()) == {None}


def test_a_silent_uploader_does_not_block_others(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorwire.transports.turns._STALL", 0.3)
    stop = threading.Event()

    def sit():
        with loop.connect() as transport:
            transport.run(greet())
            transport.run(say({"client": "mallory", "want": "deliver"}))
            while not stop.wait(0.1):
                transport.run(wait())

    def sitting():
        with pytest.raises(TransportError):
            sit()

    with Loop(tmp_path, exact(clients=2, deadline=5)) as loop:
        sitters = [threading.Thread(target=sitting) for _ in range(2)]
        for sitter in sitters:
            sitter.start()
        time.sleep(0.2)
        began = time.monotonic()
        loop.client("honest")
        while not loop.server.members.accepted() and time.monotonic() < began + 4:
            time.sleep(0.01)
        assert [*loop.server.members.accepted()] == ["honest"]
        for sitter in sitters:
            sitter.join()
    assert loop.ends == {"honest": None}


def test_an_update_in_frames_of_few_elements_is_refused_before_it_costs_much(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorwire.updates.recording._FRAME", 16384)  # our own writer makes none below what is allowed
    start = lambda: {"w": np.zeros(1 << 18, np.float32)}  # noqa: E731
    with Loop(tmp_path, exact(), start=start) as loop:
        with loop.connect() as transport:
            transport.run(greet())
            transport.run(say({"client": "c", "want": "task", "hold": 5}))
            base = transport.run(hear())["base"]
            terms = Terms("run", 0, base, "c", "difference")
            path = tmp_path / "shredded.tw"
            path.write_bytes(b"".join(encode(views(start()), terms, frame_size=4096)))
            transport.run(say({"client": "c", "want": "deliver"}))
            with pytest.raises(RefusedError, match="frames of the stream"):
                transport.run(send_stream(Offer(base.encode(), about={"round": 0}), Recorded(path)))
        assert not [*(tmp_path / "state" / "round-0").glob(".*.part")]
        loop.client("c", task_of(start=start))
    assert loop.ends == {"c": None}


# What the server's folder holds


def closed_but_not_averaged(folder: Path, plan: Plan) -> None:
    """The state of a server that was killed between `closed.json` and `model.tw`."""
    loop = Loop(folder, plan, within=2.0)

    def killed(survivors):
        raise Killed

    loop.server._average = killed

    def run():
        with pytest.raises(Killed):
            asyncio.run(loop._run())

    loop._thread = threading.Thread(target=run)
    loop._thread.start()
    assert loop._ready.wait(10)
    for number in range(plan.clients):
        loop.client(f"c{number}", number=number, patience=0.2)
    loop._thread.join(30)
    for client in loop._clients:
        client.join(30)


def started_again(folder: Path, plan: Plan):
    notes, rows = [], []
    server = Server(plan, initial, folder / "state", on_note=notes.append, on_round=rows.append)
    asyncio.run(asyncio.wait_for(server.run(), 30))
    return server, rows, notes


@pytest.mark.parametrize("what", ["nothing", "stray", "link", "flipped", "gone", "closed", "broadcast", "rules"])
def test_a_server_continues_from_any_state_of_its_folder(tmp_path, what):
    plan = exact(clients=2)
    closed_but_not_averaged(tmp_path, plan)
    state = tmp_path / "state" / "round-0"
    assert (state / "closed.json").exists()
    lost = set()
    if what == "stray":
        (state / "update-c0.tw.bak").write_bytes(b"of an editor")
    elif what == "link":
        (state / "update-c9.tw").symlink_to("nowhere")
    elif what in ("flipped", "gone"):
        path, lost = state / "update-c1.tw", {"c1"}
        path.write_bytes(flipped(path.read_bytes())) if what == "flipped" else path.unlink()
    elif what == "closed":
        (state / "closed.json").write_text("[1")
    elif what == "broadcast":
        path = tmp_path / "state" / "broadcast-0.tw"
        path.write_bytes(flipped(path.read_bytes()))
    elif what == "rules":
        plan, lost = exact(clients=2, max_norm=1e-3), {"c0", "c1"}
    server, rows, notes = started_again(tmp_path, plan)
    assert {*rows[0]["clients"]} == {"c0", "c1"} - lost and {*rows[0]["missing"]} == lost
    assert server.model["w"][0] == (len(lost) < 2)
    assert bool(notes) == (what not in ("nothing", "gone"))
    if what == "stray":
        assert (state / "update-c0.tw.bak").read_bytes() == b"of an editor"


def test_a_folder_that_has_lost_its_model_says_what_to_do(tmp_path):
    closed_but_not_averaged(tmp_path, exact())
    model = tmp_path / "state" / "model.tw"
    kept = model.read_bytes()
    model.write_bytes(flipped(kept))
    with pytest.raises(tensorwire.TensorwireError, match="put back a copy"):
        started_again(tmp_path, exact())
    model.unlink()
    with pytest.raises(StorageError, match="put it back"):
        started_again(tmp_path, exact())
    model.write_bytes(kept)
    (tmp_path / "state" / "broadcast-0.tw").unlink()
    started_again(tmp_path, exact())


def test_an_update_damaged_after_its_check_is_left_out(tmp_path):
    loop = Loop(tmp_path, exact(clients=2))
    real = loop.server._average

    def rotten(survivors):
        path = tmp_path / "state" / "round-0" / "update-c1.tw"
        path.write_bytes(flipped(path.read_bytes()))
        return real(survivors)

    loop.server._average = rotten
    with loop:
        for number in range(2):
            loop.client(f"c{number}", number=number)
    assert [*loop.rows[0]["clients"]] == ["c0"] and "lost" in loop.rows[0]["missing"]["c1"]
    assert (loop.server.model["w"] == 1).all() and loop.notes


# Differences and patches on the way down


def descending(trained=None):
    """A task whose steps become smaller, so that what a codec drops shows; bigger than a stream's own bytes."""
    goals = np.random.default_rng(5).standard_normal((3, 200, 300), np.float32)

    def train(state, client, round):
        if trained is not None:
            trained.append((client, round))
        return {"w": state["w"] + np.float32(0.5) * (goals[client] - state["w"]), "n": state["n"]}, 1, {}

    start = lambda: {"w": np.zeros((200, 300), np.float32), "n": np.arange(3)}  # noqa: E731
    return Task(start, train, lambda state: float(np.abs(state["w"] - goals.mean(axis=0)).mean()))


def few_at_a_time():
    """A task that changes a row a round, exactly, so that a patch is short."""

    def train(state, client, round):
        weights = state["w"].copy()
        weights[round] += 0.5 * (client + 1)
        return {"w": weights, "n": state["n"]}, 1, {}

    return Task(descending().initial, train, lambda state: float(state["w"].sum()))


TASKS = {"difference": descending, "patch": few_at_a_time}


def both_ways(**settings):
    return Plan(**{"rounds": 4, "clients": 2, "up": "nf4", "down": "nf4", "down_kind": "difference"} | settings)


@pytest.mark.parametrize("settings", [{}, {"down": "bf16", "stochastic": True}, {"down": "raw"}, {"feedback": True}])
def test_differences_over_sockets_are_those_of_the_simulator(tmp_path, settings):
    plan, task = both_ways(**settings), descending()
    with Loop(tmp_path, plan, start=task.initial) as loop:
        for number in range(2):
            loop.client(f"client-{number}", task, number=number)
    assert loop.ends == {"client-0": None, "client-1": None} and not loop.notes
    assert task.evaluate(loop.server.model) == list(simulate(task, plan))[-1].loss
    held = [(tmp_path / f"client-{number}" / "model.tw").read_bytes() for number in range(2)]
    assert held[0] == held[1] == (tmp_path / "state" / "broadcast-3.tw").read_bytes()
    if plan.down == "nf4":
        whole, *later = [row["down"] for row in loop.rows]
        assert all(down < whole / 6 for down in later)


@pytest.mark.parametrize("settings", [{}, {"down": "raw"}, {"feedback": True, "down": "bf16"}])
def test_patches_over_sockets_are_those_of_the_simulator(tmp_path, settings):
    plan, task = both_ways(down_kind="patch", **settings), few_at_a_time()
    with Loop(tmp_path, plan, start=task.initial) as loop:
        for number in range(2):
            loop.client(f"client-{number}", task, number=number)
    assert loop.ends == {"client-0": None, "client-1": None} and not loop.notes
    points = list(simulate(task, plan))
    assert task.evaluate(loop.server.model) == points[-1].loss
    moved = np.diff([point.bytes for point in points])
    assert all(down + up == pytest.approx(bytes, rel=0.02) for down, up, bytes in moved_of(loop.rows, moved))
    held = [(tmp_path / f"client-{number}" / "model.tw").read_bytes() for number in range(2)]
    assert held[0] == held[1] == (tmp_path / "state" / "broadcast-3.tw").read_bytes()
    whole, *later = [row["down"] for row in loop.rows]
    assert all(down < whole / 8 for down in later)


def moved_of(rows, moved):
    return [(row["down"], row["up"], bytes) for row, bytes in zip(rows, moved, strict=True)]


def adapted():
    """A frozen backbone of a million weights, and adapters of 8,192, which is all that training changes."""
    draw = np.random.default_rng(3)
    backbone = {f"layers.{n}.weight": draw.standard_normal((512, 512), np.float32) for n in range(4)}
    adapters = {f"layers.{n}.lora_{side}": np.zeros((2, 512), np.float32) for n in range(4) for side in "AB"}

    def train(state, client, round):
        draw = np.random.default_rng([client, round])
        moved = {name: state[name] + draw.standard_normal((2, 512), np.float32) for name in adapters}
        return {**state, **moved}, 1, {}

    return Task(lambda: copies({**backbone, **adapters}), train, lambda state: float(state["layers.0.lora_A"].sum()))


def test_a_frozen_backbone_is_sent_once(tmp_path):
    """What a round sends down is no more than its adapters, whatever the codec makes of the rest."""
    task, sizes, models = adapted(), {}, {}
    adapters = 4 * 8192
    for down, kind in (("raw", "patch"), ("bf16", "patch"), ("bf16", "weights"), ("nf4", "difference")):
        plan = both_ways(rounds=3, down=down, down_kind=kind)
        with Loop(tmp_path / f"{down}-{kind}", plan, start=task.initial) as loop:
            for number in range(2):
                loop.client(f"c{number}", task, number=number)
        assert set(loop.ends.values()) == {None} and not loop.notes
        sizes[down, kind] = [row["down"] / 2 for row in loop.rows]  # of each client
        models[down, kind] = {name: array.tobytes() for name, array in loop.server.model.items()}
    assert models["bf16", "patch"] == models["bf16", "weights"]
    assert all(size < 1.01 * adapters for size in sizes["raw", "patch"][1:])
    assert all(size < 0.55 * adapters for size in sizes["bf16", "patch"][1:])
    assert sizes["bf16", "patch"][0] == pytest.approx(sizes["bf16", "weights"][0], rel=0.01)
    assert min(sizes["bf16", "weights"]) > 100 * max(sizes["bf16", "patch"][1:])
    assert min(sizes["nf4", "difference"][1:]) > 30 * max(sizes["bf16", "patch"][1:])


@pytest.mark.parametrize("kind", STEPS)
def test_steps_between_tensors_of_every_kind(tmp_path, kind):
    """Tied ones, 16 bits, whole numbers, scalars, empty ones; after a restart, too."""
    torch = pytest.importorskip("torch")

    def start():
        matrix = torch.arange(4096, dtype=torch.float32).reshape(64, 64) / 4096
        return {
            "embed": matrix,
            "head": matrix,
            "half": matrix.bfloat16(),
            "many": matrix.T.contiguous().double(),
            "count": torch.arange(5),
            "scale": torch.tensor(0.5),
            "none": torch.zeros(0, 3),
        }

    def train(state, client, round):
        assert state["embed"].data_ptr() == state["head"].data_ptr()
        changed = {name: tensor + 0.37 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        return {**changed, "head": changed["embed"]}, 1, {}

    task = Task(start, train, lambda state: float(state["embed"].sum()))
    for rounds in (2, 4):
        plan = both_ways(clients=1, rounds=rounds, down="bf16" if kind == "patch" else "nf4", down_kind=kind)
        with Loop(tmp_path, plan, start=start) as loop:
            loop.client("c", task)
        assert loop.ends == {"c": None} and not loop.notes
        assert same_files(tmp_path / "c" / "model.tw", tmp_path / "state" / f"broadcast-{rounds - 1}.tw")
        assert [step for step in loop.steps["c"] if "received" in step and f"a {kind}" in step]
    model = tensorwire.torch.load_file(tmp_path / "c" / "model.tw")
    assert model["embed"].data_ptr() == model["head"].data_ptr()
    for name, tensor in start().items():
        moved = 3 * 0.37 if tensor.is_floating_point() else 0
        assert torch.allclose(model[name].double(), tensor.double() + moved, atol=0.02), name


@pytest.mark.parametrize("kind", STEPS)
def test_a_late_client_gets_a_whole_model_then_differences(tmp_path, kind):
    task = TASKS[kind]()
    loop = Loop(tmp_path, both_ways(deadline=0.3, rounds=5, down_kind=kind), start=task.initial)
    with loop:
        loop.client("early", task)
        while len(loop.rows) < 2:
            time.sleep(0.01)
        loop.client("late", task, number=1)
    assert set(loop.ends.values()) == {None}
    fetched = [line for line in loop.steps["late"] if "received" in line]
    assert "the model" in fetched[0] and all(f"a {kind}" in line for line in fetched[1:])
    assert same_files(tmp_path / "early" / "model.tw", tmp_path / "late" / "model.tw")


def same_files(*paths):
    return len({path.read_bytes() for path in paths}) == 1


def test_a_client_that_has_missed_rounds_gets_one_difference_after_the_other(tmp_path):
    """As long as all of them are shorter than a whole model."""
    task = descending()
    with Loop(tmp_path, both_ways(clients=1, rounds=1), start=task.initial) as loop:
        loop.client("c", task)
    for rounds, expected in ((5, 4), (18, 0)):
        with Loop(tmp_path, both_ways(clients=1, rounds=rounds), start=task.initial) as loop:
            loop.client("other", task)
        assert len([*(tmp_path / "state").glob("difference-*")]) < 8
        folder = tmp_path / str(rounds)
        shutil.copytree(tmp_path / "c", folder / "c")
        shutil.copytree(tmp_path / "state", folder / "state")
        with Loop(folder, both_ways(clients=1, rounds=rounds + 1), start=task.initial) as loop:
            loop.client("c", task)
        steps = "".join(loop.steps["c"])
        assert loop.ends == {"c": None}
        assert steps.count("a difference") == expected + (expected > 0) and steps.count("the model") == (expected == 0)


@pytest.mark.parametrize("kind", STEPS)
def test_versions_survive_restarts_of_client_and_server(tmp_path, kind):
    """A restart on each side is as if it had not been: the same bits, and no whole model a second time."""
    task, plan = TASKS[kind](), both_ways(rounds=3, down_kind=kind)
    for rounds in range(1, 4):
        with Loop(tmp_path / "halting", replace(plan, rounds=rounds), start=task.initial) as loop:
            for number in range(2):
                loop.client(f"c{number}", task, number=number)
    steps = "".join(loop.steps["c0"])
    assert f"a {kind}" in steps and "the model" not in steps
    with Loop(tmp_path / "calm", plan, start=task.initial) as loop:
        for number in range(2):
            loop.client(f"c{number}", task, number=number)
    assert same_files(*(tmp_path / run / "state" / "model.tw" for run in ("halting", "calm")))
    assert same_files(*(tmp_path / run / "c0" / "model.tw" for run in ("halting", "calm")))


@pytest.mark.parametrize("lost", ["broadcast-0.tw", "step-1.tw", "both"])
@pytest.mark.parametrize("how", ["gone", "flipped"])
@pytest.mark.parametrize("kind", STEPS)
def test_a_server_sends_unknown_versions_whole(tmp_path, kind, lost, how):
    task, plan = TASKS[kind](), both_ways(clients=1, down_kind=kind)
    rounds = 2 if lost == "step-1.tw" else 1
    with Loop(tmp_path, replace(plan, rounds=rounds), start=task.initial) as loop:
        loop.client("c", task)
    for name in ("broadcast-1.tw", f"{kind}-1.tw") if lost == "both" else (lost.replace("step", kind),):
        path = tmp_path / "state" / name
        if path.exists():
            path.write_bytes(flipped(path.read_bytes())) if how == "flipped" else path.unlink()
    with Loop(tmp_path, replace(plan, rounds=rounds + 1), start=task.initial) as loop:
        loop.client("c", task)
    assert loop.ends == {"c": None} and [row["counted"] for row in loop.rows] == [True]
    newest = tmp_path / "state" / f"broadcast-{rounds}.tw"
    assert same_files(tmp_path / "c" / "model.tw", newest)


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:20], lambda data: b"", None])
@pytest.mark.parametrize("kind", STEPS)
def test_a_client_whose_version_is_damaged_gets_a_whole_model(tmp_path, kind, damage):
    task, plan = TASKS[kind](), both_ways(clients=1, down_kind=kind)
    with Loop(tmp_path, replace(plan, rounds=1), start=task.initial) as loop:
        loop.client("c", task)
    path = tmp_path / "c" / "model.tw"
    if damage is None:  # well-formed, but of nobody's making
        model = tensorwire.numpy.load_file(path)
        path.write_bytes(b"".join(encode(views({**model, "w": model["w"] + 1}), Terms("run", 0))))
    else:
        path.write_bytes(damage(path.read_bytes()))
    with Loop(tmp_path, replace(plan, rounds=2), start=task.initial) as loop:
        loop.client("c", task)
    assert loop.ends == {"c": None} and same_files(path, tmp_path / "state" / "broadcast-1.tw")


@pytest.mark.parametrize("kind", STEPS)
def test_a_client_killed_while_it_adds_a_difference_adds_it_once(tmp_path, kind, monkeypatch):
    """Before the sum has its name, or after: what the transfer keeps of the difference is enough."""
    task, plan = TASKS[kind](), both_ways(clients=1, down_kind=kind)
    for when in ("before", "after"):
        folder = tmp_path / when
        with Loop(folder, replace(plan, rounds=1), start=task.initial) as loop:
            loop.client("c", task)
        with Loop(folder, replace(plan, rounds=2), start=task.initial) as loop:
            client = Client("c", 0, task, loop.connect, folder / "c")
            client._leave = lambda error: None
            follow = client._follow

            def killed(*arguments, follow=follow, when=when):
                if when == "after":
                    follow(*arguments)
                raise Killed

            client._follow = killed
            with pytest.raises(Killed):
                client.run()
            assert same_files(folder / "c" / "model.tw", folder / "state" / "broadcast-1.tw") is False
            loop.client("c", task)
        assert loop.ends == {"c": None} and same_files(folder / "c" / "model.tw", folder / "state" / "broadcast-1.tw")
        assert not [*(folder / "c").glob(".*")]


def test_a_nonfinite_difference_is_sent_whole(tmp_path):
    """Two finite models may be farther apart than any float."""
    most = np.float32(3e38)
    start = lambda: {"w": np.full((200, 300), most)}  # noqa: E731
    task = Task(start, lambda state, client, round: ({"w": -state["w"]}, 1, {}), lambda state: float(state["w"][0, 0]))
    plan = both_ways(kind="weights", up="raw", clients=1, rounds=3)
    with Loop(tmp_path, plan, start=start) as loop:
        loop.client("c", task)
    assert loop.ends == {"c": None} and [row["counted"] for row in loop.rows] == [True] * 3
    assert (loop.server.model["w"] == -most).all() and sum("sent whole" in note for note in loop.notes) == 2
    assert list(simulate(task, plan))[-1].loss == -most


def test_no_model_is_sent_before_the_first_round(tmp_path):
    loop = Loop(tmp_path, exact())
    loop.server._begin_round = lambda began=loop.server._begin_round: (time.sleep(0.5), began())
    with loop:
        with loop.connect() as transport:
            transport.run(greet())
            transport.run(say({"client": "c", "want": "model"}))
            with pytest.raises(RefusedError, match="ask for its task"):
                transport.run(receive_stream(lambda offer: Recording(tmp_path / "got.tw", b"x")))
        loop.client("c")
    assert loop.ends == {"c": None}


@pytest.mark.parametrize("held", [None, 7, [1], {"a": 1}, "x" * 1000, "0" * 64])
@pytest.mark.parametrize("kind", STEPS)
def test_an_invalid_held_version_counts_as_unknown(tmp_path, kind, held):
    plan = both_ways(clients=1, rounds=1, down_kind=kind)
    with Loop(tmp_path, plan, start=descending().initial) as loop:
        with loop.connect() as transport:
            transport.run(greet())
            transport.run(say({"client": "c", "want": "task", "hold": 5}))
            transport.run(hear())
            transport.run(say({"client": "c", "want": "model", "held": held}))
            offer, _, _ = transport.run(receive_stream(lambda offer: Recording(tmp_path / "got.tw", b"x")))
            assert offer.name == ("encoded" if kind == "patch" else "model")
        loop.client("c", descending())


@pytest.mark.parametrize("kind", STEPS)
def test_invalid_steps_end_a_client_with_a_clear_error(tmp_path, kind):
    """A server that sends differences for ever, none of which leads to the model that it ordered."""
    task, folder = descending(), tmp_path / "c"
    folder.mkdir()
    model = task.initial()
    (folder / "model.tw").write_bytes(b"".join(encode(views(model), Terms("run", 0))))
    base = Recorded(folder / "model.tw").digest
    terms = Terms("run", 0, base, kind="difference" if kind == "difference" else "weights")
    again = b"".join(encode(views(model), terms))
    if kind == "patch":
        again = b"".join(tensorwire.encode(model, base=model, metadata=terms.metadata()))

    def stream():
        return send_stream(Offer(b"any", kind), Regenerated(lambda: [again]))

    with Fake({**ORDER, "round": 3}, stream) as server, pytest.raises(SchemaError, match="not towards"):
        Client("c", 0, task, server.connect, folder, patience=1).run()


def test_an_invalid_patch_ends_a_client_and_leaves_no_files(tmp_path):
    task, folder = descending(), tmp_path / "c"
    model, other = task.initial(), {"x": np.zeros((3, 4), np.float32)}
    folder.mkdir()
    held = b"".join(encode(views(model), Terms("run", 0)))
    (folder / "model.tw").write_bytes(held)
    terms = Terms("run", 1, Recorded(folder / "model.tw").digest)
    patches = {
        "neither what the patch is against": ({**model, "w": model["w"] + 2}, {**model, "w": model["w"] + 1}),
        "item 0|is for float32": ({"x": other["x"] + 1}, other),
    }
    sent = {why: [*tensorwire.encode(new, base=old, metadata=terms.metadata())] for why, (new, old) in patches.items()}
    sent["not a patch|against no version"] = [*encode(views(model), terms)]
    sent["another version"] = [*tensorwire.encode(model, base=model, metadata=Terms("run", 1, "0" * 64).metadata())]
    for why, buffers in sent.items():

        def stream(buffers=buffers):
            return send_stream(Offer(b"any", "patch"), Regenerated(lambda: buffers))

        with Fake({**ORDER, "round": 3}, stream) as server, pytest.raises(tensorwire.TensorwireError, match=why):
            Client("c", 0, task, server.connect, folder, patience=0.5).run()
        assert [path.name for path in folder.iterdir()] == ["model.tw"], why
        assert (folder / "model.tw").read_bytes() == held
