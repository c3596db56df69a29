"""What of the batch scripts needs no SLURM; tests/slurm runs them on one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mpirun import environment

import mpisign

SLURM = Path(__file__).parents[1] / "slurm"
SCRIPTS = sorted(SLURM.glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_sbatch_it_says_so(script: Path) -> None:
    done = subprocess.run(
        ["bash", script], env={"PATH": os.defpath}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert done.stderr.endswith("SLURM_JOB_ID: is not set: submit this file with sbatch\n")
    assert done.stderr.count("\n") == 1


def test_the_readme_has_every_script_and_setting() -> None:
    readme = (SLURM / "README.md").read_text()
    listed = set(re.findall(r"^\| `([A-Za-z_.]+)`", readme, re.MULTILINE))
    texts = [path.read_text() for path in (*SCRIPTS, SLURM / "common.sh")]
    settings = {name for text in texts for name in re.findall(r'^: "\$\{(\w+):=', text, re.MULTILINE)}
    assert {path.name for path in SCRIPTS} | settings == {name for name in listed if name != "scancel"}


def test_script_and_library_agree_on_the_exit_code() -> None:
    assert f"\nREQUEUE={mpisign.REQUEUE_EXIT_CODE} " in (SLURM / "common.sh").read_text()


def test_mpirun_understands_the_hosts() -> None:
    search = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    mpirun = shutil.which("mpirun", path=search)
    assert mpirun
    command = [mpirun, "--hostfile", SLURM / "hosts.example", "--display", "allocation", "--do-not-launch", "true"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert set(re.findall(r"(\w+): slots=(\d+)", done.stdout)) == {("node01", "4"), ("node02", "4")}, done.stderr
