"""For tests of transports: certificates, listeners in a thread of their own, and what must not be left behind."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Final

import pytest
from leaks import left_open, open_files

from tensorwire.errors import TensorwireError
from tensorwire.transports import AsyncListener, AsyncTransport

PATIENCE: Final = (
    60.0  # seconds after which something that must happen is taken not to: a busy machine may take its time
)


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.002)


class Certificates:
    """PEM files of an authority, with a server and a client of its own and an expired server.

    Also of another authority, with its client.
    """

    def __init__(self, folder: Path) -> None:
        trustme = pytest.importorskip("trustme")
        ours, foreign = trustme.CA(), trustme.CA()
        past = datetime.now(timezone.utc) - timedelta(days=1)
        self.ca, self.foreign_ca = str(folder / "ca.pem"), str(folder / "foreign.pem")
        ours.cert_pem.write_to_path(self.ca)
        foreign.cert_pem.write_to_path(self.foreign_ca)
        names = ("localhost", "127.0.0.1", "::1")
        self.server = self._write(folder / "server", ours.issue_cert(*names))
        self.expired = self._write(folder / "expired", ours.issue_cert(*names, not_after=past))
        self.elsewhere = self._write(folder / "elsewhere", ours.issue_cert("elsewhere.example"))
        self.client = self._write(folder / "client", ours.issue_cert("me@example", common_name="me"))
        self.stranger = self._write(folder / "stranger", foreign.issue_cert("me@example", common_name="me"))

    @staticmethod
    def _write(stem: Path, certificate: Any) -> tuple[str, str]:
        paths = str(stem.with_suffix(".pem")), str(stem.with_suffix(".key"))
        certificate.cert_chain_pems[0].write_to_path(paths[0])
        certificate.private_key_pem.write_to_path(paths[1])
        return paths


class Server:
    """An AsyncListener in a thread; `errors` are those that its connections ended with."""

    def __init__(self, serve: Callable[[AsyncTransport], Awaitable[None]], **options: Any) -> None:
        self.errors: list[TensorwireError] = []
        self.loop = asyncio.new_event_loop()
        self._listener = AsyncListener(serve, on_error=self.errors.append, **options)
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="server")

    @property
    def port(self) -> int:
        return self._listener.port

    def __enter__(self) -> "Server":
        self._thread.start()
        assert self._ready.wait(PATIENCE)
        return self

    def __exit__(self, *exc: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def error(self) -> TensorwireError:
        """The first error, once there is one."""
        until(lambda: bool(self.errors))
        return self.errors[0]

    def knows(self, peers: int) -> bool:
        """Whether conversations have been held with so many that are still there."""
        return sum(wire.known for wire in list(self._listener._tasks)) == peers

    def _run(self) -> None:
        async def main() -> None:
            async with self._listener:
                self._ready.set()
                await self._stop.wait()

        with (
            asyncio.Runner(loop_factory=lambda: self.loop)
            if hasattr(asyncio, "Runner")
            else _Plain(self.loop) as runner
        ):
            runner.run(main())


class _Plain:
    """`asyncio.Runner` for Python 3.10."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def __enter__(self) -> "_Plain":
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def run(self, main: Any) -> None:
        self._loop.run_until_complete(main)


@contextmanager
def nothing_left(folder: Path | None = None, *, seconds: float = PATIENCE) -> Iterator[None]:
    """Descriptors and threads are as before when the block has ended, or soon after; in `folder` no part is left."""
    files, threads = open_files(), threading.enumerate()
    yield
    end = time.monotonic() + seconds
    while (left_open(files) or {*threading.enumerate()} - {*threads}) and time.monotonic() < end:
        time.sleep(0.02)
    assert [thread for thread in threading.enumerate() if thread not in threads] == []
    assert not left_open(files)
    if folder is not None:
        assert not list(folder.glob("**/.*.part"))
