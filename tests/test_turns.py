"""Turns at receiving: how many at a time, who waits, and who loses a place."""

import asyncio
import threading
import time
from contextlib import suppress

import pytest

from tensorwire.errors import TransportError
from tensorwire.transfer import RefusedError, greet, hear, say, wait
from tensorwire.transports import AsyncListener, TcpTransport, Turns


class Hall:
    """A server on which a peer's turn is to say one word, whatever it does before."""

    def __init__(self, places: int, line: int) -> None:
        self._places, self._line_length = places, line
        self.heard, self.at_once, self.most = [], 0, 0
        self.busy = False

    async def _serve(self, transport):
        await transport.run(greet())
        await self._turns.take(transport, self._listen(), is_working=lambda: self.busy)

    def _listen(self):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            message = yield from hear()
            self.heard.append(message["word"])
            yield from say({"heard": message["word"]})
        finally:
            self.at_once -= 1

    async def _run(self):
        self._turns = Turns(self._places, line=self._line_length)
        async with AsyncListener(self._serve, on_error=lambda error: None) as listener:
            self.port = listener.port
            self._ready.set()
            await asyncio.to_thread(self._stop.wait)

    def __enter__(self):
        self._ready, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *exc):
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def visit(self, word, pause=0.0):
        with TcpTransport.connect("127.0.0.1", self.port, timeout=5) as transport:
            transport.run(greet())
            until = time.monotonic() + pause
            while time.monotonic() < until:
                transport.run(wait())
                time.sleep(0.05)
            transport.run(say({"word": word}))
            return transport.run(hear())["heard"]


def visitors(hall, number, pause):
    threads = [threading.Thread(target=lambda n=n: hall.visit(str(n), pause)) for n in range(number)]
    for thread in threads:
        thread.start()
    return threads


def test_turns_are_limited_and_everyone_gets_one(monkeypatch):
    monkeypatch.setattr("tensorwire.transports.turns._KEPT", 0.05)  # those who wait are told so, often
    with Hall(2, line=16) as hall:
        for thread in visitors(hall, 6, 0.2):
            thread.join(20)
    assert sorted(hall.heard) == [*"012345"] and hall.most == 2 and hall.at_once == 0


def test_a_peer_is_told_to_retry_if_too_many_wait():
    with Hall(1, line=0) as hall, pytest.raises(RefusedError) as caught:
        hall.visit("never")
    assert caught.value.kind == "busy" and caught.value.retryable and hall.heard == []


@pytest.mark.parametrize("busy", [False, True])
def test_a_silent_peer_loses_its_turn_while_others_wait(monkeypatch, busy):
    monkeypatch.setattr("tensorwire.transports.turns._STALL", 0.1)
    ended = {}

    def sit():
        with suppress(TransportError):
            ended["sitter"] = hall.visit("late", pause=0.4)

    with Hall(1, line=4) as hall:
        hall.busy = busy
        sitter = threading.Thread(target=sit)
        sitter.start()
        while not hall.at_once:
            time.sleep(0.01)
        assert hall.visit("next") == "next"
        sitter.join(20)
    assert hall.heard == (["late", "next"] if busy else ["next"]) and hall.most == 1
    assert ("sitter" in ended) == busy
