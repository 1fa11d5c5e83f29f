"""Patches and a store of versions with NumPy alone, as a worker without torch has them."""

from pathlib import Path

import numpy as np
import pytest

import tensorwire
from tensorwire import SchemaError
from tensorwire.versions import Publisher, Subscriber


def version(number: int) -> dict[str, np.ndarray]:
    weights = np.random.default_rng(7).standard_normal((200, 300))
    halves = weights.astype(np.float16)
    halves.reshape(-1).view(np.uint16)[number::90] += 1
    return {"halves": halves, "floats": weights.astype(np.float32) + number, "counts": np.arange(50) * number}


def test_a_patch_makes_one_version_of_another() -> None:
    old, new = version(1), version(2)
    patch = b"".join(tensorwire.encode(new, base=old))
    assert tensorwire.apply(patch, old).written > 0
    assert all(np.array_equal(old[name], new[name]) for name in new)
    assert tensorwire.digest(old) == tensorwire.digest(new)
    assert tensorwire.apply(patch, old).written == 0
    other, before = version(3), version(3)
    with pytest.raises(SchemaError):
        tensorwire.apply(patch, other)
    assert all(np.array_equal(other[name], before[name]) for name in other)


def test_a_store_is_followed(tmp_path: Path) -> None:
    worker, subscriber = version(0), Subscriber(str(tmp_path))
    for number in range(1, 4):
        with Publisher(str(tmp_path)) as publisher:
            publisher.publish(version(number))
        subscriber.fetch().apply(worker)
        assert tensorwire.digest(worker) == tensorwire.digest(version(number))
