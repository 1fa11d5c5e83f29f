"""What all tests share: the package under test, how hard the property tests try, and which tests are slow."""

import gc
import logging
import os
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from quick import SLOW

HERE = Path(__file__).parent
sys.path.append(str(HERE / "golden"))  # the vectors, and what reads them

# Without the extension the tests would run on the NumPy twins alone, and skip the rest. The warning names the cause.
with warnings.catch_warnings():
    warnings.filterwarnings("error", message="tensorwire: ", category=RuntimeWarning)
    try:
        import tensorwire
    except RuntimeWarning as warning:
        raise pytest.UsageError(str(warning)) from None

# CI: the same examples each time, no deadline on a shared machine. TENSORWIRE_EXHAUSTIVE=1 tries ten times as many.
EXHAUSTIVE = os.environ.get("TENSORWIRE_EXHAUSTIVE") == "1"
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=60, database=None,
                          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
settings.register_profile("exhaustive", settings.get_profile("ci"), max_examples=600, derandomize=False)
settings.load_profile("exhaustive" if EXHAUSTIVE else "ci")


# Signals that whoever started the tests ignores (nohup, a shell's background) end what they start all the same.
for name, default in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL), ("SIGTERM", signal.SIG_DFL)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), default)


def pytest_report_header() -> str:
    from tensorwire import kernels

    return f"tensorwire: {Path(tensorwire.__file__).parent} ({kernels.isa})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases: Counter[str] = Counter()
    for item in items:
        file = item.path.relative_to(HERE).as_posix()
        name = f"{file}::{getattr(item, 'originalname', item.name)}"
        kept = SLOW.get(name, SLOW.get(file, 1))  # one case in so many
        if kept == 0 or cases[name] % kept:
            item.add_marker("slow")
        cases[name] += 1


def pytest_collection_finish() -> None:
    """Nothing that is imported by now has to be looked at again and again."""
    # By the garbage collector: torch and what it imports are most of what it would go through.
    gc.collect()
    gc.freeze()
    # By pytest, which attaches itself before each test to each logger that tells the root nothing: torch has ninety.
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and logger.name.startswith("torch"):
            logger.propagate = True
