"""kill -9 at random points of fetch, apply and follow: only versions are left, and a second run ends at the newest.

The state of the worker that is killed is a file that is mapped into memory, so that what was written stays.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

from tensorwire.versions import Publisher

KILLS = 200

# Without torch, which takes long to load: forks workers, kills them, and looks at what they leave.
LOOP = """
import os, random, signal, sys, time
from pathlib import Path

import numpy as np
import tensorwire
from tensorwire.versions import Subscriber, follow

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
BLOCK = 1 << 20  # elements
versions = [np.load(folder / f"{number}.npy") for number in range(3)]
digests = [tensorwire.digest({"w": version}) for version in versions]
file, out = folder / "worker.npy", folder / "out.safetensors"


def mapped():
    return {"w": np.lib.format.open_memmap(file, mode="r+")}


def work(*, follows=True):
    state = mapped()
    Subscriber(folder / "store", have=tensorwire.digest(state)).fetch().apply(state)
    if follows:
        for _ in follow(folder / "store", out, timeout=0):
            pass


def killed_after(seconds):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return tensorwire.digest(mapped())


rng = random.Random(5)
np.save(file, versions[0])
began = time.monotonic()
work()
took = time.monotonic() - began
untouched = done = between = 0
for kill in range(kills):
    first = kill % 2  # a chain of two patches, or one
    np.save(file, versions[first])
    left = killed_after(rng.uniform(0, 1.5 * took))
    untouched += left == digests[first]
    done += left == digests[-1]
    between += left not in (digests[first], digests[-1])
    found = np.load(file)
    assert np.any([found == version for version in versions[first:]], axis=0).all(), "no version's value"
    torn = 0
    for start in range(0, found.size, BLOCK):
        block = slice(start, start + BLOCK)
        torn += not any(np.array_equal(found[block], version[block]) for version in versions[first:])
    assert torn <= 1, "more than the block that was being copied"
    if out.exists():
        assert tensorwire.digest(tensorwire.loads(tensorwire.safetensors.encode(out))) in digests, "no whole version"
    work(follows=kill % 8 == 0)
    assert tensorwire.digest(mapped()) == digests[-1]
    if kill % 3:
        out.unlink(missing_ok=True)
    else:
        tensorwire.safetensors.decode(tensorwire.encode({"w": versions[first]}), out)
    for part in folder.glob(".*.part"):
        part.unlink()
print(untouched, done, between)
"""


def test_kill_9_at_random_points_of_fetch_and_apply(tmp_path: Path) -> None:
    state = {"w": np.random.default_rng(1).normal(size=5 << 18).astype(np.float32)}
    with Publisher(tmp_path / "store") as publisher:
        for number in range(3):
            state["w"][number::300] *= 1.001
            publisher.publish(state)
            np.save(tmp_path / f"{number}.npy", state["w"])
    command = [sys.executable, "-W", "ignore", "-c", LOOP, str(tmp_path), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    untouched, finished, between = map(int, done.stdout.split())
    assert min(untouched, finished, between) > 0 and untouched + finished + between == KILLS
