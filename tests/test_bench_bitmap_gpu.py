"""benchmarks/bench_bitmap_gpu.py runs for real where there is a GPU, and says so where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mpirun import environment

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_bitmap_gpu.py"


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=False)


def test_help_has_defaults_and_examples() -> None:
    text = bench("--help").stdout
    assert "(default: 100000000)" in text
    assert "benchmarks/bench_bitmap_gpu.py --report" in text.partition("examples:")[2]


def test_what_only_decorates_need_not_be_installed() -> None:
    """A machine with a GPU may have nothing but torch, NumPy and CuPy, and no MPI."""
    program = (
        "import sys\n"
        "for name in ('matplotlib', 'mpi4py', 'rich', 'sklearn', 'threadpoolctl', 'tqdm'): sys.modules[name] = None\n"
        "import argparse, alone, bench_bitmap_gpu, bench_step_gpu, harness\n"
        "contenders, settings = [harness.Contender('one', '', int)], argparse.Namespace(rounds=2)\n"
        "times = harness.measure(contenders, rounds=2, warmup=1)\n"
        "table = harness.compare('Times', times, ['one'], ['one'])\n"
        "harness.Report('name', 'Title', '', settings, contenders, times, [], [table]).show()\n"
    )
    paths = f"{SCRIPT.parents[1]}:{SCRIPT.parent}"
    command = [sys.executable, "-c", program]
    shown = subprocess.run(
        command, env=environment({"PYTHONPATH": paths}), capture_output=True, text=True, timeout=60, check=True
    )
    assert shown.stdout.startswith("Title\n\n2 repetitions")
    assert "### Times\n\n|  | median ms | fastest ms | x one |\n" in shown.stdout
    assert not shown.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = bench()
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "bench_bitmap_gpu.py needs a GPU that torch can use; bench_bitmap.py measures the host"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_small_run_writes_a_report(tmp_path: Path) -> None:
    sizes = ["--elements", "1000003", "--ballots", "3", "--rounds", "2", "--warmup", "0", "--repeats", "2"]
    done = bench(*sizes, "--report", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    raw = json.loads(next(tmp_path.glob("*-bitmap-gpu.json")).read_text())
    assert {"copy", "pack", "unpack", "majority of 3", "cupy.packbits"} <= {one["name"] for one in raw["contenders"]}
    assert raw["gpu"] == torch.cuda.get_device_name()
    assert "share of copy" in next(tmp_path.glob("*-bitmap-gpu.md")).read_text()
