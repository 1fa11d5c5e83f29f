"""Coverage-guided fuzzing of the decoder (atheris): whatever the bytes, whole or one by one, a value or a WireError;
the same verdict both ways; the reference reader agrees on whether it is a stream and on what it holds; and what was
accepted is written again as it was read.

    python tests/fuzz/fuzz_decoder.py CORPUS [libFuzzer's options]

Mutations know what a stream is made of (mutants.py): libFuzzer's own work on the payload of a frame, after which every
sequence number, link, checksum and total is mended. Seeds are the golden vectors: tests/fuzz/run puts them into CORPUS.
"""

import random
import sys
from pathlib import Path

import atheris

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "golden")]

with atheris.instrument_imports(include=["tensorwire"]):
    import tensorwire.numpy as tw

import frames
from fuzz.differential import compare, quick_checksums
from fuzz.mutants import forgiving, mutate
from vectors import library, plain, same, single_bytes

quick_checksums()


def one_input(data: bytes) -> None:
    whole = library(data)
    again = library(single_bytes(data))
    assert again.place == whole.place, (whole, again)
    assert same(whole.value, again.value)
    _, disagreement = compare(data)
    assert disagreement is None, disagreement
    if whole.error is None:
        value = tw.loads(data)
        assert same(plain(tw.loads(tw.dumps(value))), whole.value)


def mutator(data: bytes, max_size: int, seed: int) -> bytes:
    spread = random.Random(seed)
    taken = forgiving(data) if spread.random() < 0.9 else None
    if taken is None:
        return atheris.Mutate(data, max_size)
    parts, align = taken
    own = (lambda payload: bytes(atheris.Mutate(payload, len(payload) + 16))) if spread.random() < 0.6 else None
    for _ in range(spread.choice((1, 1, 1, 2, 3))):
        if parts:
            parts = mutate(parts, spread, own)
    return frames.assemble(parts, align=align)[:max_size]


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input, custom_mutator=mutator)
    atheris.Fuzz()
