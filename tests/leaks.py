"""What the code under test left open, whatever other tests of the process left before it."""

import gc
import os
from pathlib import Path


def open_files() -> set[tuple[str, str]]:
    """The descriptors of this process, each with what it names: a number that is used again is not the same one.

    Empty where the system does not list them. Garbage is collected first, so that what an earlier test dropped is not
    closed while the next one is looked at.
    """
    gc.collect()
    found = set()
    folder = Path("/proc/self/fd")
    for number in os.listdir(folder) if folder.is_dir() else ():
        try:
            found.add((number, os.readlink(folder / number)))
        except FileNotFoundError:  # the one that lists them
            continue
    return found
