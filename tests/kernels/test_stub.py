"""The types of the extension: its stub, checked in, is the one that nanobind makes of it."""

import ast
from pathlib import Path

import pytest

from tensorwire import kernels

STUB = Path(kernels.__file__).with_name("_native.pyi")


def declarations(text: str) -> dict[str, str]:
    """What a stub says of each function, method and class, however it is laid out."""
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    return {node.name: f"{ast.get_docstring(node)}" for node in classes} | {
        node.name: f"{ast.unparse(node.args)} -> {ast.unparse(node.returns or ast.Constant(None))}: "
        f"{ast.get_docstring(node)}"
        for node in functions
    }


def test_the_stub_matches_the_extension() -> None:
    """To make it anew: python -m nanobind.stubgen -m tensorwire.kernels._native, then ruff format."""
    stubgen = pytest.importorskip("nanobind.stubgen")
    native = pytest.importorskip("tensorwire.kernels._native")
    generator = stubgen.StubGen(native)
    generator.put(native)
    made = declarations(generator.get().replace("-> list:", "-> list[str]:"))  # nanobind has no element type
    assert made == declarations(STUB.read_text())


@pytest.mark.parametrize("name", kernels.__all__)
def test_every_kernel_is_in_the_stub(name: str) -> None:
    assert name in {*declarations(STUB.read_text()), "implementation"}
