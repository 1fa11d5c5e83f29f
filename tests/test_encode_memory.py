"""Encoding takes the memory of the payload and 64 KiB, however large the tensor."""

import subprocess
import sys
from pathlib import Path

import pytest

import tensorwire
from tensorwire import kernels

PACKAGE = Path(tensorwire.__file__).parent
SPECS = ["fp16", "bf16", "int8", "int8-linear", "nf4", "fp4", "nf4:double_quant=true"]
SLACK = 64 << 10
SIZE = 64 << 20

# Resident memory counts pages: a process of its own, where all that encodes has run once before.
ENCODE = """
import sys
import numpy as np
from tensorwire import codec, dtypes
from tensorwire.bench.rss import Rise
from tensorwire.tensor import Extent, TensorView

it = codec(sys.argv[1])
values = np.resize(np.random.default_rng(0).standard_normal(100_003, dtype=np.float32), int(sys.argv[2]) // 4)
view = TensorView(dtypes.FLOAT32, values.shape, lambda start, stop: values[start:stop])
payload = np.empty(it.sizes(values.size, dtypes.FLOAT32).total, np.uint8)
context = it.prepare(view)
block = it.block(dtypes.FLOAT32)
it.encode(values[:block], Extent(dtypes.FLOAT32, values.shape, 0, block), lambda size: payload[:size], context)
rise = Rise()
it.encode(values, Extent.whole(dtypes.FLOAT32, values.shape), lambda size: payload[:size], context)
print(rise.peak() - payload.nbytes)
"""


def extra_bytes(spec: str) -> int:
    command = [sys.executable, "-c", ENCODE, spec, str(SIZE)]
    return int(subprocess.run(command, capture_output=True, check=True, cwd=PACKAGE.parent).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can reset the high-water mark")
@pytest.mark.skipif(kernels.implementation == "numpy", reason="the NumPy twins take temporaries")
@pytest.mark.parametrize("spec", SPECS)
def test_an_encode_takes_its_payload_and_64_kib(spec: str) -> None:
    assert extra_bytes(spec) <= SLACK
