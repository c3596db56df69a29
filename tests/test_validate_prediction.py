"""Predictions against measurements on hosts of a slow network: the real program, on small sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mpirun import environment
from namespaces import left_behind, needs_namespaces

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def validate_prediction(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "validate_prediction.py"), *options]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, env=environment({"PATH": path}), capture_output=True, text=True, check=False, timeout=200
    )


@pytest.mark.long
@needs_namespaces
def test_predictions_are_held_against_measurements(tmp_path: Path):
    options = ["--rates", "1gbit", "--elements", "80k", "--rounds", "2", "--results", str(tmp_path)]
    # The first is no shape, and what the second measures is written all the same.
    for more, code in ((["--shapes", "two", "2"], 1), (["--again", str(tmp_path / "earlier.json")], 0)):
        seen = validate_prediction(*options, *more)
        assert seen.returncode == code, seen.stdout + seen.stderr
        raw = next(tmp_path.glob("*-prediction.json"))
        data, text = json.loads(raw.read_text()), raw.with_suffix(".md").read_text()
        (case,) = data["cases"]
        assert case["nodes"] == [1, 1]
        assert case["predicted"].keys() == case["seconds"].keys() > {"two_phase", "ring fp32"}
        assert {len(seconds) for seconds in case["seconds"].values()} == {2}, "rings as often as votes"
        assert text.count("| 2 at 1gbit | ") == len(case["seconds"]) + 1, "a row for each, and one for the calibration"
        votes = case["seconds"].keys() - {"ring fp32", "ring bf16"}
        predicted = case["predicted"]["ring bf16"] / min(case["predicted"][way] for way in votes)
        medians = {way: sum(seconds) / 2 for way, seconds in case["seconds"].items()}
        ratio = predicted / (medians["ring bf16"] / min(medians[way] for way in votes))
        assert f"| 1gbit | ring bf16 | {ratio:.2f} | {ratio:.2f} |" in text
        assert "Not measured: two at 1gbit." in text
        assert "ended with exit code 1: slow_network: two is no number of hosts" in data["failed"]["two at 1gbit"]
        assert code == 0 or data["failed"]["two at 1gbit"] in seen.stderr
        raw.rename(tmp_path / "earlier.json")


@pytest.mark.long
@needs_namespaces
def test_a_case_that_takes_too_long_leaves_no_hosts(tmp_path: Path):
    before = left_behind()
    seen = validate_prediction("--shapes", "2", "--rates", "1gbit", "--patience", "3", "--results", str(tmp_path))
    assert seen.returncode == 1
    assert "2 at 1gbit took longer than 3 s" in seen.stderr
    assert left_behind() <= before
