"""benchmarks/bench_bitmap_gpu.py: for real on a GPU, and small on the host, where kernels are the shim's."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_branch import gpu_branch, needs_compiler
from mpirun import environment

from mpisign.bitmap import kernels

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_bitmap_gpu.py"


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.long
def test_help_has_defaults_and_examples() -> None:
    text = bench("--help").stdout
    assert "(default: 100000000)" in text
    assert "benchmarks/bench_bitmap_gpu.py --report" in text.partition("examples:")[2]


@pytest.mark.long
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


@needs_compiler
@pytest.mark.parametrize("misaligned", [False, True])
def test_the_bitmaps_that_are_decided_start_where_the_report_says(
    misaligned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host, with the kernels in the shim."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script, seen = importlib.import_module("bench_bitmap_gpu"), []
    majority = script.cuda.majority
    cpu = torch.device("cpu")
    monkeypatch.setattr(script.cuda, "majority", lambda ballots, *rest, **options: seen.extend(ballots))
    contenders = script.deciders(1000, 5, cpu, script.Repeat(1, cpu))
    contenders[misaligned].run()
    assert {ballot.data_ptr() % 16 for ballot in seen} == ({0, 4, 8, 12} if misaligned else {0})
    monkeypatch.setattr(script.cuda, "majority", majority)
    with gpu_branch() as launches:
        for contender in contenders:
            contender.run()
    assert launches == ["majority_3", "majority_3"]


@pytest.mark.parametrize("when", ["first result", "timed run"])
def test_a_rival_that_does_not_run_is_left_out_and_named(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module("bench_bitmap_gpu")
    repeat, ones = script.Repeat(1, torch.device("cpu")), torch.ones(3)

    def broken() -> torch.Tensor:
        raise OSError("nvrtc: error: invalid value for --gpu-architecture\nand more")

    repeat.try_rival("rival", ones, ones.clone if when == "timed run" else broken)
    contenders = [
        repeat("ours", "", int),
        repeat.rival("rival", "", broken),
        repeat.rival("another", "", int),
    ]
    assert script.names(repeat.those_that_run(contenders)) == ["ours", "another"]
    why = "OSError: nvrtc: error: invalid value for --gpu-architecture"
    assert repeat.failures == {"rival": why}
    assert repeat.told_of_failures() == [f"`rival` does not run on this machine and is left out: {why}."]
    times = {"ours": [1.0], "another": [2.0]}
    table = script.against("Times", times, ["ours", "rival", "another"], ["rival", "another"])
    assert table.columns == ["", "median ms", "fastest ms", "x another"]
    assert [row[0] for row in table.rows] == ["ours", "another"]


def test_a_rival_that_computes_something_else_and_what_is_ours_and_fails_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    repeat = importlib.import_module("bench_bitmap_gpu").Repeat(1, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="rival gives other results than"):
        repeat.try_rival("rival", torch.ones(3), lambda: torch.zeros(3))
    (ours,) = repeat.those_that_run([repeat("ours", "", lambda: 1 // 0)])
    with pytest.raises(ZeroDivisionError):
        ours.run()


@pytest.mark.long
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
    raw = check(tmp_path)
    assert raw["gpu"] == torch.cuda.get_device_name()


@pytest.mark.long
@needs_compiler
def test_on_the_host_with_its_kernels_in_the_shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy has the functions of CuPy that are rivals."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module("bench_bitmap_gpu")
    monkeypatch.setattr(kernels, "import_cupy", lambda: np)
    monkeypatch.setattr(kernels, "stream", lambda device: nullcontext())
    monkeypatch.setattr(script, "resnet50_shapes", lambda: [(64, 3, 7, 7), (64,), (1000, 5)])
    settings = argparse.Namespace(elements=50_003, ballots=3, repeats=1, rounds=2, warmup=0, report=True)
    settings.results = tmp_path
    with gpu_branch():
        script.run(settings, torch.device("cpu"), "host")
    raw = check(tmp_path)
    words = -(-8 * 50_003 // 32)
    moved = raw["bytes_moved_by_a_launch"]
    assert moved["majority of 3"] == moved["majority of 3, misaligned"] == 4 * (3 + 1) * words
    (target,) = [one for one in raw["targets"] if one["contender"] == "majority of 3"]
    assert target["at_least"] == round(0.85 * 8 * 50_003 / moved["majority of 3"], 2)


def check(results: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(next(results.glob("*-bitmap-gpu.json")).read_text())
    names = {one["name"] for one in raw["contenders"]}
    assert {
        "copy",
        "pack",
        "pack, rows",
        "unpack",
        "majority of 3",
        "majority of 3, misaligned",
        "cupy.packbits",
    } <= names
    assert "share of copy" in next(results.glob("*-bitmap-gpu.md")).read_text()
    return raw
