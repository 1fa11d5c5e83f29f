"""Quantization states that no quantizer made: absmax, scales, offsets, codes and lengths changed, decoded by every
codec
that takes them and handed to bitsandbytes. Each is decoded, to what the definition in NumPy decodes it to, or refused
with a WireError; memory is touched nowhere else, which AddressSanitizer looks at where CI runs this under it.

TENSORWIRE_STATES=10000 tries that many states per codec, instead of 200.
"""

import importlib
import os
import random
import struct
from collections.abc import Iterator

import numpy as np
import pytest
import reference
from bad import carried
from frames import assemble

import tensorwire.numpy as tw
from tensorwire import dtypes, kernels
from tensorwire.codecs import as_floats, from_stages
from tensorwire.errors import EncodeError, WireError
from tensorwire.tensor import Extent

STATES = int(os.environ.get("TENSORWIRE_STATES", "200"))
CODECS = {
    "int8": (4, 16), "int8-wide": (4, 4096), "int8-linear": (5, 16), "int8-linear-wide": (5, 256), "nf4": (6, 32, 0), "nf4-wide": (6, 4096, 0),
    "fp4": (7, 64, 0), "nf4-double": (6, 32, 1), "fp4-double": (7, 64, 1),
}  # fmt: skip
NUMBERS = {"float32": 18, "float16": 16, "bfloat16": 17}
# Bits of float32 that matter to a scale: zeros, subnormals, around 1, the largest, infinities, NaN, negatives.
SCALES = [0, 1, 0x007FFFFF, 0x00800000, 0x3F800000, 0x3F7FFFFF, 0x477FE000, 0x477FF000, 0x7F000000, 0x7F7FFFFF,
0x7F800000,
          0x7F800001, 0x7FC00000, 0x80000000, 0x80000001, 0xBF800000, 0xFF800000, 0xFFFFFFFF]  # fmt: skip


def states(stage: tuple, spread: random.Random) -> Iterator[tuple[int, str, bytes]]:
    """(elements, dtype, payload): states with sensible numbers, of which a few are changed, in every length of tail."""
    codec = from_stages((stage,))
    while True:
        dtype = spread.choice([*NUMBERS])
        count = spread.choice(
            [
                1,
                2,
                3,
                stage[1] - 1,
                stage[1],
                stage[1] + 1,
                spread.randrange(1, 40),
                spread.randrange(1, 9000),
            ]
        )
        sizes = codec.sizes(count, dtypes.BY_NAME[dtype])
        payload = bytearray(spread.randbytes(sizes.total))
        width = 2 if stage[0] == 5 else 4
        blocks = codec.packer.blocks(count)
        scales = (1 + -(-blocks // 256) if stage[-1] == 1 and stage[0] > 5 else blocks) * width
        for at in range(0, scales, width):  # sound ones first
            bits = spread.randrange(0x20000000, 0x50000000) >> (16 if width == 2 else 0)
            payload[at : at + width] = bits.to_bytes(width, "little")
        if stage[0] == 5:
            payload[sizes.metadata :] = bytes(payload[sizes.metadata :]).replace(b"\x80", b"\x7f")
        elif stage[0] > 5 and count % 2:
            payload[-1] &= 0xF0
        for _ in range(spread.choice((0, 0, 1, 1, 2))):
            at = spread.randrange(0, scales, width)
            bits = spread.choice(SCALES) if spread.random() < 0.7 else spread.randrange(1 << 32)
            payload[at : at + width] = (bits >> (16 if width == 2 else 0)).to_bytes(width, "little")
        kind = spread.random()
        if kind < 0.1:
            payload[spread.randrange(len(payload))] ^= 1 << spread.randrange(8)
        elif kind < 0.15:
            payload[-1] |= 0x0F
        elif kind < 0.2:
            del payload[spread.randrange(len(payload)) :]
        elif kind < 0.25:
            payload += spread.randbytes(spread.choice((1, 2, 4, 64)))
        yield count, dtype, bytes(payload)


def wanted(stage: tuple, count: int, dtype: str, payload: bytes) -> bytes | None:
    """What the reference reader decodes a state to; None where it refuses."""
    codec = [[*stage]]
    width = reference.DTYPES[NUMBERS[dtype]][1]
    if reference.payload_length(codec, dtype, width, count) != len(payload):
        return None
    try:
        return reference.decode_payload(codec, dtype, width, count, payload)
    except reference.Refused:
        return None


@pytest.mark.parametrize("name", CODECS)
def test_any_state_is_decoded_as_defined_or_refused(name):
    stage, spread = CODECS[name], random.Random(name)
    made = states(stage, spread)
    codec = from_stages((stage,))
    decoded = 0
    for number in range(STATES):
        count, dtype, payload = next(made)
        described = dtypes.BY_NAME[dtype]
        # An allocation of its own for each, exactly as long as it must be.
        out = np.empty(count * described.itemsize, np.uint8)
        received = np.frombuffer(bytearray(payload), np.uint8) if payload else np.empty(0, np.uint8)
        try:
            extent = Extent.whole(described, (count,))
            codec.check_length(len(payload), extent)
            codec.decode(memoryview(received), extent, out)
        except WireError:
            got = None
        else:
            got = out.tobytes()
            decoded += 1
            assert np.isfinite(as_floats(out, described)).all()
        if number % 4 == 0 or count < 300:  # the reference is slow
            assert got == wanted(stage, count, dtype, payload), (number, count, dtype)
        if number % 10 == 0 and payload:  # and as a whole stream, also behind zstd
            stream = assemble(carried(payload, count, [list(stage)], NUMBERS[dtype]))
            try:
                tensor = tw.loads(stream)["a"]
            except WireError:
                assert got is None
            else:
                assert tensor.tobytes() == got
    assert STATES // 3 < decoded < STATES


@pytest.mark.parametrize("name", CODECS)
def test_any_state_reaches_bitsandbytes_whole_or_not_at_all(name):
    pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    handover = importlib.import_module("tensorwire.integrations.bitsandbytes")
    stage, spread = CODECS[name], random.Random(name)
    made = states(stage, spread)
    for _ in range(STATES):
        count, dtype, payload = next(made)
        if not payload:
            continue
        stream = assemble(carried(payload, count, [list(stage)], NUMBERS[dtype]))
        try:
            (got,) = dict(handover.decode(stream)).values()
        except WireError:
            continue
        if name.startswith("int8-linear"):  # bitsandbytes has no such type: it arrives decoded
            assert got.numel() == count
            continue
        # What was handed over goes back as it came: nothing of it was lost or read from elsewhere.
        assert got.state.shape is None or tuple(got.state.shape) == (count,)
        back = b"".join(bytes(buffer) for buffer in handover.encode({"a": got}))
        assert dict(handover.decode(back))["a"].data.equal(got.data)
        if stage[0] == 4 and dtype != "float32":
            continue
        there, here = tw.loads(stream)["a"], tw.loads(back)["a"]
        assert there.tobytes() == here.tobytes()


def test_any_state_of_bitsandbytes_is_sent_or_refused():
    """The other way: states in memory that were tampered with, sent."""
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes").functional
    handover = importlib.import_module("tensorwire.integrations.bitsandbytes")
    spread = random.Random(0)
    weights = torch.linspace(-1, 1, 1000)
    sent = 0
    for _ in range(STATES):
        nested, quant_type = spread.random() < 0.5, spread.choice(("nf4", "fp4"))
        if spread.random() < 0.3:
            codes, state = functional.quantize_blockwise(weights, nested=False)
        else:
            codes, state = functional.quantize_4bit(weights, quant_type=quant_type, compress_statistics=nested)
        what = spread.choice(
            (
                "codes",
                "absmax",
                "code",
                "blocksize",
                "shape",
                "quant_type",
                "dtype",
                "offset",
                "nested",
                "nothing",
            )
        )
        if what == "codes":
            codes = spread.choice([codes[:-1], codes.repeat(2, 1), codes.float(), codes[:0], codes.reshape(-1)[::2]])
        elif what == "absmax":
            state.absmax = spread.choice(
                [
                    state.absmax[:-1],
                    state.absmax[:0],
                    state.absmax.double(),
                    -state.absmax,
                    state.absmax * float("nan"),
                ]
            )
        elif what == "code":
            state.code = spread.choice([state.code[:-1], state.code.flip(0), state.code * float("nan"), state.code[:0]])
        elif what == "blocksize":
            state.blocksize = spread.choice([0, 1, 7, 63, 96, 128, 1 << 31, -64])
        elif what == "shape":
            state.shape = torch.Size(spread.choice([(999,), (1001,), (0,), (1 << 40,), (1000, 2), ()]))
        elif what == "quant_type":
            state.quant_type = spread.choice(["int8", "", "nf5", None])
        elif what == "dtype":
            state.dtype = spread.choice([torch.int64, torch.float64, torch.complex64, torch.bfloat16])
        elif what == "offset" and state.nested:
            state.offset = torch.tensor(spread.choice([float("nan"), -1.0, float("inf"), 1e38]))
        elif what == "nested" and state.nested:
            state.state2.absmax = spread.choice(
                [state.state2.absmax[:0], state.state2.absmax.repeat(2), -state.state2.absmax]
            )
        try:
            stream = b"".join(bytes(buffer) for buffer in handover.encode({"w": handover.Quantized(codes, state)}))
        except EncodeError:
            continue
        sent += 1
        dict(handover.decode(stream))  # a writer refuses what a reader would refuse
    assert STATES // 20 < sent < STATES


def test_any_kernel_arguments_are_accepted_or_refused():
    """The extension checks what it is given, whoever gives it: sizes, types, overlaps, blocks."""
    spread = random.Random(1)
    types = [np.float32, np.float16, np.uint16, np.uint8, np.int8, np.float64, np.int32]
    memory = np.zeros(4096, np.uint8)

    def array() -> np.ndarray:
        dtype = np.dtype(spread.choice(types))
        count = spread.choice([0, 1, 2, 3, 15, 16, 17, 64, 65, 130, 200])
        kind = spread.random()
        if kind < 0.1:
            begin = spread.randrange(64) * 8  # overlaps others
            return memory[begin : begin + count * dtype.itemsize].view(dtype)
        made = np.zeros(count * (2 if kind < 0.2 else 1), dtype)[:: 2 if kind < 0.2 else 1]
        if kind < 0.25:
            made.flags.writeable = False
        return made.reshape(1, -1) if kind > 0.98 else made

    taken = 0
    for _ in range(STATES * 30):
        name = spread.choice(["cast", "blockwise_absmax", "quantize_4bit", "dequantize_4bit", "quantize_int8", "dequantize_int8",
                              "quantize_linear", "dequantize_linear"])  # fmt: skip
        options: dict = (
            {} if name == "cast" else {"blocksize": spread.choice([0, 1, 2, 3, 16, 64, 65, 4096, 1 << 31, 1 << 62, -1])}
        )
        if name.endswith("4bit"):
            options["quant_type"] = spread.choice(["nf4", "fp4", "int8"])
        arguments = [array() for _ in range(2 if name in ("cast", "blockwise_absmax") else 3)]
        if spread.random() < 0.7:  # sizes that fit, more often than chance has it
            n, blocksize = arguments[0].size, max(1, options.get("blocksize", 1))
            blocks = -(-n // blocksize)
            codes, stats = (np.int8, np.uint16) if "linear" in name else (np.uint8, np.float32)
            half = (n + 1) // 2 if name.endswith("4bit") else n
            floats = np.zeros(n, spread.choice(types[:3]))
            statistic = np.zeros(blocks, stats)
            arguments = [floats, np.zeros(half, codes), statistic]
            if name.startswith("deq"):
                arguments = [np.zeros(half, codes), statistic, floats]
            elif name == "cast":
                arguments = [floats, np.zeros(n, np.float16)]
            elif name == "blockwise_absmax":
                arguments = [floats, statistic]
            if spread.random() < 0.3:
                which = spread.randrange(len(arguments))
                arguments[which] = array()
        try:
            getattr(kernels, name)(*arguments, **options)
        except (TypeError, ValueError):
            continue
        taken += 1
    assert taken > STATES


def test_a_state_of_another_length_never_reaches_a_kernel():
    stage = (6, 64, 0)
    payload = struct.pack("<4f", 1, 1, 1, 1) + bytes(100)
    for length in range(len(payload)):
        with pytest.raises(WireError):
            tw.loads(assemble(carried(payload[:length] or b"\0", 200, [list(stage)])))
