"""The layers hold: each room imports only from those above it in docs/architecture.md.

The core needs NumPy, msgpack and zstandard alone, and `import tensorwire` loads nothing that was not asked for.
"""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import tensorwire

PACKAGE = Path(tensorwire.__file__).parent
CI_IMPORT_SECONDS = 0.5  # of processor time; less than 0.15 on a machine of its own

# Rooms, and modules of the top level, from the ground up. Each imports from those before it, but for NEVER.
LAYERS = [
    {"errors", "limits", "dtypes", "tensor"},
    {"kernels", "memory", "storage"},
    {"checksum"},
    {"wire"},
    {"codecs"},
    {"streams", "transfer"},
    {"files", "transports"},
    {"api", "numpy", "torch", "safetensors", "authenticity"},
    {"__init__"},
    {"updates", "versions"},
    {"integrations"},
    {"bench", "cli", "fl", "__main__"},
]
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
NEVER = {
    "wire": {"kernels", "memory", "storage"},
    "codecs": {"wire", "checksum", "memory", "storage"},
    "streams": {"kernels", "storage"},
    "transfer": {"kernels"},
    "files": {"kernels"},
    "transports": {"kernels", "codecs", "wire", "streams", "storage"},
}
FOREIGN = {
    "tensor": {"numpy"},
    "wire": {"msgpack"},
    "kernels": {"numpy", "torch", "bitsandbytes"},
    "codecs": {"numpy", "ml_dtypes", "zstandard"},
    "streams": {"numpy"},
    "memory": {"numpy"},
    "files": {"numpy"},
    "updates": {"numpy"},
    "versions": {"fsspec"},
    "numpy": {"numpy", "ml_dtypes"},
    "torch": {"numpy", "torch"},
    "integrations": {"numpy", "torch", "bitsandbytes", "flwr", "nvflare"},
    "cli": {"numpy", "torch", "tqdm", "cryptography"},
    "bench": {"numpy", "zstandard", "torch", "bitsandbytes", "safetensors", "matplotlib", "tqdm"},
    "fl": {"numpy", "torch", "transformers", "peft", "starlette", "uvicorn"},
}
CORE = {"numpy", "ml_dtypes", "msgpack", "zstandard"}
# Rooms for one foreign library, and single files; elsewhere extras come late, inside functions.
NEEDS_EXTRA = {"torch", "integrations", "kernels/cuda.py", "bench/plots.py"}
# Rooms that know no sockets or processes, and those that know no threads either.
OUTSIDE = {"socket", "ssl", "asyncio", "multiprocessing", "subprocess"}
THREADS = {"threading", "concurrent"}
BARE = dict.fromkeys(("wire", "kernels", "codecs"), OUTSIDE | THREADS) | dict.fromkeys(
    ("memory", "storage", "streams", "transfer", "files", "updates", "versions"), OUTSIDE
)

# Modules within rooms whose names are public.
PUBLIC_MODULES = [
    ["files", "safetensors"],
    ["files", "authenticity"],
    ["files", "examine"],
    ["integrations", "bitsandbytes"],
    ["integrations", "flower"],
    ["integrations", "nvflare"],
    ["integrations", "torch_distributed"],
    ["storage", "parts"],
]

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted name, whether it is imported with the module) of everything a file imports, also inside functions."""
    return list(imports_below(ast.parse(path.read_text()), at_import=True))


def imports_below(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, at_import) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "a relative import"
            yield from ((f"{child.module}.{alias.name}", at_import) for alias in child.names)
        elif not isinstance(child, ast.expr) and not is_for_types_only(child):
            yield from imports_below(child, at_import and not isinstance(child, ast.FunctionDef))


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def rooms_imported(path: Path) -> set[str]:
    """Rooms of this package that a file imports; `__init__` for the package's own public names."""
    found = set()
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] == "tensorwire":
            found.add(parts[1] if len(parts) > 1 and parts[1] in LAYER else "__init__")
    return found


def test_every_room_has_a_layer():
    assert {room_of(path) for path in FILES} <= {*LAYER}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_the_layers_above(path):
    room = room_of(path)
    for other in rooms_imported(path) - {room}:
        assert other not in NEVER.get(room, ())
        if LAYER[room] == LAYER[other]:
            # Nouns use one another, as commands do; fronts use `api`.
            assert LAYER[room] in (0, LAYER["cli"]) or other == "api", (room, other)
        else:
            assert LAYER[other] < LAYER[room], f"{room} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_the_foreign_libraries_of_its_room(path):
    room = room_of(path)
    roots = {name.split(".")[0] for name, _ in imports(path)} - {"tensorwire"}
    assert roots - sys.stdlib_module_names <= FOREIGN.get(room, set())
    early = {name.split(".")[0] for name, at_import in imports(path) if at_import} - {"tensorwire"}
    needs_extra = {room, path.relative_to(PACKAGE).as_posix()} & NEEDS_EXTRA
    assert needs_extra or early - sys.stdlib_module_names <= CORE
    assert not roots & BARE.get(room, set())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_stay_in_their_room(path):
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] == "tensorwire" and len(parts) > 1 and parts[1] != room_of(path):
            assert not any(re.match(r"_[^_]", part) for part in parts), name


ABOVE = [path for path in FILES if LAYER[room_of(path)] > LAYER["__init__"]]


@pytest.mark.parametrize("path", ABOVE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_upper_rooms_import_only_public_names(path):
    """What rooms export, from their `__init__` or from a module that is named as public."""
    for name, _ in imports(path):
        module, _, last = name.rpartition(".")
        parts = module.split(".")
        if parts[0] != "tensorwire" or len(parts) == 1 or parts[1] in (room_of(path), *LAYERS[-1]):
            continue
        assert len(parts) == 2 or parts[1:] in PUBLIC_MODULES, f"{module} is no public module"
        exported = getattr(importlib.import_module(module), "__all__", None)
        assert exported is None or last in exported or (PACKAGE / parts[1] / f"{last}.py").exists(), name


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return {*done.stdout.split()}


def test_import_tensorwire_loads_no_foreign_library_and_no_room_it_does_not_need():
    modules = loaded_by("import tensorwire")
    roots = {name.split(".")[0] for name in modules}
    assert not roots & {
        "torch",
        "bitsandbytes",
        "safetensors",
        "ml_dtypes",
        "matplotlib",
        "asyncio",
        "socket",
    }
    rooms = {name.split(".")[1] for name in modules if name.startswith("tensorwire.")}
    assert rooms <= set().union(*LAYERS[:5]) | {"streams", "files", "api", "numpy"}


def test_rooms_are_imported_on_first_use():
    assert "tensorwire.transports" in loaded_by("import tensorwire; tensorwire.transports")
    assert "tensorwire.updates" in loaded_by("import tensorwire; tensorwire.updates")
    assert "torch" not in loaded_by("import tensorwire; tensorwire.loads(tensorwire.dumps({'a': 1}))")


@pytest.mark.parametrize("name", ["authenticity", "safetensors"])
def test_a_module_of_files_has_a_short_name_that_imports(name):
    """As an attribute and as a module, with all that is public there."""
    assert f"tensorwire.{name}" in loaded_by(f"import tensorwire.{name}")
    assert f"tensorwire.{name}" in loaded_by(f"import tensorwire; tensorwire.{name}")
    short = importlib.import_module(f"tensorwire.{name}")
    assert short is getattr(tensorwire, name)
    own = importlib.import_module(f"tensorwire.files.{name}")
    defined = {key for key, value in vars(own).items() if getattr(value, "__module__", "") == own.__name__}
    assert {*short.__all__} == {*getattr(own, "__all__", [key for key in defined if not key.startswith("_")])}
    assert all(getattr(short, key) is getattr(own, key) for key in short.__all__)


def test_import_tensorwire_is_quick():
    """In processor time, which does not depend on what else the machine does; one of three may be quick."""
    code = "import time, numpy; start = time.process_time(); import tensorwire; print(time.process_time() - start)"
    command = [sys.executable, "-W", "ignore", "-c", code]
    took = (float(subprocess.check_output(command, cwd=PACKAGE.parent)) for _ in range(3))
    assert any(seconds < CI_IMPORT_SECONDS for seconds in took)


def test_the_page_and_this_table_agree():
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", page, re.MULTILINE)
    found = {name.strip("`/").removesuffix(".py"): int(number) for number, names in rows for name in names.split()}
    assert found == {room: layer for room, layer in LAYER.items() if not room.startswith("__")}
