"""A wheel holds all of mpisign: what is no Python file is easily left out, and missed only on a machine with a GPU."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def what_is_missing() -> str:
    """For building without a network."""
    if find_spec("pip") is None or find_spec("setuptools") is None:
        return "needs pip and setuptools"
    return "needs setuptools 77" if int(importlib.metadata.version("setuptools").partition(".")[0]) < 77 else ""


@pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing())
def test_a_wheel_holds_every_file(tmp_path: Path) -> None:
    source, wheels = tmp_path / "source", tmp_path / "wheels"  # a build leaves its traces in the source
    shutil.copytree(ROOT / "mpisign", source / "mpisign", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(wheels), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(wheels.glob("mpisign-*.whl"))) as wheel:
        packed = {name: wheel.read(name) for name in wheel.namelist() if name.startswith("mpisign/")}
    files = [path for path in (source / "mpisign").rglob("*") if path.is_file()]
    assert packed == {path.relative_to(source).as_posix(): path.read_bytes() for path in files}
    assert {"mpisign/bitmap/common.cu", "mpisign/bitmap/count.cu", "mpisign/py.typed"} <= packed.keys()
