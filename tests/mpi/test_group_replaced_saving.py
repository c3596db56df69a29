"""Checkpoints around a change of the group: of those who stay, and of those who have begun them."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from checkpoints import names
from resumable import Job, assert_equal

import mpisign
from mpisign import CheckpointError, Method, checkpoint

from .regroup import LEAVERS, part

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi(min_size=2)

WHO = pytest.mark.parametrize("leaver", LEAVERS.values(), ids=LEAVERS)
MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in the background"])


@pytest.fixture
def folder(comm: MPI.Comm, tmp_path: Path) -> Path:
    """The same on all ranks."""
    shared: Path = comm.bcast(tmp_path)
    return shared


@contextmanager
def full_disk(full: bool) -> Iterator[None]:
    """If ``full``, no file of this process may grow beyond 1000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if full else soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()


@WHO
@MODES
@pytest.mark.parametrize("stepping", [False, True], ids=["before a step", "after a step"])
@pytest.mark.parametrize(
    "method", [mpisign.signum(), mpisign.ef21(0.1), mpisign.double_squeeze()], ids=lambda m: m.name
)
def test_those_who_stay_save_and_resume_without_the_others(
    comm: MPI.Comm, folder: Path, leaver: int, asynchronous: bool, stepping: bool, method: Method
) -> None:
    job = Job(method).train(2)
    stays = part([leaver])
    if stays:
        job.train(4 if stepping else 2).save(folder, asynchronous=asynchronous)
        checkpoint.wait()
        expected = job.everything()
        saved = folder / f"step-{job.step:08d}"
        ranks = [f"rank-{rank:05d}.pt" for rank in range(mpisign.size())]
        assert names(saved) == ["manifest.json", *ranks, "shared.pt"]
        job.train(6)
        loaded = Job(method)
        loaded.sampler = job.sampler  # it is the user's, and still shares the data among all
        assert loaded.load(folder).ranks == mpisign.size()
        assert_equal(loaded.everything(), expected)
        loaded.train(6)
        assert_equal(loaded.optimizer.state_dict(), job.optimizer.state_dict())
        assert_equal(loaded.model.state_dict(), job.model.state_dict())


@WHO
def test_a_new_job_of_as_many_goes_on_from_it(comm: MPI.Comm, folder: Path, leaver: int) -> None:
    job = Job().train(2)
    stays = part([leaver])
    if stays:
        job.train(3).save(folder)
    expected = job.everything()
    mpisign.shutdown()
    rest = comm.Split(int(stays), comm.rank)
    if stays:
        mpisign.init(rest)
        resumed = Job()
        assert resumed.load(folder).ranks == comm.size - 1
        assert_equal(resumed.everything(), expected)
        mpisign.shutdown()
    rest.Free()


@WHO
def test_a_save_is_finished_by_those_who_stay(comm: MPI.Comm, folder: Path, leaver: int) -> None:
    """It has been begun by all, and is of all; who has left had done its part."""
    job = Job().train(2)
    job.save(folder, asynchronous=True)
    wait_for(folder / "step-00000002")
    stays = part([leaver])
    checkpoint.wait()
    if stays:
        ranks = [f"rank-{rank:05d}.pt" for rank in range(comm.size)]
        assert names(folder / "step-00000002") == ["manifest.json", *ranks, "shared.pt"]
        job.train(3).save(folder)
        assert names(folder) == ["step-00000002", "step-00000003"]


@WHO
def test_a_save_in_which_a_part_is_missing_is_none(comm: MPI.Comm, folder: Path, leaver: int) -> None:
    """All who stay hear of it, and can save again."""
    job = Job().train(2)
    job.save(folder)
    job.train(3)
    gone = leaver % comm.size
    with full_disk(comm.rank == gone):
        job.save(folder, asynchronous=True)
        comm.Barrier()
        stays = part([leaver])
        said = "File too large" if not stays else rf"step-00000003 is not saved.*rank {gone} has left before"
        with pytest.raises(CheckpointError, match=said):
            checkpoint.wait()
    comm.Barrier()
    assert [name for name in names(folder) if not name.endswith(".tmp")] == ["step-00000002"]
    comm.Barrier()
    if stays:
        job.save(folder)
        assert names(folder) == ["step-00000002", "step-00000003"]


@WHO
def test_all_wait_before_they_part(comm: MPI.Comm, folder: Path, leaver: int) -> None:
    """As the documentation says; then nothing is left to be done when they leave."""
    job = Job().train(2)
    job.save(folder, asynchronous=True)
    checkpoint.wait()
    stays = part([leaver])
    if stays:
        job.train(3).save(folder, asynchronous=True)
    mpisign.shutdown()
    comm.Barrier()
    assert names(folder) == ["step-00000002", "step-00000003"]
