"""Checking and averaging the updates of a round, by number of clients: `python bench/aggregate.py [MIB] [CODEC]`.

An fp32 model of MIB mebibytes (1024) and updates encoded with CODEC (nf4), read from one recording in a file
that stands for all clients. Prints seconds, and memory at peak beyond the model.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

from tensorwire.bench import machine
from tensorwire.bench.rss import Rise
from tensorwire.fl.aggregate import Rules, aggregate, check_update
from tensorwire.fl.updates import Terms, encode, views
from tensorwire.storage.output import Output

CLIENTS = (2, 4, 8, 16)
ITEM_MIB = 64


def main(mib: int, codec: str) -> None:
    print(machine.describe())
    block = np.random.default_rng(0).standard_normal(ITEM_MIB << 18).astype(np.float32) * np.float32(0.02)
    model = {f"layer.{number}": block.copy() for number in range(mib // ITEM_MIB)}
    terms = Terms("bench", 0, client="0", kind="difference")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "0.tw")
        start = perf_counter()
        with path.open("wb") as file:
            size = Output(file.fileno()).append(encode(views(model, model), terms, codec=codec))
        print(f"{mib} MiB, {codec}: difference encoded to {size / 2**20:.0f} MiB in {perf_counter() - start:.2f} s")
        rise, start = Rise(), perf_counter()
        with path.open("rb", buffering=0) as source:
            update = check_update(source, model, terms, Rules(), recording=path)
        print(f"checked in {perf_counter() - start:.2f} s, {rise.peak() / 2**20:.0f} MiB")
        for count in CLIENTS:
            updates = [replace(update, terms=replace(terms, client=str(client))) for client in range(count)]
            rise, start = Rise(), perf_counter()
            aggregate(updates, model)
            print(f"{count} clients averaged in {perf_counter() - start:.2f} s, {rise.peak() / 2**20:.0f} MiB")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(int(arguments[0]) if arguments else 1024, arguments[1] if len(arguments) > 1 else "nf4")
