"""`tensorwire bench`: size, speed, memory, error, lossless, patches and updates, beside what a user would else pick.

Each suite is a module with a `run(options, note)` that yields rows (plain dicts, the same that `--json`
writes), and a `title(rows)` and `COLUMNS` for their table. Rivals that are not installed are left out with a
note. docs/bench.md says what each suite measures and how.
"""

import importlib
from types import ModuleType
from typing import Final

from tensorwire.bench.options import MODES, BenchError, Note, Options
from tensorwire.bench.rss import Rise, highest
from tensorwire.bench.tables import Row

__all__ = ["BY_DEFAULT", "MODES", "SUITES", "BenchError", "Note", "Options", "Rise", "Row", "highest", "suite"]

SUITES: Final = ("size", "speed", "memory", "error", "lossless", "patch", "updates")
# Those that take seconds; the others run when they are named.
BY_DEFAULT: Final = ("size", "speed", "memory", "error")


def suite(name: str) -> ModuleType:
    """The module of one of `SUITES`."""
    return importlib.import_module(f"tensorwire.bench.{name}")
