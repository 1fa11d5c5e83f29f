"""What the code under test left open, whatever other tests of the process left before it."""

import gc
import os
from pathlib import Path

Files = set[tuple[str, str]]


def open_files() -> Files:
    """The descriptors of this process, each with what it names: a number that is used again is not the same one.

    Empty where the system does not list them.
    """
    found = set()
    folder = Path("/proc/self/fd")
    for number in os.listdir(folder) if folder.is_dir() else ():
        try:
            found.add((number, os.readlink(folder / number)))
        except FileNotFoundError:  # the one that lists them
            continue
    return found


def left_open(before: Files) -> Files:
    """What was opened since then and is still open, garbage aside."""
    left = open_files() - before
    if left:
        gc.collect()  # which takes long where torch is loaded
        left = open_files() - before
    return left
