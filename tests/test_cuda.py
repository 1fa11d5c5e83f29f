"""Tensors on a CUDA device: encoded and decoded there, the same stream as from the host but for stated differences.

The kernels' device door is also run on CPU tensors, through bitsandbytes' CPU code, where no GPU is at hand.
"""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

import tensorwire.torch as tw
from tensorwire import kernels
from tensorwire.errors import NonFiniteError
from tensorwire.kernels import cuda
from tensorwire.updates import Compressor

SPECS = ["fp16", "bf16", "int8", "int8-linear", "nf4", "fp4", "nf4:double_quant=true", "nf4|zstd", "raw", "raw|zstd"]
# Codes of this share of the elements may be the neighbouring ones: bitsandbytes' devices round their reciprocals.
TOLERATED = 1e-3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # beside its CUDA library, bitsandbytes rounds twice on the CPU
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def weights(count: int) -> "torch.Tensor":
    values = torch.randn(count, generator=torch.Generator().manual_seed(11)) * 0.02
    values[4096 : 4096 + 8192] = 0
    return values


@gpu
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("count", [1, 63, 3_000_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_device_tensor_gives_the_stream_of_the_host_tensor(spec: str, count: int, dtype: "torch.dtype") -> None:
    host = weights(count).to(dtype)
    expected = tw.loads(tw.dumps({"w": host}, codec=spec))["w"].float()
    data = tw.dumps({"w": host.cuda()}, codec=spec)
    assert len(data) == len(tw.dumps({"w": host}, codec=spec)) or "zstd" in spec
    got = tw.loads(data)["w"].float()
    assert (got != expected).float().mean() <= TOLERATED
    assert (got - host.float()).norm() <= 1.001 * (expected - host.float()).norm() + 1e-30


@gpu
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_decoding_into_a_device_tensor_equals_decoding_on_the_host(spec: str, dtype: "torch.dtype") -> None:
    host = (weights(3_000_001) * (1000 if dtype == torch.int64 else 1)).to(dtype).reshape(1, -1)
    data = tw.dumps({"w": host}, codec=spec)
    target = {"w": torch.empty_like(host, device="cuda")}
    assert tw.loads(data, into=target)["w"] is target["w"]
    assert torch.equal(target["w"].cpu(), tw.loads(data)["w"])


@gpu
@pytest.mark.parametrize("spec", ["int8", "int8-linear", "nf4", "fp4"])
def test_nonfinite_values_on_the_device_are_refused(spec: str) -> None:
    values = weights(100_000)
    values[77_777] = torch.nan
    with pytest.raises(NonFiniteError, match="element 77777.*item 'w'"):
        tw.dumps({"w": values.cuda()}, codec=spec)


@pytest.mark.parametrize("count", [1, 63, 64, 100_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_device_door_obeys_the_contract_of_the_kernels(count: int, dtype: "torch.dtype") -> None:
    values = weights(count).to(dtype)
    ours = values.view(torch.uint16).numpy() if dtype == torch.bfloat16 else values.numpy()
    scales = [np.empty(-(-count // 256), np.uint16) for _ in range(2)]
    codes = [np.empty(count, np.int8) for _ in range(2)]
    assert cuda.quantize_linear(values, codes[0], scales[0], blocksize=256)
    assert kernels.quantize_linear(ours, codes[1], scales[1], blocksize=256)
    assert np.array_equal(codes[0], codes[1]) and np.array_equal(scales[0], scales[1])
    back, expected = torch.empty_like(values, device=DEVICE), torch.empty_like(values)
    cuda.dequantize_linear(codes[0], scales[0], back, blocksize=256)
    theirs = expected.view(torch.uint16).numpy() if dtype == torch.bfloat16 else expected.numpy()
    kernels.dequantize_linear(codes[1], scales[1], theirs, blocksize=256)
    assert torch.equal(back.cpu(), expected)
    for quant_type in ("nf4", "fp4"):
        packed = [np.empty((count + 1) // 2, np.uint8) for _ in range(2)]
        absmax = [np.empty(-(-count // 64), np.float32) for _ in range(2)]
        assert cuda.quantize_4bit(values, packed[0], absmax[0], blocksize=64, quant_type=quant_type)
        assert kernels.quantize_4bit(ours, packed[1], absmax[1], blocksize=64, quant_type=quant_type)
        assert np.array_equal(absmax[0][:-1], absmax[1][:-1])
        if quant_type == "nf4":  # bitsandbytes' CPU code agrees on whole blocks
            assert np.array_equal(packed[0][: count // 64 * 32], packed[1][: count // 64 * 32])
        cuda.dequantize_4bit(packed[1], absmax[1], back, blocksize=64, quant_type=quant_type)
        kernels.dequantize_4bit(packed[1], absmax[1], theirs, blocksize=64, quant_type=quant_type)
        assert torch.equal(back.cpu(), expected)
    absmax8 = np.empty(-(-count // 4096), np.float32)
    codes8 = np.empty(count, np.uint8)
    assert cuda.quantize_int8(values, codes8, absmax8, blocksize=4096)
    assert (codes8[4096:8192] == 127).all()
    cuda.dequantize_int8(codes8, absmax8, back, blocksize=4096)
    kernels.dequantize_int8(codes8, absmax8, theirs, blocksize=4096)
    assert torch.equal(back.cpu(), expected)


@pytest.mark.parametrize("kind", [np.float16, np.uint16])
def test_device_casts_equal_the_kernels(kind: type) -> None:
    values = torch.cat([weights(10_000), torch.tensor([1e5, -1e5, 3.4e38, torch.inf, -0.0, 1e-41])])
    for saturate in (False, True):
        ours, theirs = np.empty(len(values), kind), np.empty(len(values), kind)
        overflowed = kernels.cast(values.numpy(), ours, saturate=saturate)
        assert cuda.cast(values, theirs, saturate=saturate) == overflowed > 0
        assert np.array_equal(ours.view(np.uint16), theirs.view(np.uint16))
    back = torch.empty_like(values)
    cuda.cast(ours, back)
    wide = np.empty(len(values), np.float32)
    kernels.cast(ours, wide)
    assert np.array_equal(back.numpy(), wide)


def test_nonfinite_values_are_seen_on_the_device() -> None:
    values = weights(5000)
    values[1] = torch.inf
    assert not cuda.quantize_4bit(
        values, np.empty(2500, np.uint8), np.empty(79, np.float32), blocksize=64, quant_type="nf4"
    )
    assert not cuda.quantize_int8(values, np.empty(5000, np.uint8), np.empty(2, np.float32), blocksize=4096)
    assert not cuda.quantize_linear(values, np.empty(5000, np.int8), np.empty(20, np.uint16), blocksize=256)
    assert not cuda.blockwise_absmax(values, np.empty(2, np.float32), blocksize=4096)


def on_device(state: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    return {name: tensor.cuda() for name, tensor in state.items()}


def mixed() -> "dict[str, torch.Tensor]":
    """Of each kind one: what is quantized, rounded, and sent as it is."""
    generator = torch.Generator().manual_seed(5)
    return {
        "w": torch.randn(1500, 1024, generator=generator) * 0.02,
        "half": torch.randn(300, 512, generator=generator).bfloat16(),
        "b": torch.randn(1024, generator=generator),
        "steps": torch.arange(7),
        "zero": torch.tensor(3),
    }


@gpu
@pytest.mark.parametrize("spec", ["planes", "nf4|entropy", "sparse:k=64", "lowrank:rank=4"])
def test_every_other_codec_gives_the_stream_of_the_host_and_fills_device_tensors(spec: str) -> None:
    state = mixed()
    data = tw.dumps(on_device(state), codec=spec)
    assert data == tw.dumps(state, codec=spec)
    target = {name: torch.empty_like(tensor, device="cuda") for name, tensor in state.items()}
    tw.loads(data, into=target)
    assert all(torch.equal(target[name].cpu(), tensor) for name, tensor in tw.loads(data).items())


@gpu
def test_versions_on_a_device_are_those_of_the_host() -> None:
    old, new = mixed(), mixed()
    new["w"][::7] += 1e-4
    assert tw.digest(on_device(old)) == tw.digest(old)
    patch = tw.dumps(on_device(new), base=on_device(old))
    assert patch == tw.dumps(new, base=old)
    state = on_device(old)
    tw.apply(patch, state)
    assert all(tensor.is_cuda and torch.equal(tensor.cpu(), new[name]) for name, tensor in state.items())


@gpu
@pytest.mark.parametrize("spec", ["demo:k=32", "topk:k=64,values=2bit", "lowrank:rank=4,bits=2"])
def test_compressors_of_device_tensors_send_what_those_of_the_host_send(spec: str) -> None:
    gradients = {name: mixed()[name] for name in ("w", "b")}
    ours, theirs = Compressor(spec), Compressor(spec)
    for _ in range(3):
        assert ours.compress(on_device(gradients)).data == theirs.compress(gradients).data


@gpu
def test_training_with_compressors_over_nccl(tmp_path: Path) -> None:
    distributed = pytest.importorskip("torch.distributed")
    from tensorwire.integrations.torch_distributed import DDPState, DeMo, ddp_hook

    store = f"file://{tmp_path}/store"
    distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64).cuda()
        demo = DeMo(model.named_parameters(), lr=1e-3, spec="demo:k=8")
        wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64).cuda())
        wrapped.register_comm_hook(DDPState(wrapped, "topk:k=64"), ddp_hook)
        adam = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
        for module, optimizer in ((model, demo), (wrapped, adam)):
            data = torch.randn(64, 64, device="cuda")
            losses = []
            for _ in range(30):
                optimizer.zero_grad()
                loss = (module(data) - data).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            assert losses[-1] < losses[0]
    finally:
        distributed.destroy_process_group()
