"""The plan of the house: who may import whom, what `import mpisign` may start, how long a file may be."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mpisign

ROOT = Path(mpisign.__file__).parent
REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("mpisign", "tests", "scripts", "benchmarks", "docs")
LAYERS = [
    {
        "errors",
        "differences",
        "launch",
        "hyperparameters",
        "vigil",
        "bitmap",
        "backends",
        "plain",
        "policy",
        "quantities",
        "trace",
        "report",
        "encoding",
        "trees",
        "presence",
        "alarm",
        "lateness",
        "cost",
        "cuts",
        "vendors",
        "processes",
        "warning",
        "survival",
        "heartbeat",
        "links",
        "dead_man",
    },
    {
        "watchdog",
        "turns",
        "network",
        "group",
        "exit_words",
        "last_words",
        "joining",
        "positions",
        "regrouping",
        "spares",
        "membership",
        "places",
        "talk",
        "timeline",
        "session",
    },
    {"preemption", "endings", "calibration", "codecs", "rules", "memory", "method", "layout"},
    {
        "attacks",
        "exchange",
        "methods",
        "transfer",
        "collectives",
        "sync",
        "averages",
        "checks",
        "scaling",
        "wrapping",
        "wrapper",
        "overlap",
        "travel",
        "buddies",
        "planned",
        "sitting_out",
        "windows",
        "local_steps",
        "applying",
        "restoring",
        "sampler",
        "checkpoint",
    },
    {"standby", "optimizer", "doctor", "prediction", "starting"},
    {"integrations"},
    {"__init__", "__main__"},
]
MAY_PRINT = {"mpisign.__main__", "mpisign.doctor"}


def modules() -> dict[str, Path]:
    """Every module of the library by its name; a package's ``__init__`` has the package's."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("mpisign", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports(name: str) -> Iterator[str]:
    """The library's modules that ``name`` imports, wherever in its text; names in a package are its modules."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                target = inner if inner in MODULES else node.module
                if target in MODULES:
                    yield str(target)


def layer(name: str) -> int:
    room = name.split(".")[1] if "." in name else "__init__"
    for level, rooms in enumerate(LAYERS):
        if room in rooms:
            return level
    raise AssertionError(f"{name} is in no layer: give it one in {Path(__file__).name} and in the design")


def test_there_is_something_to_check() -> None:
    assert {"mpisign", "mpisign.optimizer", "mpisign.bitmap.host"} <= set(MODULES)
    assert "mpisign.session" in set(imports("mpisign.optimizer"))


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    upward = {target for target in imports(name) if layer(target) > layer(name)}
    assert not upward


def test_modules_do_not_import_in_circles() -> None:
    """A package's ``__init__`` lists its modules; that they name it again is no circle."""
    graph = {name: {target for target in imports(name) if not name.startswith(target + ".")} for name in MODULES}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_a_file_is_one_idea() -> None:
    files = [path for folder in FOLDERS for kind in ("*.py", "*.cu") for path in (REPOSITORY / folder).rglob(kind)]
    assert {"host.py", "pack.cu", "test_layers.py", "training.py", "harness.py"} <= {path.name for path in files}
    lines = {str(path): len(path.read_text().splitlines()) for path in files}
    assert not {path: count for path, count in lines.items() if count > 450}, "split them along what they do"


def named_by(path: Path) -> Iterator[str]:
    """The modules that a file imports, and the names that it imports from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_no_test_module_imports_another() -> None:
    """What they share is in modules without tests, so that a test can move, or go, by itself."""
    tests = {path.stem: path for path in (REPOSITORY / "tests").rglob("test_*.py")}
    assert {"test_layers", "test_resume", "test_contract_packing", "test_jobs"} <= set(tests)
    found = [(str(path), name) for path in (REPOSITORY / "tests").rglob("*.py") for name in named_by(path)]
    assert not [(path, name) for path, name in found if name.split(".")[-1] in tests]


@pytest.mark.parametrize("name", sorted(set(MODULES) - MAY_PRINT))
def test_the_library_does_not_print(name: str) -> None:
    calls = [node.func for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    assert not [func for func in calls if isinstance(func, ast.Name) and func.id == "print"]


def test_public_names_live_in_the_package_alone() -> None:
    exported = {
        alias.asname or alias.name
        for node in TREES["mpisign"].body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert exported | {"__version__"} == set(mpisign.__all__)


def test_importing_mpisign_starts_no_mpi() -> None:
    """A spawned DataLoader worker that imports the library must not hang the job, nor wait for a compiler."""
    program = "import mpisign, sys; print([m for m in ('mpi4py.MPI', 'cupy', 'torch._dynamo') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == "[]", run.stderr


def test_nothing_imports_attacks() -> None:
    """They are for experiments alone."""
    assert not [name for name in MODULES if "mpisign.attacks" in imports(name)]
