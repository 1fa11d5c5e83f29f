"""Checking and averaging the updates of a round, by number of clients: `python bench/aggregate.py [MIB] [CODEC]`.

An fp32 model of MIB mebibytes (1024) and updates encoded with CODEC (nf4), read from one recording in a file
that stands for all clients. Prints seconds, memory at peak beyond the model, and for what each further client adds the
fp32 bytes a second, beside those of a memcpy of a block of the model in the same run.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from tensorwire.bench import Rise, machine
from tensorwire.storage import write_file
from tensorwire.updates import Terms, average, check_update, encode, subtract

CLIENTS = (2, 4, 8, 16)
ITEM_MIB = 64


def main(mib: int, codec: str) -> None:
    print(machine.describe())
    item_mib = min(mib, ITEM_MIB)
    block = np.random.default_rng(0).standard_normal(item_mib << 18).astype(np.float32) * np.float32(0.02)
    model = {f"layer.{number}": block.copy() for number in range(mib // item_mib)}
    terms = Terms("bench", 0, client="0", kind="difference")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "0.tw")
        start = perf_counter()
        size = write_file(path, encode(subtract(model, model), terms, codec=codec))
        print(f"{mib} MiB, {codec}: difference encoded to {size / 2**20:.0f} MiB in {perf_counter() - start:.2f} s")
        rise, start = Rise(), perf_counter()
        with path.open("rb", buffering=0) as source:
            update = check_update(source, model, terms, recording=path)
        print(f"checked in {perf_counter() - start:.2f} s, {rise.peak() / 2**20:.0f} MiB")
        seconds = {}
        for count in CLIENTS:
            updates = [replace(update, terms=replace(update.terms, client=str(client))) for client in range(count)]
            rise, start = Rise(), perf_counter()
            average(updates, into=model)
            seconds[count] = perf_counter() - start
            print(f"{count} clients averaged in {seconds[count]:.2f} s, {rise.peak() / 2**20:.0f} MiB")
    added = (seconds[CLIENTS[-1]] - seconds[CLIENTS[0]]) / (CLIENTS[-1] - CLIENTS[0])
    rate, memcpy = mib * 2**20 / added / 1e9, block.nbytes / copied(block) / 1e9
    print(f"a further client: {rate:.1f} GB/s of fp32, {rate / memcpy:.2f} of memcpy ({memcpy:.1f} GB/s)")


def copied(block: np.ndarray) -> float:
    """Seconds that a copy of a block takes into memory that was written before, the median of 9."""
    target, seconds = block.copy(), []
    for _ in range(9):
        start = perf_counter()
        np.copyto(target, block)
        seconds.append(perf_counter() - start)
    return median(seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mib", type=int, nargs="?", default=1024, metavar="MIB")
    parser.add_argument("codec", nargs="?", default="nf4", metavar="CODEC")
    options = parser.parse_args()
    main(options.mib, options.codec)
