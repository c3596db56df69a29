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
