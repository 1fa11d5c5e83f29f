"""A bare socket program beside tensorwire in raw container mode, in turns: `python bench/bare_socket.py [MODEL]`.

Both send the bytes of MODEL (llama-3.2-1b, 5716 MiB) over loopback from one process into fresh memory of another.
"""

import json
import multiprocessing
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from time import perf_counter

import numpy as np

from tensorwire.bench import models

MODEL = sys.argv[1] if len(sys.argv) > 1 else "llama-3.2-1b"
SIZE = models.resolve(MODEL).nbytes
PIECE = 1 << 20
BUFFER = 4 << 20
TURNS = 3
COMMAND = ["bench", "memory", "--model", MODEL, "--mode", "container", "--codec", "raw", "--json", "-"]


def receive(pipe: Connection) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    pipe.send(server.getsockname()[1])
    connection, _ = server.accept()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    view = memoryview(np.empty(SIZE, np.uint8))
    start = perf_counter()
    while view:
        view = view[connection.recv_into(view[:PIECE]) :]
    pipe.send(perf_counter() - start)


def bare() -> float:
    here, there = multiprocessing.Pipe()
    data = memoryview(np.ones(SIZE, np.uint8))
    process = multiprocessing.Process(target=receive, args=(there,))
    process.start()
    with socket.create_connection(("127.0.0.1", here.recv())) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        for begin in range(0, SIZE, PIECE):
            connection.sendall(data[begin : begin + PIECE])
        seconds = here.recv()
    process.join()
    return seconds


def ours() -> float:
    done = subprocess.run([sys.executable, "-m", "tensorwire", *COMMAND], capture_output=True, check=True)
    return json.loads(done.stdout)[0]["seconds"]


if __name__ == "__main__":
    for _ in range(TURNS):
        print(f"bare {bare():.2f} s, tensorwire {ours():.2f} s", flush=True)
