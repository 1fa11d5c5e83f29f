"""How far this process's resident memory rises above where it stood.

On Linux the kernel's high-water mark (VmHWM) is reset first, so that nothing before counts; elsewhere the
mark of `getrusage` cannot be reset, and only what rises above all that was before is seen.
"""

import ctypes
import gc
import sys


class Rise:
    """Measures from its making on: `peak()` is the most bytes above the level at that moment."""

    def __init__(self) -> None:
        gc.collect()
        _trim()
        self._marked = _reset_mark()
        self._before = _status("VmRSS") if self._marked else _maxrss()

    def peak(self) -> int:
        """Bytes."""
        return max(0, (_status("VmHWM") if self._marked else _maxrss()) - self._before)


def highest() -> int:
    """The most resident memory that this process has had, in bytes."""
    return _status("VmHWM") if sys.platform.startswith("linux") else _maxrss()


def _trim() -> None:
    """Give freed memory back to the system, which would otherwise serve the measured work for nothing."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _reset_mark() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # proc(5): reset the peak resident set size to the current one
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field + ":"))


def _maxrss() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
