"""An honest upload to a listener beside idle and trickling connections: `python bench/idle_connections.py`.

The listener, the crowd and the honest peer are a process each. Half of the crowd has greeted, half has not; trickling
ones send a byte a second of their next message (with --tls, the first half of a TLS handshake). The crowd is niced: in
life it has machines of its own. Alone and crowded take turns; medians. Exit code 1 where the crowd costs more than half
as much time again.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import tensorwire
from tensorwire.transfer import Offer, Recording, Regenerated, greet, receive_stream, send_stream
from tensorwire.transports import HANDSHAKE, AsyncListener, AsyncTransport, TcpTransport, client_tls, server_tls

MIB = 1 << 20
BAR = 1.5
TLS_HELLO = bytes.fromhex("160301020001000001fc0303")  # the beginning of one


def listen(pipe: Connection, folder: str, tls: bool) -> None:
    async def serve(transport: AsyncTransport) -> None:
        await transport.run(greet(), within=HANDSHAKE)
        path = Path(folder) / "received.tw"
        while True:
            await transport.run(receive_stream(lambda offer: Recording(path, offer.transfer)))

    async def main() -> None:
        context = server_tls(f"{folder}/server.pem", f"{folder}/server.key") if tls else None
        async with AsyncListener(serve, tls=context) as listener:
            pipe.send(listener.port)
            await asyncio.to_thread(pipe.recv)

    asyncio.run(main())


def crowd(pipe: Connection, port: int, idle: int, trickling: int, ca: str | None) -> None:
    """Comes back whenever it is thrown out."""

    async def one(number: int, trickles: bool) -> None:
        while True:
            try:
                await (stay(trickles) if number % 2 else stay_greeted(trickles))
            except OSError:  # each turn may be thrown out
                await asyncio.sleep(0.1)

    async def stay(trickles: bool) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        connected()
        begun = TLS_HELLO * 50 if ca else b"\x93TWM" + bytes(200)
        try:
            while True:
                await asyncio.sleep(1)
                if trickles:
                    writer.write(begun[:1])
                    begun = begun[1:]
                    await writer.drain()
        finally:
            writer.close()

    async def stay_greeted(trickles: bool) -> None:
        tls = client_tls(ca=ca) if ca else None
        async with await AsyncTransport.connect("127.0.0.1", port, tls=tls) as transport:
            await transport.run(greet(), within=HANDSHAKE)
            connected()
            begun = b"\x93TWM" + bytes(200)
            while True:
                await asyncio.sleep(1)
                if trickles:
                    await transport.send([begun[:1]])
                    begun = begun[1:]

    def connected() -> None:
        nonlocal missing
        missing -= 1
        if missing == 0:
            pipe.send("all there")

    async def main() -> None:
        tasks = [asyncio.create_task(one(n, n < trickling)) for n in range(idle + trickling)]
        await asyncio.to_thread(pipe.recv)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    missing = idle + trickling
    os.nice(19)
    asyncio.run(main())


def upload(port: int, value: Any, number: int, ca: str | None) -> float:
    tls = client_tls(ca=ca) if ca else None
    start = perf_counter()
    with TcpTransport.connect("127.0.0.1", port, tls=tls) as transport:
        transport.run(greet(), within=HANDSHAKE)
        transport.run(send_stream(Offer(b"%d" % number), Regenerated(lambda: tensorwire.encode(value))))
    return perf_counter() - start


def measure(idle: int, trickling: int, size: int, turns: int, *, tls: bool) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    value = np.random.default_rng(0).standard_normal(size // 4, np.float32)
    alone, crowded = [], []
    with tempfile.TemporaryDirectory() as folder:
        ca = make_certificates(folder) if tls else None
        here, there = context.Pipe()
        listener = context.Process(target=listen, args=(there, folder, tls), daemon=True)
        listener.start()
        port = here.recv()
        upload(port, value, 1000, ca)
        for turn in range(turns):
            alone.append(upload(port, value, 2 * turn, ca))
            ours, theirs = context.Pipe()
            mob = context.Process(target=crowd, args=(theirs, port, idle, trickling, ca), daemon=True)
            mob.start()
            ours.recv()
            crowded.append(upload(port, value, 2 * turn + 1, ca))
            ours.send("go")
            mob.join()
        here.send("stop")
        listener.join()
    result = {"idle": idle, "trickling": trickling, "mib": size / MIB, "tls": tls}
    return {**result, "alone_s": median(alone), "crowded_s": median(crowded), "ratio": median(crowded) / median(alone)}


def make_certificates(folder: str) -> str:
    import trustme

    ca = trustme.CA()
    server = ca.issue_cert("127.0.0.1")
    ca.cert_pem.write_to_path(f"{folder}/ca.pem")
    server.cert_chain_pems[0].write_to_path(f"{folder}/server.pem")
    server.private_key_pem.write_to_path(f"{folder}/server.key")
    return f"{folder}/ca.pem"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle", type=int, default=200)
    parser.add_argument("--trickling", type=int, default=200)
    parser.add_argument("--mib", type=int, default=100)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--tls", action="store_true")
    options = parser.parse_args()
    figures = measure(options.idle, options.trickling, options.mib * MIB, options.turns, tls=options.tls)
    print(json.dumps(figures))
    sys.exit(figures["ratio"] > BAR)
