"""kill -9 at random points of publish, fetch, apply and follow: only versions are left, and the next run goes on.

The state of the worker that is killed is a file that is mapped into memory, so that what was written stays.
"""

import inspect
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from test_versions import Followers, flat, served

from tensorwire.versions import Publisher, Subscriber

__all__ = ["served"]  # a fixture

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


# Goes on from the newest version, to the last one.
PUBLISHER = """
import sys
from typing import Any
import numpy as np
from tensorwire.versions import Publisher

STATE = dict[str, Any]
{flat}
with Publisher(sys.argv[1], anchor_every=7, keep=2) as publisher:
    for step in range(publisher.head.number if publisher.head else 0, int(sys.argv[2])):
        print(publisher.publish(flat(step)).number, flush=True)
"""


def test_a_publisher_that_is_killed_and_started_again_under_four_followers(served: tuple[Path, str]) -> None:
    """Every follower only ever has whole versions, in their order, and ends at the last."""
    folder, url = served
    count, kills = 50, 0
    with Publisher(folder) as publisher:
        publisher.publish(flat(0))
    followers = Followers(url, count)
    for pause in (0.0, 0.2):
        followers.start(followers.keep_state, pause)
    for number in range(2):
        followers.start(followers.keep_file, folder.parent / f"{number}.safetensors")
    rng = random.Random(3)
    script = PUBLISHER.format(flat=inspect.getsource(flat))  # not the module, which loads torch
    command = [sys.executable, "-W", "ignore", "-c", script, str(folder), str(count)]
    while Subscriber(folder).manifest().head.number < count and not followers.trouble:
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent) as process:
            assert process.stdout is not None
            for _ in range(rng.randrange(2, 10)):
                process.stdout.readline()
            time.sleep(rng.uniform(0, 0.03))
            process.kill()
        kills += 1
    followers.join()
    assert not followers.trouble, followers.trouble
    assert kills > 4
    with Publisher(folder, keep=2) as publisher:  # what they left is removed
        publisher.publish(flat(count))
        publisher.publish(flat(count + 1))
        assert {path.name for path in folder.glob("*.tw")} >= Subscriber(folder).manifest().files
    assert not list(folder.glob("*.part"))
