"""CuPy itself compiles and launches every kernel rightly, on any device and stream; needs no GPU."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import shim
from mpirun import environment

pytestmark = [
    pytest.mark.skipif(not shim.COMPILER, reason="needs a C++ compiler"),
    pytest.mark.skipif(find_spec("cupy") is None, reason="needs CuPy"),
]

TESTS = Path(__file__).parent
EVERY_KERNEL = "across_blocks or huge or thousands or momentum or unpack or 1_to_70 or hundreds or count or agreement"
EVERY_KERNEL += " or without_a_one or applies"


def with_fake_cuda(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own, as a fake is put in the place of CUDA before CuPy is imported."""
    paths = f"{TESTS.parent}:{TESTS}"
    variables = environment({"PYTHONPATH": paths, "CUPY_CACHE_DIR": str(folder / "cache")})
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.long
def test_every_kernel(tmp_path: Path) -> None:
    contract = [str(TESTS / "bitmap_contract"), "-k", f"shim and ({EVERY_KERNEL})"]
    done = with_fake_cuda(tmp_path, "-m", "pytest", "-p", "no:cacheprovider", "-p", "fake_cuda", *contract)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernels that were not launched: none" in done.stdout


def test_compilers_messages_point_into_the_files(tmp_path: Path) -> None:
    program = f"""
import fake_cuda, numpy, pathlib, torch
from mpisign.bitmap import kernels

fake_cuda.install()
wrong = pathlib.Path({str(tmp_path / "wrong.cu")!r})
common, right, *others = kernels.SOURCES
wrong.write_text(right.read_text() + "nonsense" + chr(10))
print(wrong.read_text().count(chr(10)))
kernels.SOURCES = (common, wrong, *others)
kernels.launch("unpack_one", 1, [], torch.device("cuda", 0))
"""
    done = with_fake_cuda(tmp_path, "-c", program)
    assert f"CompileException: {tmp_path / 'wrong.cu'}({done.stdout.strip()}): error" in done.stderr
