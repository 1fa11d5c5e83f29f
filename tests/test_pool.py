"""Memory that is used again: whose it is, how much is kept, and that nobody sees it twice."""

import gc
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorwire
from tensorwire.errors import WireError
from tensorwire.memory import spare as spare_memory
from tensorwire.memory.spare import SpareMemory

MIB = 1 << 20
X = np.random.default_rng(5).standard_normal(2 * MIB // 4, dtype=np.float32)

pytestmark = pytest.mark.skipif(
    not hasattr(mmap, "MADV_FREE"), reason="memory is spared where the system can take it back"
)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


@pytest.fixture
def spare() -> SpareMemory:
    return SpareMemory(8 * MIB)


@pytest.fixture
def shared() -> Iterator[None]:
    """The memory that streams share, empty before and as it was after."""
    before = tensorwire.get_spare_memory()
    tensorwire.set_spare_memory(0)
    tensorwire.set_spare_memory(64 * MIB)
    yield
    tensorwire.set_spare_memory(before)


class TestSpareMemory:
    def test_a_dropped_array_is_reused_for_the_same_size(self, spare: SpareMemory) -> None:
        first = spare.empty(MIB)
        at = address(first)
        assert spare.take(MIB) is None
        del first
        assert spare.take(MIB - 1) is None and spare.take(2 * MIB) is None
        assert address(spare.empty(MIB)) == at

    def test_views_keep_memory_in_use(self, spare: SpareMemory) -> None:
        array = spare.empty(MIB)
        array[:] = 7
        view = array.view(np.float32)[5:9].reshape(2, 2)
        seen = memoryview(array)[:3]
        at = address(array)
        del array
        assert spare.take(MIB) is None
        other = spare.empty(MIB)
        assert address(other) != at
        other[:] = 9
        assert bytes(view.view(np.uint8)) == b"\7" * 16 and bytes(seen) == b"\7\7\7"
        del view
        assert spare.take(MIB) is None
        seen.release()
        assert spare.take(MIB) is not None

    def test_no_more_than_the_limit_is_kept_and_the_oldest_goes_first(self, spare: SpareMemory) -> None:
        sizes = [2 * MIB, 3 * MIB, 4 * MIB]
        arrays = {size: spare.empty(size) for size in sizes}
        for size in sizes:
            del arrays[size]
        assert spare.take(2 * MIB) is None
        assert spare.take(3 * MIB) is not None

    def test_arrays_above_the_limit_are_not_kept(self, spare: SpareMemory) -> None:
        spare.empty(8 * MIB + 1)
        assert spare.take(8 * MIB + 1) is None

    def test_a_lower_limit_applies_at_once(self, spare: SpareMemory) -> None:
        lent = spare.empty(3 * MIB)
        spare.empty(2 * MIB)
        spare.limit = MIB
        assert spare.take(2 * MIB) is None
        del lent
        assert spare.take(3 * MIB) is None

    def test_small_arrays_are_left_to_the_c_library(self, spare: SpareMemory) -> None:
        spare.empty(4096)
        assert spare.take(4096) is None

    def test_nobody_waits_for_the_lock(self, spare: SpareMemory) -> None:
        """A finalizer may run in the thread that holds it, and a child of a fork may inherit it taken."""
        array = spare.empty(MIB)
        with spare._lock:
            del array
            assert spare.take(MIB) is None
            assert spare.empty(MIB).size == MIB
            spare.limit = 0
        assert spare.take(MIB) is None

    def test_allocation_failures_raise_memory_error(self, spare: SpareMemory) -> None:
        spare.limit = 1 << 62
        with pytest.raises(MemoryError, match="bytes"):
            spare.empty(1 << 50)

    @pytest.mark.parametrize("size", [3 * MIB, 9 * MIB])
    def test_spare_memory_is_released_when_memory_runs_out(
        self, spare: SpareMemory, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Below and above what it keeps; under a limit on the address space, of which spare memory is a part."""
        spare.empty(2 * MIB)
        make = spare._new
        failures = [MemoryError("none left")]

        def new(size: int) -> np.ndarray:
            if failures:
                raise failures.pop()
            return make(size)

        monkeypatch.setattr(spare, "_new", new)
        assert spare.empty(size).size == size
        assert spare.take(2 * MIB) is None
        failures += [MemoryError("none left"), MemoryError("none left")]
        with pytest.raises(MemoryError):
            spare.empty(5 * MIB)

    def test_threads(self, spare: SpareMemory) -> None:
        """Each array belongs to one of them at a time."""
        wrong = []

        def work(number: int) -> None:
            for turn in range(300):
                array = spare.empty(MIB)
                array[:: MIB // 16] = number
                if turn % 3 == 0:
                    gc.collect(0)
                if (array[:: MIB // 16] != number).any():
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


@pytest.mark.usefixtures("shared")
class TestDecode:
    @pytest.mark.parametrize("codec", ["raw", "bf16", "nf4", "raw|zstd"])
    def test_a_round_gets_the_memory_of_the_last(self, codec: str) -> None:
        message = tensorwire.dumps({"x": X}, codec=codec)
        expected = tensorwire.loads(message)["x"].copy()
        at = set()
        for _ in range(4):
            model = tensorwire.loads(message)
            assert np.array_equal(model["x"], expected)
            at.add(address(model["x"]))
            model["x"][:] = np.nan
            del model
        assert len(at) == 1

    def test_torch_tensors_too(self) -> None:
        torch = pytest.importorskip("torch")
        message = tensorwire.dumps({"x": X})
        kept = tensorwire.torch.loads(message)["x"][3:5]
        other = tensorwire.torch.loads(message)["x"]
        other.fill_(torch.nan)
        assert kept.tolist() == X[3:5].tolist()
        at = other.data_ptr()
        del other
        assert tensorwire.torch.loads(message)["x"].data_ptr() == at

    @pytest.mark.parametrize("codec", ["raw", "bf16", "nf4"])
    @pytest.mark.parametrize("expect", [False, True])
    def test_a_broken_stream_gives_its_memory_back_at_once(self, codec: str, expect: bool) -> None:
        message = tensorwire.dumps({"x": X, "y": X}, codec=codec)
        options = {"expect": {"x": X, "y": X}} if expect else {}
        gc.disable()
        try:
            with pytest.raises(WireError):
                tensorwire.loads(message[:-100], **options)
            del options
            assert spare_memory.SPARE.take(X.nbytes) is not None
        finally:
            gc.enable()

    def test_a_limit_of_zero_keeps_nothing(self) -> None:
        tensorwire.set_spare_memory(0)
        tensorwire.loads(tensorwire.dumps({"x": X}))
        assert spare_memory.SPARE.take(X.nbytes) is None

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.sampled_from([70_000, 200_000, 300_001, 600_000]), min_size=1, max_size=6))
    def test_models_of_any_sizes_one_after_the_other(self, sizes: list[int]) -> None:
        kept = []
        for round_, size in enumerate(sizes):
            model = {str(i): np.full(size, round_ * 10 + i, np.float32) for i in range(3)}
            got = tensorwire.loads(tensorwire.dumps(model, codec="raw"))
            kept.append((round_, got["1"]))
        for round_, array in kept:
            assert (array == round_ * 10 + 1).all()


def test_the_limit_can_be_read_and_must_be_a_size() -> None:
    for wrong in (-1, 1.5, "1", True, None):
        with pytest.raises(ValueError, match="bytes"):
            tensorwire.set_spare_memory(wrong)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert run("print(tensorwire.get_spare_memory())").stdout.strip() == str(min(memory // 16, 1 << 30))


def test_the_environment_sets_it() -> None:
    assert spare_memory._initial_limit("0") == 0 and spare_memory._initial_limit("4096") == 4096
    for wrong in ("1 GiB", "-1", "1.5"):
        with pytest.raises(ImportError, match="TENSORWIRE_SPARE_MEMORY"):
            spare_memory._initial_limit(wrong)
    assert run("print(tensorwire.get_spare_memory())", "123").stdout.strip() == "123"
    assert "TENSORWIRE_SPARE_MEMORY" in run("", "1 GiB").stderr


def test_payloads_of_many_sizes_keep_memory_of_one(tmp_path: Path) -> None:
    """Compressed slices all differ by a few bytes."""
    values = np.random.default_rng(1).standard_normal(4 * MIB, dtype=np.float32)
    tensorwire.numpy.save_file({"x": values}, tmp_path / "x.tw", codec="bf16|entropy")
    kept = []
    try:
        tensorwire.set_spare_memory(0)
        tensorwire.set_spare_memory(64 * MIB)
        with tensorwire.open_file(tmp_path / "x.tw") as file:
            view = file.view("x")
            for start in range(0, view.numel, MIB // 2):
                view.read(start, start + MIB // 2)
                kept.append(spare_memory.SPARE._size)
    finally:
        tensorwire.set_spare_memory(spare_memory._initial_limit(""))
    assert kept[-1] == kept[1]


def test_a_forked_child_and_the_end_of_the_program_are_quiet() -> None:
    code = """
import os
import numpy as np
message = tensorwire.dumps({"x": np.zeros(1 << 20, np.float32)})
last = tensorwire.loads(message)
del last
child = os.fork()
last = [tensorwire.loads(message) for _ in range(3)]
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
    done = run(code)
    assert done.returncode == 0 and not done.stderr


def run(code: str, limit: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", "import tensorwire\n" + code],
        capture_output=True,
        text=True,
        env={**os.environ, "TENSORWIRE_SPARE_MEMORY": limit},
        cwd=Path(tensorwire.__file__).parent.parent,
    )
