"""A file that a buffer holds, and tensors in files as views."""

import io

import numpy as np
import pytest

import tensorwire
from tensorwire.errors import ArgumentError, ClosedError, CorruptError, EncodeError, TruncatedError, WireError
from tensorwire.streams import encode
from tensorwire.tensor import ViewFront
from tensorwire.updates import ErrorFeedback, Terms, added, subtract
from tensorwire.updates import encode as encode_update


def held(value, codec="raw"):
    """The bytes of a file."""
    file = io.BytesIO()
    tensorwire.save_file(value, file, codec=codec)
    return file.getvalue()


@pytest.fixture
def model():
    draw = np.random.default_rng(5)
    large = draw.standard_normal((700, 500)).astype(np.float32)
    small = {f"s{i}": draw.standard_normal(5).astype(np.float32) for i in range(40)}
    return {"large": large, **small, "tied": large, "count": np.int64(41), "none": np.empty((0, 3), np.float16)}


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_buffer_opens_like_the_file_it_holds(model, kind, tmp_path):
    data = held(model)
    path = tmp_path / "model.tw"
    path.write_bytes(data)
    with tensorwire.open_file(kind(data)) as file, tensorwire.open_file(path) as on_disk:
        assert list(file) == list(on_disk) == list(model)
        for name in model:
            assert np.array_equal(file[name], on_disk[name])
        assert np.array_equal(file.get_slice("large")[3:5], model["large"][3:5])


def test_a_raw_tensor_is_mapped_without_a_copy_of_the_buffer(model):
    data = held(model)
    with tensorwire.open_file(data) as file:
        mapped = file.map("large")
        assert np.array_equal(mapped, model["large"])
        assert not mapped.flags.writeable
        assert np.shares_memory(mapped, np.frombuffer(data, np.uint8))
    assert np.array_equal(mapped, model["large"])


def test_writable_tensors_are_copies(model):
    torch = pytest.importorskip("torch")
    data = held(model)
    with tensorwire.torch.open_file(data) as file:
        file.map("large").zero_()
        assert torch.equal(file["large"], torch.from_numpy(model["large"]))


def test_errors_of_a_buffer(model):
    data = held(model)
    with pytest.raises(TruncatedError):
        tensorwire.open_file(b"")
    with pytest.raises(WireError):
        tensorwire.open_file(data[:-1])
    with pytest.raises(ArgumentError):
        tensorwire.open_file(7)
    file = tensorwire.open_file(data)
    file.close()
    with pytest.raises(ClosedError):
        file["large"]


@pytest.mark.parametrize("codec", ["raw", "bf16", "nf4", "raw|zstd"])
def test_a_view_reads_any_part(model, codec):
    with tensorwire.open_file(held(model, codec)) as file:
        for name in model:
            whole = np.asarray(file[name])
            view = file.view(name)
            assert (view.dtype.name, view.shape) == (str(whole.dtype), whole.shape)
            flat = whole.reshape(-1)
            for start, stop in {(0, view.numel), (view.numel // 3, view.numel // 2), (0, 0)}:
                part = np.frombuffer(view.read(start, stop), whole.dtype) if stop > start else flat[:0]
                assert np.array_equal(part, flat[start:stop])
        assert file.view("large").identity == file.view("tied").identity != file.view("s0").identity


def test_views_of_a_path_and_of_a_file_object_are_the_same(model, tmp_path):
    path = tmp_path / "model.tw"
    path.write_bytes(held(model))
    for source in (path, io.BytesIO(held(model))):
        with tensorwire.open_file(source) as file:
            assert np.array_equal(
                np.frombuffer(file.view("large").read(10, 90), np.float32), model["large"].flat[10:90]
            )


def test_views_are_sent_on(model):
    with tensorwire.open_file(held(model, "bf16")) as file:
        data = b"".join(encode({name: file.view(name) for name in file}, ViewFront()))
        back = tensorwire.loads(data)
        assert back["large"] is back["tied"]
        assert all(np.array_equal(back[name], file[name]) for name in file)


@pytest.mark.parametrize("codec", ["raw", "nf4"])
def test_a_view_of_a_damaged_item_is_refused(model, codec):
    data = bytearray(held({"large": model["large"]}, codec))
    data[len(data) // 2] ^= 1
    with tensorwire.open_file(data) as file, pytest.raises(CorruptError, match="large"):
        file.view("large").read(0, model["large"].size)


def test_a_value_cannot_be_viewed():
    with tensorwire.open_file(held({"a": 1})) as file:
        with pytest.raises(EncodeError, match="read a value"):
            file.view("a")
        with pytest.raises(KeyError):
            file.view("b")


def test_a_raw_view_is_verified_once(model):
    """Parts of a large raw tensor do not each cost a reading of it."""
    data = bytearray(held(model))
    with tensorwire.open_file(data) as file:
        view = file.view("large")
        view.read(0, 1)
        data[data.index(model["large"].tobytes()) + 4 * 9] ^= 1
        view.read(8, 10)  # is not looked at again


def test_added_inverts_subtract(model):
    new = {name: np.asarray(tensor) * np.asarray(2, np.asarray(tensor).dtype) for name, tensor in model.items()}
    back = added(subtract(new, model), model)
    for name, view in back.items():
        assert np.array_equal(np.frombuffer(view.read(0, view.numel), view.dtype.name), np.ravel(new[name]))


def test_a_change_takes_the_dtype_of_its_base():
    base, change = {"w": np.full(3, 1.0, np.float32)}, {"w": np.full(3, 0.5, np.float16)}
    view = added(change, base)["w"]
    assert view.dtype.name == "float32"
    assert np.frombuffer(view.read(0, 3), np.float32).tolist() == [1.5] * 3


@pytest.mark.parametrize(
    "base", [{}, {"w": np.zeros(4, np.float32)}, {"w": np.zeros(3, np.complex64)}, {"w": np.zeros(3, np.int32)}]
)
def test_a_change_needs_a_matching_base(base):
    with pytest.raises(EncodeError, match="w"):
        added({"w": np.zeros(3, np.float32)}, base)


def test_feedback_continues_from_a_given_residual():
    change = subtract({"w": np.linspace(0, 1, 64, dtype=np.float32)}, {"w": np.zeros(64, np.float32)})
    one, kept = ErrorFeedback(), {}
    for _ in range(3):
        sent = one.add(change)
        message = b"".join(encode_update(sent, Terms("run", 0), codec="nf4"))
        one.settle(sent, message)
        other = ErrorFeedback(residual=tensorwire.loads(tensorwire.dumps(kept)))
        again = other.add(change)
        assert b"".join(encode_update(again, Terms("run", 0), codec="nf4")) == message
        other.settle(again, message)
        kept = other.residual
    assert np.array_equal(kept["w"], one.residual["w"])
