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
from mpisign.starting import usable_cores

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


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """Variables of a job of one rank, where SLURM's commands are run here, and srun's options are written down."""
    commands = {
        "srun": f'echo "$@" >>{tmp_path}/asked; while [[ $1 == -* ]]; do shift; done; "$@"',
        "scontrol": "echo JobState=RUNNING",
    }
    for name, text in commands.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/bin/bash\n{text}\n")
        command.chmod(0o755)
    variables = {"JOB_ID": "7", "NTASKS": "1", "JOB_NUM_NODES": "1", "JOB_NODELIST": "here", "JOB_NAME": "job"}
    return environment(
        {f"SLURM_{name}": value for name, value in variables.items()}
        | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
        | {"MPISIGN_ROOT": str(SLURM.parent), "MPISIGN_OUT": str(tmp_path / "out"), "MPISIGN_LAUNCHER": "mpirun"}
    )


def bash(job: dict[str, str], *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", *words], env=job, capture_output=True, text=True, timeout=120, check=False)


def test_mpirun_is_given_cores_where_cpus_are_hardware_threads(job: dict[str, str]) -> None:
    cores, _ = usable_cores()
    script = f'. {SLURM}/common.sh; python=("$PYTHON"); choose_launcher "Open MPI v5"; echo "${{launcher[@]}}"'
    for on_node, cpus, each in ((cores, cores, cores), (2 * cores, 2 * cores, cores), (2 * cores, 1, 1)):
        job |= {"SLURM_CPUS_ON_NODE": str(on_node), "SLURM_CPUS_PER_TASK": str(cpus)}
        done = bash(job, "-euc", script)
        assert f" --map-by slot:PE={each} --bind-to core" in done.stdout, done.stderr


@pytest.mark.parametrize(("gpus", "ranks"), [({}, 4), ({"SLURM_GPUS_PER_TASK": "1"}, 1)])
def test_ranks_that_see_their_own_gpu_alone_need_no_other(
    job: dict[str, str], tmp_path: Path, gpus: dict[str, str], ranks: int
) -> None:
    job |= {"SLURM_NTASKS_PER_NODE": "4", "SLURMD_NODENAME": "here", **gpus}
    bash(job, "-euc", f'. {SLURM}/common.sh; python=("$PYTHON"); check_gpus')
    assert (tmp_path / "asked").read_text().endswith(f" {ranks}\n")


@pytest.mark.long
def test_a_sweep_goes_on_in_the_folder_that_it_names(job: dict[str, str], tmp_path: Path) -> None:
    (script := tmp_path / "fails.py").write_text("raise SystemExit(3)")
    job |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "MPISIGN_BIND": "none"}
    done = bash(job, SLURM / "sweep.sbatch", script)
    assert done.returncode == 3, done.stderr
    assert f"results in {tmp_path}/out/lr-3e-4\n" in done.stdout
    assert f"To go on: MPISIGN_OUT={tmp_path}/out sbatch ..." in done.stderr
