"""Python started in a checkout whose extension is not built says so, and does not blame a missing compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tensorwire

PACKAGE = Path(tensorwire.__file__).parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "tensorwire", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    (tmp_path / "csrc").mkdir()
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "quick.py"):
        shutil.copy(Path(__file__).parent / name, tmp_path / "tests")
    (tmp_path / "tests" / "test_nothing.py").write_text("def test_nothing(): pass\n")
    return tmp_path


def python(checkout: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    # -S: without the import hook of an editable install, which would find the real checkout.
    command = [sys.executable, "-S", *arguments]
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "TENSORWIRE_ISA")}
    everything = {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=checkout, env=everything)


def test_an_import_warns_with_the_cause_and_the_remedy(checkout: Path) -> None:
    done = python(checkout, "-c", "import tensorwire; print(tensorwire.__file__)")
    assert done.stdout.strip() == str(checkout / "tensorwire" / "__init__.py")
    assert f"source checkout {checkout}" in done.stderr
    assert "pip install -e ." in done.stderr
    assert "compiler" not in done.stderr


def test_an_installation_without_the_extension_is_told_about_the_compiler(checkout: Path) -> None:
    (checkout / "csrc").rmdir()
    done = python(checkout, "-c", "import tensorwire")
    assert "Reinstall with a C++17 compiler" in done.stderr
    assert "checkout" not in done.stderr


def test_python_m_pytest_stops_before_the_first_test(checkout: Path) -> None:
    done = python(checkout, "-m", "pytest", "-p", "no:cacheprovider")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"source checkout {checkout}" in done.stderr
    assert "passed" not in done.stdout


def test_tests_run_on_numpy_if_requested(checkout: Path) -> None:
    done = python(checkout, "-m", "pytest", "-p", "no:cacheprovider", TENSORWIRE_ISA="numpy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"tensorwire: {checkout}" in done.stdout
    assert "1 passed" in done.stdout
