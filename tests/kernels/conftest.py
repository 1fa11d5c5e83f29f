"""The implementations under test: the NumPy twin, and every instruction set that runs here."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # for bnb_compat, which other directories use too

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # a missing extension: the skips below say so
    from tensorwire.kernels import _numpy

try:
    from tensorwire.kernels import _native
except ImportError:
    _native = None

# Without the extension there is nothing to compare: pytest skips those tests, saying so.
TIERS = tuple(_native.supported()) if _native else ()


def _implementation(name: str) -> Iterator[ModuleType]:
    if name == "numpy":
        yield _numpy
        return
    before = _native.isa()
    _native.use(name)
    assert _native.isa() == name
    yield _native
    _native.use(before)


@pytest.fixture(scope="module", params=("numpy", *TIERS))
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Every implementation, in turn."""
    yield from _implementation(request.param)


@pytest.fixture(scope="module", params=TIERS)
def native(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Every implementation but the twin, to be compared with it."""
    yield from _implementation(request.param)
