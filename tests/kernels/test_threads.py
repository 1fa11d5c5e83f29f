"""A call shared by threads gives the bits of a call alone: over odd lengths, from several callers at once, and after
a fork.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import tensorwire

N = (1 << 20) + 12_345  # more than what the pool thinks worth sharing, and no multiple of anything
VALUES = np.random.default_rng(0).standard_normal(N).astype(np.float32)


@pytest.fixture(autouse=True)
def two_threads(native: ModuleType) -> Iterator[None]:
    before = native.get_threads()
    native.set_threads(2)
    yield
    native.set_threads(before)


def everything(native: ModuleType, values: np.ndarray = VALUES) -> list[bytes]:
    """What each kernel makes of the values and gives back of that."""
    n = values.size
    made = []
    half, crc = np.empty(n, np.float16), np.zeros(1, np.uint32)
    made.append((native.cast(values, half, crc), half.tobytes(), int(crc[0])))
    back = np.empty(n, np.float32)
    native.cast(half, back)
    for blocksize in (64, 4096, 1 << 17):
        absmax = np.empty(-(-n // blocksize), np.float32)
        made.append((native.blockwise_absmax(values, absmax, blocksize=blocksize), absmax.tobytes()))
        codes = np.empty(n, np.uint8)
        finite = native.quantize_int8(values, codes, absmax, crc, blocksize=blocksize)
        native.dequantize_int8(codes, absmax, back, blocksize=blocksize)
        made.append((finite, codes.tobytes(), back.tobytes(), int(crc[0])))
    packed, absmax = np.empty((n + 1) // 2, np.uint8), np.empty(-(-n // 64), np.float32)
    finite = native.quantize_4bit(values, packed, absmax, crc, blocksize=64, quant_type="nf4")
    native.dequantize_4bit(packed, absmax, back, blocksize=64, quant_type="nf4")
    made.append((finite, packed.tobytes(), back.tobytes(), int(crc[0])))
    linear, scales = np.empty(n, np.int8), np.empty(-(-n // 64), np.uint16)
    finite = native.quantize_linear(values, linear, scales, crc, blocksize=64)
    native.dequantize_linear(linear, scales, back, blocksize=64)
    made.append((finite, linear.tobytes(), back.tobytes(), int(crc[0])))
    return made


@pytest.fixture(scope="module")
def alone(native: ModuleType) -> list[bytes]:
    before = native.get_threads()
    native.set_threads(1)
    try:
        return everything(native)
    finally:
        native.set_threads(before)


def test_two_threads_give_the_bits_of_one(native: ModuleType, alone: list[bytes]) -> None:
    for _ in range(3):
        assert everything(native) == alone
    assert native.get_threads() == 2
    native.set_threads(10_000)  # no more than there are processors
    assert everything(native) == alone


def test_several_callers_share_one_pool(native: ModuleType, alone: list[bytes]) -> None:
    results: list[list[bytes]] = []
    callers = [threading.Thread(target=lambda: results.append(everything(native))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(result == alone for result in results)
    assert len(results) == 4


def test_nonfinite_values_are_found_in_any_thread(native: ModuleType) -> None:
    absmax = np.empty(-(-N // 64), np.float32)
    for at in (0, N // 2, N - 1):
        values = VALUES.copy()
        values[at] = np.inf
        assert not native.blockwise_absmax(values, absmax, blocksize=64)


FORK = """
import os, sys
import numpy as np
from tensorwire.kernels import _native as native
native.set_threads(2)
values, absmax = np.ones(1 << 20, np.float32), np.zeros(1 << 14, np.float32)
native.blockwise_absmax(values, absmax, blocksize=64)
child = os.fork()
absmax[:] = 0
native.blockwise_absmax(values, absmax, blocksize=64)
good = absmax.min() == 1
sys.exit(not good if child == 0 else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not good)
"""


def python(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    home = str(Path(tensorwire.__file__).parents[1])  # the package under test, installed or not
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd=home, timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
# A thread that AddressSanitizer is still setting up may hold its locks at the fork, for ever as the child sees it.
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer's locks do not survive a fork")
def test_a_forked_child_has_a_pool_of_its_own(native: ModuleType) -> None:
    run = python(FORK)
    assert run.returncode == 0, run.stderr


def test_one_block_or_one_processor_uses_one_thread(native: ModuleType, alone: list[bytes]) -> None:
    absmax = np.empty(1, np.float32)
    assert native.blockwise_absmax(VALUES, absmax, blocksize=1 << 21)
    assert absmax[0] == np.abs(VALUES).max()
    if hasattr(os, "sched_setaffinity"):
        mine = os.sched_getaffinity(0)
        os.sched_setaffinity(0, [min(mine)])
        try:
            assert everything(native) == alone
        finally:
            os.sched_setaffinity(0, mine)


def test_an_unknown_instruction_set_is_refused_and_changes_nothing(native: ModuleType) -> None:
    before = native.isa()
    with pytest.raises(ValueError, match="supported"):
        native.use("avx9")
    assert native.isa() == before


def test_empty_environment_variables_are_ignored(native: ModuleType) -> None:
    run = python("import tensorwire; print(tensorwire.get_threads())", TENSORWIRE_ISA="", TENSORWIRE_THREADS="")
    assert run.stdout.strip() == "1", run.stderr


@pytest.mark.parametrize("blocksize", [64, 1000, 4096])
def test_outputs_too_large_for_the_caches_have_the_bits_of_small_ones(native: ModuleType, blocksize: int) -> None:
    """16 MiB and more are stored past the caches, where blocks are whole vectors; each part by itself is not."""
    n, part = (17 << 20) + 3000, blocksize * 96
    values = np.resize(VALUES, n)
    codes, absmax, linear, scales = (np.empty(size, dtype) for size, dtype in (
        (n, np.uint8), (-(-n // blocksize), np.float32), (n, np.int8), (-(-n // blocksize), np.uint16)))  # fmt: skip
    out, small = np.empty(n, np.float32), np.empty(part, np.float32)
    assert native.quantize_int8(values, codes, absmax, blocksize=blocksize)
    assert native.quantize_linear(values, linear, scales, blocksize=blocksize)
    for decode, q, s in ((native.dequantize_int8, codes, absmax), (native.dequantize_linear, linear, scales)):
        decode(q, s, out, blocksize=blocksize)
        for begin in (0, part * 3):
            decode(q[begin : begin + part], s[begin // blocksize :][:96], small, blocksize=blocksize)
            assert np.array_equal(out[begin : begin + part], small)
    packed = np.empty((2 * n + 1) // 2, np.uint8)
    wide, absmax = np.resize(VALUES, 2 * n), np.empty(-(-2 * n // blocksize), np.float32)
    assert native.quantize_4bit(wide, packed, absmax, blocksize=blocksize, quant_type="nf4")
    back = np.empty(2 * n, np.float16)
    native.dequantize_4bit(packed, absmax, back, blocksize=blocksize, quant_type="nf4")
    half = np.empty(part, np.float16)
    native.dequantize_4bit(packed[: part // 2], absmax[:96], half, blocksize=blocksize, quant_type="nf4")
    assert np.array_equal(back[:part].view(np.uint16), half.view(np.uint16))


def test_any_buffer_of_the_right_format_is_accepted(native: ModuleType) -> None:
    memory = memoryview(bytearray(64 * 4))
    absmax = np.empty(1, np.float32)
    assert native.blockwise_absmax(memory.cast("@f"), absmax, blocksize=64)
    for wrong in (memory.cast("@i"), np.zeros(64, ">f4"), np.zeros(64, "f4,f4")):
        with pytest.raises(TypeError, match="format"):
            native.blockwise_absmax(wrong, absmax, blocksize=64)


@pytest.mark.parametrize("count", ["0", "x", "5000", "-1", "1.5"])
def test_an_invalid_thread_count_in_the_environment_raises(native: ModuleType, count: str) -> None:
    run = python("import tensorwire", TENSORWIRE_THREADS=count)
    assert "TENSORWIRE_THREADS: expected 1 to 4096" in run.stderr
    assert run.returncode != 0


def test_values_changed_during_quantization_still_give_valid_codes(native: ModuleType) -> None:
    """Another thread trains on: the scale is that of the small values, and the codes those of the large ones."""
    values, done = np.full(1 << 16, -1.0, np.float32), threading.Event()

    def train() -> None:
        while not done.is_set():
            for value in (-1e4, -1.0, np.nan, -1.0):
                values.fill(value)

    codes, scales = np.empty(values.size, np.int8), np.empty(values.size // 64, np.uint16)
    thread = threading.Thread(target=train)
    thread.start()
    try:
        lowest = []
        for _ in range(300):
            native.quantize_linear(values, codes, scales, blocksize=64)
            lowest.append(codes.min())
    finally:
        done.set()
        thread.join()
    assert min(lowest) >= -127
