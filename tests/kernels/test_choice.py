"""Which implementation serves: the best the machine has, the one asked for, or the twin, loudly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tensorwire
from tensorwire import kernels

HOME = Path(tensorwire.__file__).parents[1]


def run(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=HOME,
        env={**os.environ, **environment},
        timeout=60,
    )


def test_a_missing_extension_warns() -> None:
    hide = "import sys; sys.modules['tensorwire.kernels._native'] = None; "
    done = run(hide + "from tensorwire import kernels; print(kernels.isa, kernels.implementation)", TENSORWIRE_ISA="")
    assert done.stdout.split() == ["numpy", "numpy"]
    assert "RuntimeWarning" in done.stderr and "extension is missing" in done.stderr


def test_the_twin_can_be_chosen_without_a_warning() -> None:
    done = run("from tensorwire import kernels; print(kernels.isa)", TENSORWIRE_ISA="numpy")
    assert done.stdout.split() == ["numpy"] and done.stderr == ""


@pytest.mark.skipif(kernels.implementation == "numpy", reason="the extension does not serve here")
def test_an_instruction_set_can_be_chosen_and_an_unknown_one_is_refused() -> None:
    for isa in kernels._module.supported():
        done = run("from tensorwire import kernels; print(kernels.isa)", TENSORWIRE_ISA=isa)
        assert done.stdout.split() == [isa]
    refused = run("import tensorwire", TENSORWIRE_ISA="avx9").stderr
    assert f"set it to one of {', '.join(kernels._module.supported())}, numpy, or leave it unset" in refused


@pytest.mark.skipif(kernels.implementation == "numpy", reason="the extension does not serve here")
@pytest.mark.parametrize("name", ["TENSORWIRE_ISA", "TENSORWIRE_THREADS", "TENSORWIRE_SPARE_MEMORY"])
def test_a_wrong_variable_is_one_line_to_a_command_and_an_import_error_to_a_program(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tensorwire", "--help"],
        capture_output=True,
        text=True,
        cwd=HOME,
        env={**os.environ, name: "wrong"},
        timeout=60,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and name in done.stderr
    said = run("import tensorwire", **{name: "wrong"}).stderr
    assert f"ImportError: {name}" in said and said.count("File ") == 2  # the import, and where it is refused


def test_threads_are_counted_from_one() -> None:
    before = tensorwire.get_threads()
    try:
        tensorwire.set_threads(2)
        assert tensorwire.get_threads() == (2 if kernels.implementation == "native" else 1)
        with pytest.raises(ValueError, match="at least 1"):
            tensorwire.set_threads(0)
    finally:
        tensorwire.set_threads(before)
