"""With MPISIGN_ON_FAILURE=continue a job outlives its ranks, and with --no-kill it goes on without a node."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import SLURM, SMALL, Cluster, Job, Submit, on, read
from mpirun import patient, wait_until

pytestmark = pytest.mark.long

TRAIN = ("--no-kill", SLURM / "train_cpu.sbatch", SMALL, "--quiet", "--epochs", "1", "--pause", "0.6")
SETTINGS = {"MPISIGN_ON_FAILURE": "continue", "MPISIGN_SAVE_EVERY": "2"}


def checkpoints(job: Job) -> Path:
    return job.folder / "out" / f"mpisign-{job.number}" / "checkpoints"


def log(job: Job) -> list[dict[str, str]]:
    with open(checkpoints(job).with_name("train.csv")) as file:
        return list(csv.DictReader(file))


def wait_for_steps(job: Job) -> None:
    """Until four are saved."""
    saved = checkpoints(job) / "step-00000004"
    wait_until(lambda: saved.is_dir() or job.ended(), patient(60.0))
    assert saved.is_dir(), job.text()
    assert not job.ended(), job.text()


def kill_rank(job: Job, rank: int) -> None:
    """The process that trains, not the shell around it."""
    for pid in job.cluster.processes(job.number):
        if f"OMPI_COMM_WORLD_RANK={rank}\0" in read(pid, "environ") and "python" in read(pid, "comm"):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def crashed(cluster: Cluster, job: Job, rank: int, *, noticed: bool = True) -> Iterator[None]:
    """Without the node of a rank; SLURM may notice it at the end."""
    (node,) = re.findall(rf"rank {rank} of 3 on (\S+)", job.text())
    cluster.crash(node, noticed=noticed)
    try:
        yield
    finally:
        cluster.mark_down(node)
        cluster.start_node(node)
        cluster.wait_for_nodes()


def test_a_rank_dies_and_the_others_train_to_the_end(submit: Submit) -> None:
    """In one start, though it was rank 0, which writes checkpoints and logs."""
    job = submit(*on(3), *TRAIN, **SETTINGS)
    wait_for_steps(job)
    kill_rank(job, 0)
    text = job.wait()
    assert "the job has outlived rank 0, ended by SIGKILL" in text
    assert len(re.findall("trains at", text)) == 1
    assert job.shown("Restarts") == ["0"]
    last = checkpoints(job) / "step-00000027"
    assert sorted(path.name for path in last.glob("rank-*.pt")) == ["rank-00000.pt", "rank-00001.pt"]
    steps = [int(row["step"]) for row in log(job)]
    assert steps == sorted(set(steps))
    assert steps[-1] == 27


@pytest.mark.parametrize("noticed", [True, False])
def test_a_node_goes_down_and_the_others_go_on(submit: Submit, cluster: Cluster, noticed: bool) -> None:
    """In the same allocation, from the newest checkpoint, whether SLURM knows already or not."""
    job = submit(*on(3), *TRAIN, **SETTINGS)
    wait_for_steps(job)
    with crashed(cluster, job, 1, noticed=noticed):
        job.wait_for("mpisign: finished", 120.0)
    text = job.wait()
    assert "2 of 3 nodes are left: going on with 2 ranks, from the newest checkpoint" in text
    rows = log(job)
    assert rows[0]["epoch"] == f"{2 / 27:.6f}", "a start from the beginning would have taken it back"
    assert rows[-1]["step"] == "40"
    assert len(re.findall("trains at", text)) == 2
    assert job.shown("Restarts") == ["0"]
    assert (checkpoints(job) / "step-00000040" / "rank-00001.pt").exists()


def test_the_first_node_goes_down_and_the_job_comes_back(submit: Submit, cluster: Cluster) -> None:
    """SLURM alone would keep the others until the time limit."""
    job = submit(*on(3), *TRAIN, **SETTINGS)
    wait_for_steps(job)
    with crashed(cluster, job, 0):
        wait_until(lambda: job.shown("Restarts") == ["1"], patient(60.0))
        assert job.shown("Restarts") == ["1"], job.text()
    text = job.wait()
    assert len(re.findall("trains at", text)) == 2
    assert (checkpoints(job) / "step-00000027" / "rank-00002.pt").exists()


def test_warned_after_a_death_it_saves_and_comes_back_with_all(submit: Submit) -> None:
    job = submit(*on(3), *TRAIN, **SETTINGS)
    wait_for_steps(job)
    kill_rank(job, 2)
    job.wait_for("have died")
    job.warn()
    text = job.wait()
    assert re.search(r"stopped by a signal; step \d+ of 27 is saved", text)
    assert "saved by 2 ranks and this job has 3" in text
    assert job.shown("Restarts") == ["1"]


REFUSED = {
    "a word": ({"MPISIGN_ON_FAILURE": "ignore"}, "MPISIGN_ON_FAILURE=ignore is none of abort, continue"),
    "srun": ({"MPISIGN_LAUNCHER": "srun"}, "needs mpirun, as SLURM ends a step .* leave out MPISIGN_LAUNCHER=srun"),
    "a container": ({"MPISIGN_CONTAINER": "env"}, "in a container here: leave out MPISIGN_CONTAINER, or take abort"),
}


@pytest.mark.parametrize(("settings", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work(submit: Submit, settings: dict[str, str], said: str) -> None:
    assert re.search(said, submit(*on(1), *TRAIN, **(SETTINGS | settings)).wait("FAILED"))
