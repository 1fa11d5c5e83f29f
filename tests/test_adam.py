"""Adam's direction: that of torch, from numbers of any size, and the same bits whatever torch was told."""

import numpy as np
import pytest

import tensorwire
from tensorwire.errors import NonFiniteError, SchemaError
from tensorwire.updates import Adam

SHAPES = {"matrix": (130, 150), "vector": (5,), "scalar": (), "empty": (0, 3)}


def gradients(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def test_it_goes_where_that_of_torch_goes() -> None:
    torch = pytest.importorskip("torch")
    adam, parameter = Adam((0.8, 0.95)), torch.nn.Parameter(torch.zeros(130, 150))
    theirs, ours = torch.optim.Adam([parameter], lr=0.5, betas=(0.8, 0.95)), np.zeros((130, 150))
    for step in range(20):
        new = gradients(step)
        parameter.grad = torch.from_numpy(new["matrix"])
        theirs.step()
        made = adam.directions(new)
        assert {name: (made[name].shape, made[name].dtype) for name in made} == {
            name: (shape, np.float32) for name, shape in SHAPES.items()
        }
        ours -= 0.5 * made["matrix"]
    assert np.allclose(ours, parameter.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2.0**110, 1.0, 2.0**-20])
def test_how_large_numbers_are_does_not_matter(size: float) -> None:
    adam, same = Adam(eps=1e-30), Adam(eps=1e-30)
    for step in range(5):
        new = gradients(step)["matrix"]
        made = adam.directions({"w": new * np.float32(size)})["w"]
        assert np.array_equal(made, same.directions({"w": new})["w"])
    assert np.abs(made).max() < 3


def test_zeros_stay_where_they_are() -> None:
    assert not Adam().directions({"w": np.zeros(3, np.float32)})["w"].any()


def test_it_does_not_depend_on_what_torch_was_told_of_subnormal_numbers() -> None:
    torch = pytest.importorskip("torch")
    tiny = {"w": gradients(0)["matrix"] * np.float32(2.0**-130)}
    expected = Adam(eps=1e-45).directions(tiny)["w"]
    torch.set_flush_denormal(True)
    try:
        assert np.array_equal(Adam(eps=1e-45).directions(tiny)["w"], expected)
    finally:
        torch.set_flush_denormal(False)
    assert np.abs(expected).min() > 0


def test_a_restart_goes_on_as_if_nothing_had_been(tmp_path) -> None:
    through, restarted = Adam(), Adam()
    for step in range(2):
        through.directions(gradients(step))
        restarted.directions(gradients(step))
    tensorwire.save_file(restarted.state_dict(), tmp_path / "state.tw")
    restarted = Adam()
    restarted.load_state_dict(tensorwire.load_file(tmp_path / "state.tw"))
    for step in range(2, 4):
        ends = [adam.directions(gradients(step)) for adam in (through, restarted)]
        assert all(np.array_equal(ends[0][name], ends[1][name]) for name in SHAPES)


def test_what_is_none_of_its_own_is_refused() -> None:
    for options in ({"betas": (1.0, 0.5)}, {"betas": (0.5, -0.1)}, {"eps": 0.0}, {"eps": float("nan")}):
        with pytest.raises(ValueError, match="less than 1"):
            Adam(**options)
    adam = Adam()
    adam.directions(gradients(0))
    before = adam.state_dict()["means"]["vector"].copy()
    for other in (
        {"vector": np.ones(5, np.float32), "more": np.ones(2, np.float32)},
        {"vector": np.ones(4, np.float32)},
    ):
        with pytest.raises(SchemaError, match="no gradient of shape"):
            adam.directions(other)
    with pytest.raises(NonFiniteError, match="vector.*element 3 is nan|element 3 is nan"):
        adam.directions({"matrix": gradients(1)["matrix"], "vector": np.array([0, 1, 2, np.nan, np.inf], np.float32)})
    assert np.array_equal(adam.state_dict()["means"]["vector"], before)
    with pytest.raises(SchemaError, match="other betas|betas of"):
        Adam((0.5, 0.5)).load_state_dict(adam.state_dict())
