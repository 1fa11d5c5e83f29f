"""CRC-32C: the vectors of RFC 3720, chaining, and every length, in every implementation."""

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

# RFC 3720, appendix B.4, and the check value of the catalogue of CRCs.
VECTORS = {
    "zeros": (bytes(32), 0x8A9136AA),
    "ones": (b"\xff" * 32, 0x62A8AB43),
    "ascending": (bytes(range(32)), 0x46DD794E),
    "descending": (bytes(range(31, -1, -1)), 0x113FDB5C),
    "an iSCSI read": (
        bytes.fromhex(
            "01c00000 00000000 00000000 00000000 14000000 0000040000000014 00000018 28000000 00000000 02000000 00000000"
        ),
        0xD9963A56,
    ),
    "check": (b"123456789", 0xE3069283),
}

NOISE = np.random.default_rng(3720).integers(0, 256, (3 << 20) + 7 + 8, dtype=np.uint8)


def bit_by_bit(data: bytes, register: int = 0xFFFFFFFF) -> int:
    """The register, before its final inversion, by the definition: one message bit a step."""
    for octet in data:
        register ^= octet
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register


class TestCrc32c:
    @pytest.mark.parametrize("name", VECTORS)
    def test_vectors(self, kernels: ModuleType, name: str) -> None:
        data, expected = VECTORS[name]
        assert kernels.crc32c(data) == expected

    def test_empty_input_does_not_change_the_crc(self, kernels: ModuleType) -> None:
        assert kernels.crc32c(b"") == 0
        assert kernels.crc32c(b"", 0xE3069283) == 0xE3069283

    @pytest.mark.parametrize("start", [0, 1, 3])
    def test_every_length_from_any_address(self, kernels: ModuleType, start: int) -> None:
        register = 0xFFFFFFFF
        for n in range(1001):
            assert kernels.crc32c(NOISE[start : start + n]) == register ^ 0xFFFFFFFF, n
            register = bit_by_bit(NOISE[start + n : start + n + 1].tobytes(), register)

    @given(st.binary(max_size=300), st.data())
    def test_chaining(self, kernels: ModuleType, data: bytes, draw: st.DataObject) -> None:
        at = draw.draw(st.integers(0, len(data)))
        assert kernels.crc32c(data[at:], kernels.crc32c(data[:at])) == kernels.crc32c(data)

    @pytest.mark.parametrize("at", [1, 511, 4096, (1 << 20) - 1, (1 << 20) + 513, (2 << 20) + 64])
    def test_chaining_of_long_parts(self, kernels: ModuleType, at: int) -> None:
        whole = kernels.crc32c(NOISE)
        assert kernels.crc32c(NOISE[at:], kernels.crc32c(NOISE[:at])) == whole

    def test_any_contiguous_buffer(self, kernels: ModuleType) -> None:
        data = NOISE[: 2 * 3 * 4 * 50].tobytes()
        expected = kernels.crc32c(data)
        assert kernels.crc32c(bytearray(data)) == expected
        assert kernels.crc32c(memoryview(data)) == expected
        for dtype in (np.uint8, np.int8, np.uint16, np.float16, np.float32):
            array = np.frombuffer(data, dtype)  # read-only
            assert kernels.crc32c(array) == expected
            assert kernels.crc32c(array.reshape(2, 3, -1)) == expected

    def test_bad_arguments(self, kernels: ModuleType) -> None:
        for no_buffer in ("text", 5, None, [1, 2]):
            with pytest.raises(TypeError):
                kernels.crc32c(no_buffer)
        for with_gaps in (NOISE[:100:2], memoryview(NOISE)[:100:2]):
            with pytest.raises((ValueError, BufferError)):  # the exporter's own
                kernels.crc32c(with_gaps)
        for seed in (-1, 1 << 32):
            with pytest.raises((TypeError, ValueError)):
                kernels.crc32c(b"", seed)


@pytest.mark.parametrize("start", range(8))
def test_native_equals_the_twin_on_megabytes(native: ModuleType, start: int) -> None:
    from tensorwire.kernels import _numpy

    data = NOISE[start : start + (3 << 20) + 7]
    assert native.crc32c(data) == _numpy.crc32c(data)
    assert native.crc32c(data, 0x12345678) == _numpy.crc32c(data, 0x12345678)
