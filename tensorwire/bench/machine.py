"""The machine and the versions a figure belongs to."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import tensorwire
from tensorwire import kernels

_PACKAGES: Final = ("numpy", "torch", "bitsandbytes", "safetensors", "zstandard")


def describe() -> str:
    """Two lines: processor, cores, memory, system; versions and the kernels in use."""
    memory = total_memory()
    hardware = [_processor(), f"{os.cpu_count()} cores", f"{memory / 2**30:.0f} GiB" if memory else ""]
    system = f"{platform.system()} {platform.machine()}"
    kernel = f"tensorwire {tensorwire.__version__} ({kernels.implementation} kernels, {kernels.isa})"
    versions = [kernel, f"Python {platform.python_version()}", *filter(None, map(_version, _PACKAGES))]
    return f"{', '.join(filter(None, [*hardware, system]))}\n{', '.join(versions)}"


def total_memory() -> int | None:
    """Bytes of memory, None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, None where the system does not say."""
    return _field("/proc/meminfo", "MemAvailable")


def _field(path: str, name: str) -> int | None:
    try:
        with open(path) as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith(name + ":"))
    except (OSError, StopIteration):
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""
