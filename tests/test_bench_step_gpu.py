"""benchmarks/bench_step_gpu.py: for real on a GPU, and on the host, where only the GPU's own clocks are missing."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import pytest
import torch
from gpu_branch import gpu_branch, needs_compiler
from mpirun import environment

from mpisign.bitmap import kernels

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "bench_step_gpu.py"


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.long
def test_help_has_defaults_and_examples() -> None:
    text = " ".join(bench("--help").stdout.split())
    assert "(default: 64)" in text
    assert "benchmarks/bench_step_gpu.py --report" in text.partition("examples:")[2]


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = bench()
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "bench_step_gpu.py needs a GPU that torch can use; bench_step.py measures the host"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_small_run_writes_a_report(tmp_path: Path) -> None:
    done = bench("--width", "4", "--rounds", "2", "--warmup", "1", "--report", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    check(tmp_path)


class Clock:
    """A CUDA event of a device that is always done."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Clock) -> float:
        return 1e3 * (other.at - self.at)


@pytest.mark.long
@needs_compiler
@pytest.mark.filterwarnings("ignore:CUDA is not available, disabling CUDA profiling")
@pytest.mark.parametrize("mpi", [True, False], ids=["MPI", "no MPI"])
def test_on_the_host_with_its_kernels_in_the_shim(mpi: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script, alone = importlib.import_module("bench_step_gpu"), importlib.import_module("alone")
    pool = SimpleNamespace(total_bytes=lambda: 0)
    monkeypatch.setattr(script, "STEPS", 3)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"allocation.all.allocated": 7})
    if not mpi:
        monkeypatch.setitem(sys.modules, "mpi4py", None)
    settings = argparse.Namespace(rounds=1, warmup=0, report=True, results=tmp_path, width=1, exchange="auto")
    with gpu_branch(), alone.job() as comm:
        monkeypatch.setattr(kernels, "import_cupy", lambda: SimpleNamespace(get_default_memory_pool=lambda: pool))
        assert (comm is not None) == mpi
        script.run(settings, torch.device("cpu"), "host", comm)
    check(tmp_path)


def check(results: Path) -> None:
    raw = json.loads(next(results.glob("*-step-gpu.json")).read_text())
    assert {one["name"] for one in raw["contenders"]} == {"signsgd", "signum", "mean", "SGD alone"}
    launches = {name: part["launches"] for name, part in raw["parts"].items()}
    signsgd = {"pack_many": 1, "any_zero": 1, "unpack_many": 1, "majority_2": 1}
    signum = {"pack_momentum": 1, "any_zero": 1, "unpack_many": 1, "majority_2": 1}
    assert launches == {
        "signsgd": signsgd,
        "signum": signum,
        "signsgd, messages of 1 MiB": signsgd,
        "signum, messages of 1 MiB": signum,
    }
    report = next(results.glob("*-step-gpu.md")).read_text()
    assert "| signum: launches to pack | 1 | 1 | met |" in report
    assert "| signum: allocations by torch | 0 | 0 | met |" in report
