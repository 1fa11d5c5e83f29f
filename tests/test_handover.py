"""Hand-over to and from bitsandbytes: codes and absmax change hands bit for bit, nothing is dequantized."""

from copy import deepcopy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")
functional = bnb.functional

import tensorwire.torch as tw
from tensorwire.errors import EncodeError, SchemaError
from tensorwire.integrations import bitsandbytes as handover
from tensorwire.integrations.bitsandbytes import Quantized


def weights(*shape: int) -> "torch.Tensor":
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 0.02


def flat_decode(value: Quantized) -> "torch.Tensor":
    """bitsandbytes' own decode, over one row, where its AVX-512 path is right for every shape.

    On the device where there is one: bitsandbytes then has no native code for the CPU, and rounds float16 twice there.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data, state = value.data.to(device), deepcopy(value.state)
    state.to(device)
    if state.quant_type is None:
        return functional.dequantize_blockwise(data, state).reshape(-1).cpu()
    state.shape = torch.Size([state.shape.numel()])
    return functional.dequantize_4bit(data, state).reshape(-1).cpu()


@pytest.mark.parametrize("spec", ["nf4", "fp4", "nf4:blocksize=128", "nf4:double_quant=true", "fp4|zstd", "int8"])
@pytest.mark.parametrize("shape", [(64,), (129, 65), (40, 1000)])
def test_bitsandbytes_decodes_what_tensorwire_encoded(spec: str, shape: tuple[int, ...]) -> None:
    data = tw.dumps({"w": weights(*shape), "n": torch.arange(3)}, codec=spec)
    received = dict(handover.decode(data))
    assert isinstance(received["w"], Quantized)
    assert torch.equal(received["n"], torch.arange(3))
    assert torch.equal(flat_decode(received["w"]), tw.loads(data)["w"].reshape(-1))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (1,), (333,), (257, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_4bit_state_survives_the_wire(quant_type: str, nested: bool, shape: tuple, dtype: "torch.dtype") -> None:
    codes, state = functional.quantize_4bit(
        weights(*shape).to(dtype), compress_statistics=nested, quant_type=quant_type
    )
    sent = Quantized(codes, state)
    data = b"".join(handover.encode({"w": sent}, frame_size=1 << 14))
    got = dict(handover.decode(data))["w"]
    expected = codes.clone().reshape(-1)
    if state.shape.numel() % 2:
        expected[-1] &= 0xF0
    assert torch.equal(got.data.reshape(-1), expected)
    assert torch.equal(got.state.absmax, state.absmax)
    assert got.state.shape == state.shape and got.state.dtype == dtype and got.state.nested == nested
    assert torch.equal(flat_decode(got), flat_decode(sent))
    assert torch.equal(tw.loads(data)["w"].reshape(-1), flat_decode(sent))


def test_an_8bit_state_survives_the_wire() -> None:
    codes, state = functional.quantize_blockwise(weights(70, 100))
    data = b"".join(handover.encode({"w": Quantized(codes, state)}))
    got = dict(handover.decode(data))["w"]
    assert torch.equal(got.data, codes) and torch.equal(got.state.absmax, state.absmax)
    assert torch.equal(tw.loads(data)["w"], functional.dequantize_blockwise(codes, state))


def test_quantized_parameters_travel_beside_ordinary_ones() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(128, 32, quant_type="nf4", compress_statistics=True)
    layer.load_state_dict({"weight": weights(32, 128), "bias": weights(32)})
    layer = layer.to("cpu")
    if layer.weight.quant_state is None:
        layer.weight = layer.weight._quantize("cpu")
    parameters = dict(layer.named_parameters())
    received = dict(handover.decode(handover.encode(parameters, codec="bf16")))
    assert torch.equal(received["weight"].data, layer.weight.data)
    assert torch.equal(received["bias"], layer.bias.detach().bfloat16().float())


def test_foreign_quantization_states_are_refused() -> None:
    codes, state = functional.quantize_4bit(weights(64, 64), quant_type="nf4")
    state.code = state.code.flip(0)
    with pytest.raises(EncodeError, match="code table.*item 'w'"):
        list(handover.encode({"w": Quantized(codes, state)}))
    codes, state = functional.quantize_4bit(weights(64, 64), quant_type="nf4")
    state.absmax = state.absmax.bfloat16()
    with pytest.raises(EncodeError, match="absmax is torch.bfloat16"):
        list(handover.encode({"w": Quantized(codes, state)}))
    codes, state = functional.quantize_4bit(weights(64, 64), quant_type="nf4")
    with pytest.raises(EncodeError, match="do not match"):
        list(handover.encode({"w": Quantized(codes[:-1], state)}))


def test_plain_values_are_refused() -> None:
    with pytest.raises(SchemaError, match="only tensors"):
        list(handover.decode(tw.dumps({"step": 3})))


def test_double_quantization_equals_bitsandbytes_given_its_offset() -> None:
    """Nested absmax decode is bitsandbytes' arithmetic: code * absmax, then + offset, two roundings."""
    data = tw.dumps({"w": weights(512, 512)}, codec="nf4:double_quant=true")
    state = dict(handover.decode(data))["w"].state
    theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    absmax = weights(512, 512).reshape(-1, 64).abs().amax(1)
    assert np.isclose(float(state.offset), float(absmax.mean()), rtol=1e-6)
    assert float((theirs - absmax).abs().max() / absmax.max()) < 0.01


@pytest.mark.parametrize("mode", ["meta", "cpu", "float64", "inference"])
@pytest.mark.parametrize("nested", [False, True])
def test_torch_global_modes_do_not_change_the_result(mode: str, nested: bool) -> None:
    codes, state = functional.quantize_4bit(weights(64, 64), compress_statistics=nested, quant_type="nf4")
    linear, linear_state = functional.quantize_blockwise(weights(5000), blocksize=256)
    sent = {"w": Quantized(codes, state), "i": Quantized(linear, linear_state), "e": torch.empty(0, 3)}
    stream = b"".join(handover.encode(sent))
    wanted = {name: value for name, value in handover.decode(stream) if isinstance(value, Quantized)}
    if mode == "float64":
        torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode() if mode == "inference" else torch.device("meta" if mode == "meta" else "cpu"):
            assert b"".join(handover.encode(sent)) == stream
            got = dict(handover.decode(stream))
    finally:
        torch.set_default_dtype(torch.float32)
    assert got["e"].device.type == "cpu"
    for name, value in wanted.items():
        theirs = got[name]
        for ours in (theirs.data, *(x for x in vars(theirs.state).values() if isinstance(x, torch.Tensor))):
            assert ours.device.type == "cpu" and not ours.is_inference()
        assert torch.equal(flat_decode(theirs), flat_decode(value))


def test_a_quantized_state_dict_is_exact_under_any_codec() -> None:
    layer = bnb.nn.Linear4bit(64, 32, bias=True, quant_type="nf4", compress_statistics=True)
    layer.load_state_dict(torch.nn.Linear(64, 32).state_dict())
    state = {**layer.to("cpu").state_dict(), "other.weight": weights(64, 64)}
    assert any(name.endswith("absmax") for name in state)
    for codec in ("nf4", "int8", "bf16"):
        got = tw.loads(tw.dumps(state, codec=codec))
        for name, tensor in state.items():
            assert torch.equal(got[name], tensor) == (name != "other.weight"), name


def test_a_quantized_parameter_is_sent_whole_or_not_at_all() -> None:
    layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
    with pytest.raises(EncodeError, match="integrations.bitsandbytes"):
        list(tw.decode(tw.encode(layer.named_parameters())))
    got = dict(handover.decode(b"".join(map(bytes, handover.encode(layer.named_parameters())))))["weight"]
    assert torch.equal(got.state.absmax, layer.weight.quant_state.absmax)
    int8 = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False).weight
    for front in (tw, handover):
        with pytest.raises(EncodeError, match="state_dict.*'w'"):
            list(front.encode({"w": int8}))


def test_codes_and_scales_that_were_freed_are_never_read() -> None:
    for part in ("codes", "absmax"):
        codes, state = functional.quantize_4bit(weights(64, 64), quant_type="nf4")
        (codes if part == "codes" else state.absmax).untyped_storage().resize_(0)
        with pytest.raises(EncodeError, match="storage holds.*'w'"):
            list(handover.encode({"w": Quantized(codes, state)}))
    codes, state = functional.quantize_4bit(weights(64, 64), quant_type="nf4")
    list(handover.encode({"w": Quantized(codes, state)}))
    codes.untyped_storage().resize_(0)  # sending did not forbid it
