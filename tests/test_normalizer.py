"""Gradients over the root of their mean square: a model of two lines, numbers of any size, what is refused."""

import numpy as np
import pytest

import tensorwire
from tensorwire.errors import NonFiniteError, SchemaError
from tensorwire.updates import Normalizer

SHAPES = {"matrix": (130, 150), "vector": (5,), "scalar": (), "empty": (0, 3)}


def gradients(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {name: np.array(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}


def test_it_divides_by_the_root_of_the_mean_square() -> None:
    normalizer, square = Normalizer(0.9), {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(6):
        given = gradients(step)
        before = {name: gradient.copy() for name, gradient in given.items()}
        made = normalizer.divide(given)
        for name, gradient in given.items():
            square[name] = 0.9 * square[name] + 0.1 * np.square(gradient.astype(np.float64))
            expected = gradient / (np.sqrt(square[name] / (1 - 0.9 ** (step + 1))) + 1e-8)
            assert made[name].shape == SHAPES[name] and made[name].dtype == np.float32
            assert np.allclose(made[name], expected, rtol=1e-5, atol=0)
            assert np.array_equal(gradient, before[name])


@pytest.mark.parametrize("size", [2.0**110, 1.0, 2.0**-20])
def test_the_scale_of_gradients_does_not_matter(size: float) -> None:
    normalizer, same = Normalizer(eps=1e-30), Normalizer(eps=1e-30)
    for step in range(5):
        new = gradients(step)["matrix"]
        made = normalizer.divide({"w": new * np.float32(size)})["w"]
        assert np.array_equal(made, same.divide({"w": new})["w"])
    assert np.abs(made).max() < 3


def test_zeros_stay_zeros_and_what_is_not_contiguous_has_its_place() -> None:
    assert not Normalizer().divide({"w": np.zeros(3, np.float32)})["w"].any()
    turned = gradients(0)["matrix"].T
    assert np.allclose(Normalizer().divide({"w": turned})["w"], np.sign(turned), rtol=1e-3)


def test_flushing_subnormals_in_torch_changes_nothing() -> None:
    torch = pytest.importorskip("torch")
    tiny = {"w": gradients(0)["matrix"] * np.float32(2.0**-130)}
    expected = Normalizer(eps=1e-45).divide(tiny)["w"]
    torch.set_flush_denormal(True)
    try:
        assert np.array_equal(Normalizer(eps=1e-45).divide(tiny)["w"], expected)
    finally:
        torch.set_flush_denormal(False)
    assert np.abs(expected).min() > 0


def test_a_restart_continues_with_the_same_state(tmp_path) -> None:
    through, restarted = Normalizer(), Normalizer()
    for step in range(2):
        through.divide(gradients(step))
        restarted.divide(gradients(step))
    tensorwire.save_file(restarted.state_dict(), tmp_path / "state.tw")
    restarted = Normalizer()
    restarted.load_state_dict(tensorwire.load_file(tmp_path / "state.tw"))
    for step in range(2, 4):
        ends = [normalizer.divide(gradients(step)) for normalizer in (through, restarted)]
        assert all(np.array_equal(ends[0][name], ends[1][name]) for name in SHAPES)


def test_invalid_gradients_are_refused_before_any_change() -> None:
    for options in ({"beta": 1.0}, {"beta": -0.1}, {"eps": 0.0}, {"eps": float("nan")}):
        with pytest.raises(ValueError, match="less than 1"):
            Normalizer(**options)
    normalizer, five = Normalizer(), np.ones(5, np.float32)
    normalizer.divide(gradients(0))
    before = normalizer.state_dict()["roots"]["vector"].copy()
    for other in ({"vector": five, "more": five}, {"vector": five[:4]}):
        with pytest.raises(SchemaError, match="no gradient of shape"):
            normalizer.divide(other)
    with pytest.raises(NonFiniteError, match="element 3 is nan"):
        normalizer.divide({"vector": np.where(np.arange(5) == 3, np.nan, five).astype(np.float32)})
    assert np.array_equal(normalizer.state_dict()["roots"]["vector"], before)
    with pytest.raises(SchemaError, match="a beta of 0.99, not of 0.5"):
        Normalizer(0.5).load_state_dict(normalizer.state_dict())
