"""Puts the golden vectors and what reads them within reach, and sets how hard the property tests try."""

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.append(str(Path(__file__).parent / "golden"))

# CI: the same examples each time, no deadline on a shared machine. TENSORWIRE_EXHAUSTIVE=1 tries ten times as many.
EXHAUSTIVE = os.environ.get("TENSORWIRE_EXHAUSTIVE") == "1"
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=60, database=None,
                          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
settings.register_profile("exhaustive", settings.get_profile("ci"), max_examples=600, derandomize=False)
settings.load_profile("exhaustive" if EXHAUSTIVE else "ci")
