"""mpisign.checkpoint on real ranks."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from checkpoints import MODES, full_disk, names
from methods_table import ALONE, FOUR
from resumable import Job, assert_equal

import mpisign
from mpisign import CheckpointError, ConsistencyError, Method, checkpoint

from .regroup import job_of

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi


def test_each_rank_gets_its_own_loss_scale(comm: MPI.Comm, folder: Path) -> None:
    job = Job().train(1)
    parts = {"model": job.model, "optimizer": job.optimizer}
    checkpoint.save(folder, **parts, step=1, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**comm.rank))
    scaler = torch.amp.GradScaler("cpu")
    checkpoint.load(folder, **parts, scaler=scaler)
    assert scaler.get_scale() == 2.0**comm.rank


# ---------------------------------------------------------------------------------------- other numbers of ranks


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("method", [*FOUR[:3], ALONE["dp_sign private"]], ids=lambda method: method.name)
@pytest.mark.parametrize("change", ["all to one", "one to all", "one less", "one more"])
def test_on_another_number_of_ranks(comm: MPI.Comm, folder: Path, method: Method, change: str) -> None:
    old, new = {
        "all to one": (comm.size, 1),
        "one to all": (1, comm.size),
        "one less": (comm.size, comm.size - 1),
        "one more": (comm.size - 1, comm.size),
    }[change]
    momenta, shared = [], None
    with job_of(comm, old) as inside:
        if inside:
            job = Job(method).train(5)
            job.save(folder)
            shared = {"model": job.model.state_dict(), "scheduler": job.scheduler.state_dict(), "lr": rates(job)}
            momenta.append([fields["momentum"].numpy() for _, fields in memory(job)] if method.memory.fields else [])
    momenta = [mine for mine in comm.allgather(momenta[0] if momenta else None) if mine is not None]
    shared = comm.bcast(shared)

    with job_of(comm, new) as inside:
        if inside:
            job = Job(method)
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                found = job.load(folder)
            said = [str(one.message) for one in warned]
            assert len(said) == (mpisign.rank() == 0)
            assert all(f"saved by {old} ranks and this job has {new}" in one for one in said)
            assert (found.step, found.ranks) == (5, old)

            after = [fields["momentum"].numpy() for _, fields in memory(job)]
            for ours, theirs in zip(after, zip(*momenta, strict=True), strict=True):
                mean = np.mean(np.stack(theirs).astype(np.float64), axis=0)
                assert np.array_equal(ours, mean.astype(ours.dtype))
            assert_equal(job.model.state_dict(), shared["model"])  # also the buffers: rank 0's
            assert_equal(job.scheduler.state_dict(), shared["scheduler"])
            assert rates(job) == shared["lr"]
            generators = mpisign.allgather_object(torch.get_rng_state().tolist())
            assert len({tuple(state) for state in generators}) == new, "ranks must not draw the same"
            job.train(8)
            assert job.optimizer.report.step == 7
            mpisign.check_consistency(job.model, job.optimizer, buffers=False)


def memory(job: Job) -> list[tuple[int, dict[str, torch.Tensor]]]:
    return sorted(job.optimizer.state_dict()["mpisign"]["memory"].items()) if job.optimizer.method.memory.fields else []


def rates(job: Job) -> list[float]:
    return [group["lr"] for group in job.optimizer.param_groups]


# ---------------------------------------------------------------------------------------------- trouble on a rank


@MODES
def test_a_full_disk_on_one_rank_is_an_error_on_all(comm: MPI.Comm, folder: Path, asynchronous: bool) -> None:
    job = Job().train(2)
    job.save(folder)
    first = job.everything()
    job.train(4)
    last = comm.size - 1

    def save() -> None:
        job.save(folder, asynchronous=asynchronous)
        checkpoint.wait()

    with full_disk(comm.rank == last), pytest.raises(CheckpointError) as refused:
        save()
    assert "step-00000004 is not saved, and earlier checkpoints are as they were" in str(refused.value)
    assert f"rank {last} on " in str(refused.value)
    assert "File too large" in str(refused.value)
    comm.Barrier()
    assert names(folder) == ["step-00000002"]
    job.load(folder)
    assert_equal(job.everything(), first)
    job.train(4)
    save()
    assert names(folder) == ["step-00000002", "step-00000004"]


@pytest.mark.mpi(min_size=2)
def test_a_background_save_is_complete_when_the_slowest_rank_is(comm: MPI.Comm, folder: Path) -> None:
    """The threads find each other without the ranks meeting, and a rank that has failed is waited for by nobody."""
    job = Job().train(1)
    job.save(folder, asynchronous=True)
    deadline = time.monotonic() + 60
    while not (folder / "step-00000001").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (folder / "step-00000001" / "manifest.json").exists()
    with full_disk(comm.rank == 1):
        job.save(folder, step=2, asynchronous=True)
        job.train(3)
        comm.Barrier()
        with pytest.raises(CheckpointError, match=r"checkpoint\.wait\(\): .*step-00000002 is not saved.*rank 1 on "):
            mpisign.shutdown()
    comm.Barrier()
    assert names(folder) == ["step-00000001"]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", ["shared.pt", "rank-00001.pt"])
def test_all_leave_a_damaged_checkpoint_out(comm: MPI.Comm, folder: Path, name: str) -> None:
    job = Job().train(2)
    job.save(folder)
    first = job.everything()
    job.train(4).save(folder)
    if comm.rank == comm.size - 1:
        with open(folder / "step-00000004" / name, "r+b") as file:
            file.seek(2000)
            file.write(b"?")
    comm.Barrier()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert job.load(folder).step == 2
    assert len(warned) == (comm.rank == 0)
    assert all(f"{name} is damaged" in str(one.message) for one in warned)
    assert_equal(job.everything(), first)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged.*load\('{folder}/step-00000002', \.\.\.\)"):
        job.load(folder / "step-00000004")


@pytest.mark.mpi(min_size=2)
def test_a_directory_that_another_rank_does_not_see(comm: MPI.Comm, folder: Path) -> None:
    job = Job().train(1)
    mine = folder / f"of-rank-{comm.rank}"
    mine.mkdir()
    with pytest.raises(CheckpointError, match=r"rank 1 on .*of-rank-1/\S+ here, which rank 0 has made.*share"):
        job.save(mine)
    comm.Barrier()
    assert names(mine) == []
    job.save(folder)
    with pytest.raises(CheckpointError, match=r"there is no good checkpoint in .*cannot be read.*\(rank [1-9] on "):
        job.load(folder if comm.rank == 0 else mine)


@pytest.mark.mpi(min_size=2)
def test_a_rank_with_another_model(comm: MPI.Comm, folder: Path) -> None:
    job = Job().train(1)
    job.save(folder)
    if comm.rank == 1:
        job.model.append(torch.nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match=r"(?s)step-00000001 does not fit: rank 1 on .*Missing key"):
        job.load(folder)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("option", ["step", "keep", "the optimizer's steps"])
def test_ranks_that_save_differently(comm: MPI.Comm, folder: Path, option: str) -> None:
    job = Job().train(1)
    odd = comm.size - 1
    options: dict[str, Any] = {} if option.startswith("the") else {option: 7 + (comm.rank == odd)}
    if option.startswith("the") and comm.rank == odd:
        state = job.optimizer.state_dict()
        job.optimizer.load_state_dict({**state, "mpisign": {**state["mpisign"], "step": 9}})
    with pytest.raises(ConsistencyError, match=rf"checkpoint\.save\(\): ranks \[{odd}\] differ from .* in {option}"):
        job.save(folder, **options)
    comm.Barrier()
    assert names(folder) == []


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_does_not_save(comm: MPI.Comm, folder: Path) -> None:
    job = Job().train(1)
    call = mpisign.barrier if comm.rank == 1 else lambda: job.save(folder)
    with pytest.raises(ConsistencyError, match=r"ranks \[1\] are in barrier\(\).*are in checkpoint\.save\(\)"):
        call()


def test_all_agree_on_the_newest(comm: MPI.Comm, folder: Path) -> None:
    assert checkpoint.newest(folder) is None
    Job().train(1).save(folder)
    assert checkpoint.newest(folder) == folder / "step-00000001"
    nowhere = folder if comm.rank == 0 else folder / "nowhere"
    assert checkpoint.newest(nowhere) == nowhere / "step-00000001", "rank 0 looks, and says the name"
