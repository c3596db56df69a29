"""scripts/gpu_check where there is no GPU: it explains itself, says what it lacks, and writes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mpirun import environment

GPU_CHECK = Path(__file__).parents[1] / "scripts" / "gpu_check"


def gpu_check(
    *arguments: str, python: str | Path = sys.executable, results: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    variables = environment({"PYTHON": str(python), "RESULTS": str(results), **variables})
    command = [str(GPU_CHECK), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_does_nothing_else(option: str, tmp_path: Path) -> None:
    done = gpu_check(option, results=tmp_path / "results")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: scripts/gpu_check\n")
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_fails_and_writes_no_report(tmp_path: Path) -> None:
    done = gpu_check(results=tmp_path / "results")
    assert done.returncode == 1
    assert done.stderr.startswith("gpu_check: there is no GPU that torch can use")
    assert "nvidia-smi" in done.stderr
    assert not (tmp_path / "results").exists()


def test_arguments_are_refused(tmp_path: Path) -> None:
    done = gpu_check("--quick", results=tmp_path / "results")
    assert done.returncode == 1
    assert "it takes no arguments: --quick" in done.stderr


def test_a_python_without_torch_is_told_what_to_install(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\ncase "$*" in *torch*) exit 1;; esac\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = gpu_check(python=python, results=tmp_path / "results")
    assert done.returncode == 1
    assert f"{python} has no torch: pip install" in done.stderr


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A Python that has everything, one failing part and one that hangs: what is tested is the script."""
    python = tmp_path / "python3"
    python.write_text("""#!/bin/sh
case "$*" in
    *get_device_properties*) echo "one GPU" ;;
    *"import MPI"*) exit 1 ;;
    *test_bitmap_contract*) echo "7 passed" ;;
    *tests/gpu*) echo "a traceback"; exit 3 ;;
    *bench_step_gpu*) exec sleep 600 ;;
esac
""")
    python.chmod(0o755)
    return python


def test_a_part_that_fails_or_hangs_is_reported_and_the_others_run(stand_in: Path, tmp_path: Path) -> None:
    done = gpu_check(python=stand_in, results=tmp_path, TIME_IN_ALL="10", PATH="/usr/bin:/bin")
    assert done.returncode == 1
    failures, left_out = "GPU tests; Benchmark of a step", "not run, no time left: Benchmark of the kernels"
    assert done.stderr.endswith(f"gpu_check: failed: {failures}; {left_out}\n")
    assert "a traceback" in done.stdout
    report = next(tmp_path.glob("*-gpu-check.md")).read_text()
    assert f"one GPU\n\nFailed: {failures}.\n\nN{left_out[1:]}.\n" in report
    headings = [line for line in report.splitlines() if line.startswith("## ")]
    assert [line.partition(": ")[0] for line in headings[:2]] == ["## The kernels' bits", "## GPU tests"]
    assert "passed in" in headings[0]
    assert headings[1].endswith("FAILED")
    assert "Benchmark of a step: OUT OF TIME" in headings[2]
    assert headings[3] == "## Benchmark of the kernels: skipped, there was no time left"
    assert headings[4] == "## Doctor, and all on several ranks: skipped, mpi4py finds no MPI library"


def test_what_there_is_no_time_for_has_not_failed(stand_in: Path, tmp_path: Path) -> None:
    done = gpu_check(python=stand_in, results=tmp_path, TIME_IN_ALL="0", PATH="/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    left_out = "The kernels' bits; GPU tests; Benchmark of a step; Benchmark of the kernels"
    assert f"not run, no time left: {left_out}" in done.stdout.splitlines()[-1]
    report = next(tmp_path.glob("*-gpu-check.md")).read_text()
    assert f"Not run, no time left: {left_out}" in report
    assert "Failed" not in report
