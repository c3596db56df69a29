"""The templates for PBS and LSF in docs/templates, with what the two would give them: variables, files, a signal.

Neither scheduler is here. Their own commands, which the template for PBS calls, write down what they were asked.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mpirun import Job, environment, patient

import mpisign

TEMPLATES = Path(__file__).parents[1] / "docs" / "templates"
TRAIN = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # importing may take longer than the job has time
import pathlib, time, mpisign
mpisign.init()
mpisign.stop_on_signal()
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
mpisign.barrier()
pathlib.Path(f"began-{mpisign.rank()}-of-{mpisign.size()}").touch()
while not mpisign.stop_requested():
    time.sleep(0.05)
    mpisign.barrier()  # where a step would be
raise SystemExit(mpisign.REQUEUE_EXIT_CODE)
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """A folder with a training of two ranks, and the variables of its job."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "hosts").write_text("localhost\nlocalhost\n")
    for name, text in (("qstat", 'echo "    Resource_List.walltime = 00:00:40"'), ("qsub", 'echo "$@" >asked')):
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/bin/sh\n{text}\n")
        command.chmod(0o755)
    search = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return environment({"PATH": search, "OMPI_MCA_mpi_yield_when_idle": "1"})


@pytest.mark.long
def test_under_pbs_it_saves_before_the_limit_and_submits_itself(job: dict[str, str], tmp_path: Path) -> None:
    variables = {"PBS_JOBID": "7", "PBS_O_WORKDIR": str(tmp_path), "PBS_NODEFILE": "hosts", "SPARE": "5"}
    variables |= {"SCRIPT": "other.py", "JOBFILE": "other.pbs"}
    (tmp_path / "train.py").rename(tmp_path / "other.py")
    command = ["bash", str(TEMPLATES / "train.pbs")]
    done = subprocess.run(
        command, env=job | variables, capture_output=True, text=True, timeout=patient(120.0), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.glob("began-*")} == {"began-0-of-2", "began-1-of-2"}
    assert (tmp_path / "asked").read_text() == "-v SCRIPT=other.py,JOBFILE=other.pbs,SPARE=5 other.pbs\n"


@pytest.mark.long
def test_under_lsf_it_exits_with_the_code_for_which_lsf_requeues(job: dict[str, str], tmp_path: Path) -> None:
    variables = {"LSB_JOBID": "7", "LSB_DJOB_NUMPROC": "2", "LSB_DJOB_HOSTFILE": "hosts"}
    template = TEMPLATES / "train.lsf"
    process = subprocess.Popen(["bash", template], env=job | variables, cwd=tmp_path, start_new_session=True)
    try:
        deadline = time.monotonic() + patient(60.0)
        while len(list(tmp_path.glob("began-*"))) < 2 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGUSR1)
        assert process.wait(patient(60.0)) == mpisign.REQUEUE_EXIT_CODE
    finally:
        Job(process, -1).end()
    assert f"\n#BSUB -Q {mpisign.REQUEUE_EXIT_CODE}\n" in template.read_text()


@pytest.mark.parametrize("name", ["train.pbs", "train.lsf"])
def test_without_the_scheduler_it_says_so(name: str) -> None:
    done = subprocess.run(
        ["bash", TEMPLATES / name], env={"PATH": os.defpath}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert re.search(r"is not set: submit this file with [bq]sub", done.stderr)
