"""Changed patches, their frames mended: each is refused, or makes the version that it names; both readers agree.

python tests/fuzz/patches.py --mutants 1000

What is changed is the payload of a frame: bits, bytes, pieces cut out or repeated. Lengths, sequence numbers, links and
checksums of frames are made to fit, so that only what a patch itself is bound to can tell.
"""

import argparse
import copy
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "golden")]

import reference
from frames import BUNDLE, DATA, ITEM, STREAM, assemble, take_apart
from vectors import stored, zstd_decompress

import tensorwire
from tensorwire import EncodeError, WireError

_SECOND_OPINION = 50  # one of so many mutants is read by the reference reader as well: it is slow


def mutant(patch: bytes, spread: random.Random) -> bytes:
    """A patch one of whose frames has another payload."""
    frames = take_apart(patch)
    place = spread.choice([number for number, frame in enumerate(frames) if frame.type in (STREAM, ITEM, DATA, BUNDLE)])
    payload = bytearray(frames[place].payload or b"")
    at, size = spread.randrange(len(payload)), spread.randrange(1, 9)
    way = spread.randrange(4)
    if way == 0:
        payload[at] ^= 1 << spread.randrange(8)
    elif way == 1:
        payload[at : at + size] = spread.randbytes(len(payload[at : at + size]))
    elif way == 2:
        del payload[at : at + size]
    else:
        payload[at:at] = payload[max(at - size, 0) : at]
    frames[place] = replace(frames[place], payload=bytes(payload))
    return assemble(frames)


def verdict(patch: bytes, old: Any, target: str) -> str:
    """What becomes of a patch: `refused`, or `applied` where it makes the version that it names."""
    state = copy.deepcopy(old)
    try:
        tensorwire.apply(patch, state)
    except (WireError, EncodeError):
        return "refused"
    made = tensorwire.digest(state)
    assert made == tensorwire.Patch.read(patch).target, "a patch made another version than it names"
    return "applied" if made == target else "another"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    spread = random.Random(arguments.seed)
    base, patch = stored("patches/old"), stored("patches/to-new")
    old = tensorwire.torch.loads(base)
    target = tensorwire.Patch.read(patch).target
    counts = dict.fromkeys(("refused", "applied", "another"), 0)
    for number in range(arguments.mutants):
        changed = mutant(patch, spread)
        said = verdict(changed, old, target)
        counts[said] += 1
        if number % _SECOND_OPINION == 0:
            try:
                reference.apply(changed, base, zstd_decompress)
                other = "applied"
            except reference.Refused:
                other = "refused"
            assert (other == "refused") == (said == "refused"), (
                f"mutant {number} of seed {arguments.seed}: {said}, {other}"
            )
    print(f"{arguments.mutants} changed patches: {counts}")
    return 1 if counts["another"] else 0


if __name__ == "__main__":
    sys.exit(main())
