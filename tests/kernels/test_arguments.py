"""A wrong argument is an error, the same in every implementation, and nothing has been written."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest

N, BLOCKSIZE = 130, 64
BLOCKS = 3


STATS = {"4bit": "absmax", "int8": "absmax", "linear": "scales"}
CODES = {
    "4bit": (np.uint8, N // 2, np.float32),
    "int8": (np.uint8, N, np.float32),
    "linear": (np.int8, N, np.uint16),
}


def correct(name: str) -> dict[str, Any]:
    """Arguments that `name` takes; those to break are replaced by the tests."""
    options: dict[str, Any] = {"blocksize": BLOCKSIZE}
    if name == "cast":
        return {"values": np.zeros(N, np.float32), "out": np.zeros(N, np.float16), "crc": np.zeros(1, np.uint32)}
    if name == "blockwise_absmax":
        return {"values": np.zeros(N, np.float32), "absmax": np.zeros(BLOCKS, np.float32)} | options
    if name == "accumulate":
        return {"values": np.zeros(N, np.float32), "sums": np.zeros(N), "weight": 0.5}
    verb, method = name.split("_")
    code_dtype, code_count, stats_dtype = CODES[method]
    codes = {"codes": np.zeros(code_count, code_dtype), STATS[method]: np.zeros(BLOCKS, stats_dtype)}
    if method == "4bit":
        options["quant_type"] = "nf4"
    if verb == "quantize":
        return {"values": np.zeros(N, np.float32)} | codes | {"crc": np.zeros(1, np.uint32)} | options
    if verb == "accumulate":
        return codes | {"sums": np.zeros(N), "weight": 0.5, "dtype": "float32"} | options
    return codes | {"out": np.zeros(N, np.float32)} | options


def outputs(name: str) -> list[str]:
    if name == "cast":
        return ["out", "crc"]
    if name == "blockwise_absmax":
        return ["absmax"]
    if name == "accumulate":
        return ["sums"]
    verb, method = name.split("_")
    if verb == "accumulate":
        return ["sums"]
    return ["codes", STATS[method], "crc"] if verb == "quantize" else ["out"]


def array_names(name: str) -> list[str]:
    return [key for key, value in correct(name).items() if isinstance(value, np.ndarray)]


VERBS = ("quantize", "dequantize", "accumulate")
NAMES = ["cast", "accumulate", "blockwise_absmax"] + [f"{verb}_{method}" for method in CODES for verb in VERBS]
ARRAYS = [(name, key) for name in NAMES for key in array_names(name)]
ALWAYS = [(name, key) for name, key in ARRAYS if key != "crc"]
OUTPUTS = [(name, key) for name in NAMES for key in outputs(name)]
BLOCKED = NAMES[2:]


def call(kernels: ModuleType, name: str, **changes: Any) -> Any:
    arguments = correct(name) | changes
    positional = [arguments.pop(key) for key in array_names(name)]
    return getattr(kernels, name)(*positional, **arguments)


def refused(kernels: ModuleType, name: str, error: type[Exception], **changes: Any) -> str:
    """The message of the error; the outputs must be as they were."""
    given = {key: changes.get(key, value) for key, value in correct(name).items()}
    for key in outputs(name):
        if isinstance(given[key], np.ndarray) and given[key].flags.writeable:
            given[key].view(np.uint8)[...] = 0xA5
    before = {key: bytes(given[key]) for key in outputs(name) if isinstance(given[key], np.ndarray)}
    with pytest.raises(error) as caught:
        call(kernels, name, **given)
    assert type(caught.value) is error
    assert before == {key: bytes(given[key]) for key in before}
    return str(caught.value)


class TestArguments:
    @pytest.mark.parametrize("name", NAMES)
    def test_valid_arguments_pass(self, kernels: ModuleType, name: str) -> None:
        judges = name.endswith("_linear") or name.startswith(("quantize", "blockwise"))
        expected = 0 if name == "cast" else True if judges else None
        assert call(kernels, name) is expected

    @pytest.mark.parametrize(("name", "key"), ARRAYS)
    def test_size(self, kernels: ModuleType, name: str, key: str) -> None:
        right = correct(name)[key]
        sets_n = key in ("values", "sums") or (key == "out" and name != "cast")
        for change in (-BLOCKSIZE, BLOCKSIZE) if sets_n else (-right.size, -1, 1):
            wrong = np.zeros(right.size + change, right.dtype)
            message = refused(kernels, name, ValueError, **{key: wrong})
            if sets_n:  # then the others are wrong
                assert any(other in message for other in array_names(name))
            else:
                assert key in message and str(right.size) in message

    @pytest.mark.parametrize(("name", "key"), ARRAYS)
    def test_dtype(self, kernels: ModuleType, name: str, key: str) -> None:
        right = correct(name)[key]
        for dtype in (np.float64, np.int32, np.uint32, np.bool_, np.complex64, right.dtype.newbyteorder()):
            if np.dtype(dtype) != right.dtype:
                assert key in refused(kernels, name, TypeError, **{key: np.zeros(right.size, dtype)})

    @pytest.mark.parametrize(("name", "key"), ALWAYS)
    def test_not_an_array(self, kernels: ModuleType, name: str, key: str) -> None:
        for value in (None, 1, [0.0] * N):
            refused(kernels, name, TypeError, **{key: value})

    @pytest.mark.parametrize(("name", "key"), ARRAYS)
    def test_dimensions(self, kernels: ModuleType, name: str, key: str) -> None:
        right = correct(name)[key]
        for shape in ((1, right.size), (right.size, 1)):
            assert key in refused(kernels, name, TypeError, **{key: right.reshape(shape)})
        assert key in refused(kernels, name, TypeError, **{key: right[0].reshape(())})

    @pytest.mark.parametrize(("name", "key"), ALWAYS)
    def test_non_contiguous_arrays(self, kernels: ModuleType, name: str, key: str) -> None:
        right = correct(name)[key]
        for with_gaps in (np.zeros(2 * right.size, right.dtype)[::2], right[::-1]):
            with pytest.raises(ValueError, match=key):
                call(kernels, name, **{key: with_gaps})

    @pytest.mark.parametrize(("name", "key"), OUTPUTS)
    def test_read_only_output(self, kernels: ModuleType, name: str, key: str) -> None:
        array = correct(name)[key]
        array.setflags(write=False)
        assert key in refused(kernels, name, ValueError, **{key: array})

    @pytest.mark.parametrize("name", NAMES)
    def test_read_only_input(self, kernels: ModuleType, name: str) -> None:
        inputs = {key: correct(name)[key] for key in array_names(name) if key not in outputs(name)}
        for array in inputs.values():
            array.setflags(write=False)
        call(kernels, name, **inputs)

    @pytest.mark.parametrize(("name", "key"), OUTPUTS)
    def test_overlap(self, kernels: ModuleType, name: str, key: str) -> None:
        """By one byte, of an output with each other array, at either end."""
        output = correct(name)[key]
        for other in array_names(name):
            if other == key:
                continue
            size = correct(name)[other].nbytes
            memory = np.zeros(output.nbytes + size - 1, np.uint8)
            for at, other_at in ((0, output.nbytes - 1), (size - 1, 0)):
                pair = {
                    key: memory[at : at + output.nbytes].view(output.dtype),
                    other: memory[other_at : other_at + size].view(correct(name)[other].dtype),
                }
                message = refused(kernels, name, ValueError, **pair)
                assert key in message and other in message

    @pytest.mark.parametrize(("name", "key"), OUTPUTS)
    def test_neighbours_do_not_overlap(self, kernels: ModuleType, name: str, key: str) -> None:
        output = correct(name)[key]
        for other in array_names(name):
            if other != key:
                array = correct(name)[other]
                memory = np.zeros(output.nbytes + array.nbytes, np.uint8)
                pair = {
                    key: memory[: output.nbytes].view(output.dtype),
                    other: memory[output.nbytes :].view(array.dtype),
                }
                call(kernels, name, **pair)

    @pytest.mark.parametrize("name", BLOCKED)
    def test_blocksize(self, kernels: ModuleType, name: str) -> None:
        wrong = [0, -1, -64]
        if name.endswith("4bit"):
            wrong += [1, 3, 63, 4097, 4098, 1 << 20]
        for blocksize in wrong:
            assert "blocksize" in refused(kernels, name, ValueError, blocksize=blocksize)
        for blocksize in (64.0, "64", None):
            refused(kernels, name, TypeError, blocksize=blocksize)

    @pytest.mark.parametrize("name", [name for name, key in ARRAYS if key == "crc"])
    def test_the_checksum_is_optional(self, kernels: ModuleType, name: str) -> None:
        assert call(kernels, name, crc=None) == call(kernels, name)
        for value in (1, [0]):
            refused(kernels, name, TypeError, crc=value)

    @pytest.mark.parametrize("name", ["cast", *(name for name in NAMES if name.startswith("dequantize"))])
    def test_uncached(self, kernels: ModuleType, name: str) -> None:
        results = [call(kernels, name, uncached=uncached) for uncached in (None, False, True)]
        assert results.count(call(kernels, name)) == 3

    @pytest.mark.parametrize("name", ["quantize_4bit", "dequantize_4bit"])
    def test_quant_type(self, kernels: ModuleType, name: str) -> None:
        for quant_type in ("", "NF4", "int4", "nf4 "):
            assert "quant_type" in refused(kernels, name, ValueError, quant_type=quant_type)
        refused(kernels, name, TypeError, quant_type=None)

    @pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("accumulate_")])
    def test_dtype_of_values_that_are_never_made(self, kernels: ModuleType, name: str) -> None:
        for dtype in ("", "float64", "Float32"):
            assert "dtype" in refused(kernels, name, ValueError, dtype=dtype)

    @pytest.mark.parametrize("name", BLOCKED)
    def test_options_are_keywords(self, kernels: ModuleType, name: str) -> None:
        arguments = correct(name)
        with pytest.raises(TypeError):
            getattr(kernels, name)(*arguments.values())
        for key in arguments.keys() - array_names(name):
            with pytest.raises(TypeError):
                getattr(kernels, name)(**{k: v for k, v in arguments.items() if k != key})

    @pytest.mark.parametrize("name", NAMES)
    def test_arrays_have_names(self, kernels: ModuleType, name: str) -> None:
        getattr(kernels, name)(**correct(name))

    def test_cast_pairs(self, kernels: ModuleType) -> None:
        single, half, brain = (np.zeros(5, dtype) for dtype in (np.float32, np.float16, np.uint16))
        for values, out in ((single, single), (half, half), (brain, brain), (half, brain), (brain, half)):
            refused(kernels, "cast", TypeError, values=values, out=out.copy())
