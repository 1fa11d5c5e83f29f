"""What this package relies on in Flower."""

import ctypes
import os
from typing import Final

import flwr
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from tensorwire import updates
from tensorwire.errors import UnsupportedError
from tensorwire.integrations.flower.arrays import NPY, NUMPY, STYPE, WireArray

_LIBC: Final = ctypes.CDLL(None) if os.name == "posix" else None


def changed_seam(seam: str) -> UnsupportedError:
    """The error that names what a version of Flower has changed."""
    version = getattr(flwr, "__version__", "of an unknown version")
    return UnsupportedError(
        f"flwr {version} does not work with tensorwire.integrations.flower, which relies on this: {seam}"
    )


def check_seams() -> None:
    """Raise UnsupportedError if this version of Flower has changed anything that this package relies on."""
    known = {"set_run", "run", "create_message", "get_node_ids", "push_messages", "pull_messages", "send_and_receive"}
    sample = Array(np.zeros(2, np.float32))
    seams = {
        f"a Grid has no abstract methods but {', '.join(sorted(known))}": Grid.__abstractmethods__ <= known,
        "Array(ndarray) holds the bytes of a .npy file": sample.stype == NUMPY and sample.data[:6] == NPY,
        "Array takes any text as stype": Array("", (), STYPE, b"1").stype == STYPE,
        "an Array is known by the name of its class": Array.__qualname__ == WireArray.__qualname__,
        "an ArrayRecord keeps the arrays that it is given": _keeps(WireArray(updates.views({"": np.zeros(2)})[""])),
        "FedAvg has _check_and_log_replies, train_metrics_aggr_fn and weighted_by_key": (
            hasattr(FedAvg, "_check_and_log_replies")
            and {"train_metrics_aggr_fn", "weighted_by_key"} <= vars(FedAvg()).keys()
        ),
    }
    for seam, holds in seams.items():
        if not holds:
            raise changed_seam(seam)


def _keeps(array: Array) -> bool:
    record = ArrayRecord()
    record["a"] = array
    return record["a"] is array


def trim() -> None:
    """Give freed memory back to the system, where the C library can: it keeps the 5 MB chunks that a message was."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)
