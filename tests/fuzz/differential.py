"""The library against the reference reader, over changed streams: both refuse, or both accept and hold the same values.

    python tests/fuzz/differential.py --mutants 1000000 --seed 1
    python tests/fuzz/differential.py --mutants 200000 --only sparse lowrank

Half of the changes leave every checksum right (mutants.py), so that the checks behind them decide; one in ten is to the
bytes themselves. Small good vectors are the material. A disagreement is printed as base64 and the exit code is 1.

For speed the checksum of the builder and of the reference reader is the library's here: that both are CRC-32C, bit for
bit, is a test of its own (tests/test_reference.py). One process; nice it.
"""

import argparse
import base64
import collections
import os
import random
import sys
import time
from pathlib import Path

if os.access("/dev/shm", os.W_OK):  # files are received, synced and read again by the thousand
    os.environ.setdefault("TMPDIR", "/dev/shm")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "golden")]

import frames
import numpy as np
import reference
from frames import take_apart
from fuzz.mutants import damaged, mutate
from vectors import GOOD, Verdict, content, library, read_reference, same, stored

import tensorwire.numpy as tw
from tensorwire.checksum import crc32c

__all__ = ["compare", "material", "quick_checksums"]

SMALL = 2500


def quick_checksums() -> None:
    """Let builder and reference reader use the library's CRC."""
    frames.crc32c = reference.crc32c = lambda data: crc32c(data, 0)


def material() -> dict[str, bytes]:
    """Small good streams, and a few of several things at once."""
    streams = {name: stored(name) for name in GOOD if len(stored(name)) < SMALL}
    rng = np.random.default_rng(0)
    for codec in (
        "int8:blocksize=16",
        "int8-linear:blocksize=16",
        "nf4:blocksize=32",
        "fp4|zstd",
        "nf4|entropy",
        "entropy",
        "nf4:double_quant=true",
        "bf16|zstd",
        "sparse:k=2,bits=2,rows=2,cols=5,width=9",
        "sparse:k=8,dct=true,rows=3,cols=8,width=15|zstd",
        "sparse:k=2,bits=2,rows=2,cols=5,width=9,scaled=true",
        "lowrank:rank=2,width=9",
    ):
        values = rng.standard_normal(45).astype(np.float32)
        streams[codec] = tw.dumps({"a": values, "n": [1, (2.5, "x")], "b": values[:7].astype(np.float16)}, codec=codec)
    return streams


def compare(stream: bytes) -> tuple[str, str | None]:
    """What the library says, and, where the reference reader says otherwise, what that is."""
    verdict: Verdict = library(stream)
    if verdict.error == "SchemaError":
        verdict = library(stream, file=True)
        if verdict.error == "SchemaError":  # a file beside tensors: a valid stream that no function takes as a whole
            return "SchemaError", None
    try:
        theirs = read_reference(stream)
    except reference.Refused as error:
        truncated = isinstance(error, reference.Truncated)
        if verdict.error is None or (verdict.error == "TruncatedError") != truncated:
            return (
                verdict.error or "accepted",
                f"reference: {type(error).__name__} {error}; library: {verdict}",
            )
        return verdict.error, None
    if verdict.error is not None:
        return verdict.error, f"reference: accepts; library: {verdict}"
    if not same(verdict.value, content(theirs.root)):
        return "accepted", "other values"
    return "accepted", None


def main() -> int:
    parser = argparse.ArgumentParser(description="Library against reference reader over changed streams.")
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[""], help="streams whose name has one of these in it")
    arguments = parser.parse_args()
    quick_checksums()
    spread = random.Random(arguments.seed)
    streams = {name: data for name, data in material().items() if any(part in name for part in arguments.only)}
    parts = {name: (take_apart(stream), read_reference(stream).align) for name, stream in streams.items()}
    names = [*streams]
    said: collections.Counter = collections.Counter()
    apart, began = 0, time.monotonic()
    for number in range(arguments.mutants):
        name = spread.choice(names)
        taken, align = parts[name]
        if spread.random() < 0.1:
            mutant = damaged(streams[name], spread)
        else:
            mutated = mutate(taken, spread)
            if mutated and spread.random() < 0.3:
                mutated = mutate(mutated, spread)
            mutant = frames.assemble(mutated, align=align)
            if spread.random() < 0.1:
                mutant = damaged(mutant, spread)
        try:
            verdict, disagreement = compare(mutant)
        except Exception as error:
            verdict, disagreement = type(error).__name__, f"raised {error!r}"
        said[verdict] += 1
        if disagreement is not None:
            apart += 1
            print(f"{name} #{number}: {disagreement}\n  {base64.b64encode(mutant).decode()}", flush=True)
    seconds = time.monotonic() - began
    print(f"{arguments.mutants:,} mutants in {seconds:.0f} s, {apart} disagreements; the library said:")
    for verdict, count in said.most_common():
        print(f"  {verdict:18} {count:10,}")
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
