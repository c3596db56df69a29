"""Jobs that lose their nodes on a real SLURM: they save in time, come back, and end with the same bits as others."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime

import pytest
import torch
from cluster import SLURM, SMALL, Cluster, Job, Submit, on
from mpirun import patient, wait_until
from resumable import assert_equal

pytestmark = pytest.mark.long

TRAIN = (SLURM / "train_cpu.sbatch", SMALL, "--quiet", "--epochs", "1")
SLOW = ("--pause", "0.3")

Measured = Callable[[str], None]


def final(job: Job) -> dict[str, object]:
    """All that the last checkpoint has: parameters, each rank's momentum and generators, losses; but no times."""
    folder = job.folder / "out" / f"mpisign-{job.number}" / "checkpoints" / "step-00000040"
    files = sorted(folder.glob("*.pt"))
    assert len(files) == 3
    content = {path.name: torch.load(path, weights_only=True) for path in files}
    assert content["shared.pt"]["extra"]["options"].pop("pause")
    assert len(content["shared.pt"]["extra"]["history"].pop("seconds")) == 40
    return content


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("undisturbed")
    job = cluster.submit(folder, *on(2), *TRAIN)
    job.wait()
    return final(job)


@pytest.fixture(scope="module", autouse=True)
def at_its_limit(cluster: Cluster, undisturbed: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """A job of one minute. SLURM warns it in the second half: let it wait for that while other tests run elsewhere."""
    limits = ("--time=1", "--signal=B:USR1@1", f"--nodelist={','.join(cluster.nodes[2:])}")
    job = cluster.submit(tmp_path_factory.mktemp("limit"), *on(2), *limits, *TRAIN, "--pause", "3")
    yield job
    job.cancel()


def assert_went_on(job: Job, undisturbed: dict[str, object]) -> None:
    """In a second start, not from its beginning, to the same bits."""
    text = job.wait()
    assert job.shown("Restarts") == ["1"]
    assert len(re.findall("trains at", text)) == 2
    assert_equal(final(job), undisturbed)


def test_warned_it_saves_and_requeues_itself(
    submit: Submit, undisturbed: dict[str, object], measured: Measured
) -> None:
    job = submit(*on(2), *TRAIN, *SLOW)
    job.wait_for("trains at")
    time.sleep(1)  # some steps
    warned = time.time()
    job.warn()
    job.wait_for("requeueing")
    requeued = time.time()
    assert_went_on(job, undisturbed)
    assert re.search(r"stopped by a signal; step \d+ of 40 is saved", job.text())
    assert "the ranks stopped with exit code 85: requeueing job" in job.text()
    began = datetime.fromisoformat(job.shown("StartTime")[0]).timestamp()
    trained = float(re.findall(r"trains at (\S+)", job.text())[-1])
    measured(
        f"2 ranks: from the warning to requeued {requeued - warned:.1f} s, in the queue "
        f"{began - requeued:.0f} s, from the start to training {trained - began:.1f} s"
    )


def test_preempted(submit: Submit, undisturbed: dict[str, object]) -> None:
    """By a job that is more urgent: the ranks get SIGTERM, the batch script nothing, and the job is out of the way."""
    job = submit(*on(2), *TRAIN, *SLOW)
    job.wait_for("trains at")
    there = ("--partition=urgent", "--exclusive", f"--nodelist={job.shown('NodeList')[0]}")
    submit(*on(2), *there, "--output=urgent-%j.out", "--wrap", "sleep 1").wait()
    assert_went_on(job, undisturbed)
    assert re.search(r"stopped by a signal; step \d+ of 40 is saved", job.text())


def node_of_rank_1(job: Job) -> str:
    """Where it runs, as soon as four steps are saved."""
    saved = job.folder / "out" / f"mpisign-{job.number}" / "checkpoints" / "step-00000004"
    wait_until(saved.is_dir, patient(60.0))
    assert saved.is_dir(), job.text()
    return re.findall(r"rank 1 of 2 on (\S+)", job.text())[0]


def test_a_node_goes_down(submit: Submit, cluster: Cluster, undisturbed: dict[str, object]) -> None:
    """SLURM starts the job again when the node is back."""
    job = submit(*on(2), *TRAIN, *SLOW, MPISIGN_SAVE_EVERY="2")
    node = node_of_rank_1(job)
    cluster.crash(node)
    wait_until(lambda: job.shown("JobState") != ["RUNNING"], patient(60.0))
    assert job.shown("JobState") != ["RUNNING"], job.text()
    cluster.start_node(node)
    cluster.wait_for_nodes()
    assert_went_on(job, undisturbed)


def test_mpirun_loses_a_node(submit: Submit, cluster: Cluster, undisturbed: dict[str, object]) -> None:
    """Sooner than SLURM, and ends with exit code 0 as if all were well."""
    job = submit(*on(2), *TRAIN, *SLOW, MPISIGN_SAVE_EVERY="2", MPISIGN_LAUNCHER="mpirun")
    cluster.kill_on(node_of_rank_1(job), "prted")
    assert_went_on(job, undisturbed)
    assert "lost communication with a remote daemon" in job.text()


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_cancelled_it_is_gone(submit: Submit, cluster: Cluster, launcher: str) -> None:
    """No process stays, and it does not come back."""
    job = submit(*on(2), *TRAIN, *SLOW, MPISIGN_LAUNCHER=launcher)
    job.wait_for("trains at")
    assert len(cluster.processes(job.number)) >= 4, "the script, the launcher and two ranks"
    job.cancel()
    job.wait("CANCELLED")
    wait_until(lambda: not cluster.processes(job.number), patient(60.0))
    assert cluster.processes(job.number) == []
    assert job.shown("Restarts") == ["0"]


def test_a_sweep_is_a_job_for_each_value(submit: Submit) -> None:
    """And one comes back without the other."""
    sweep = (*on(1), "--array=0-1", SLURM / "sweep.sbatch", SMALL, "--quiet", "--pause", "0.3")
    job = submit(*sweep, MPISIGN_SWEEP="--batch-size 8 16")
    wait_until(lambda: job.text().count("trains at") == 2, patient(60.0))
    assert job.text().count("trains at") == 2, job.text()
    job.warn("_0")
    job.wait()
    assert sorted(job.shown("Restarts")) == ["0", "1"]
    results = job.folder / "out" / f"sweep-{job.number}"
    assert sorted(path.name for path in results.iterdir()) == ["batch-size-16", "batch-size-8"]
    assert (results / "batch-size-8" / "checkpoints" / "step-00000080").is_dir()
    assert (results / "batch-size-16" / "checkpoints" / "step-00000040").is_dir()


def test_mpirun_passes_the_warning_on(submit: Submit) -> None:
    """And a training does not come back for ever."""
    job = submit(*on(2), *TRAIN, *SLOW, MPISIGN_LAUNCHER="mpirun", MPISIGN_MAX_RESTARTS="0")
    job.wait_for("trains at")
    job.warn()
    text = job.wait("FAILED")
    assert re.search(r"stopped by a signal; step \d+ of 40 is saved", text)
    out = job.folder / "out" / f"mpisign-{job.number}"
    assert f"exit code 85, after MPISIGN_MAX_RESTARTS=0 restarts. To go on: MPISIGN_OUT={out} sbatch" in text


def test_a_training_that_fails_by_itself_does_not_come_back(submit: Submit) -> None:
    job = submit(*on(1), *TRAIN, "--batch-size", "none")
    text = job.wait("FAILED")
    assert "'none' is not a whole number from 1 up" in text
    assert "the training failed with exit code 2; its messages are above. To go on: MPISIGN_OUT=" in text
    assert job.shown("Restarts") == ["0"]


def test_the_time_limit(at_its_limit: Job, undisturbed: dict[str, object]) -> None:
    at_its_limit.wait_for("SLURM wants the nodes back", timeout=90.0)
    assert_went_on(at_its_limit, undisturbed)
    assert re.search(r"stopped by a signal; step \d+ of 40 is saved", at_its_limit.text())
