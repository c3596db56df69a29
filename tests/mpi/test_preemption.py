"""mpisign.preemption on real ranks: one is told, all know after the same step."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from resumable import Job

import mpisign

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi

MEETINGS: dict[str, Callable[[Job, Path], object]] = {
    "step": lambda job, folder: job.train(job.step + 1),
    "barrier": lambda job, folder: mpisign.barrier(),
    "save": lambda job, folder: job.save(folder),
    "broadcast_object": lambda job, folder: mpisign.broadcast_object(None),
}


@pytest.mark.parametrize("meet", MEETINGS.values(), ids=MEETINGS)
def test_all_know_after_they_have_met(comm: MPI.Comm, tmp_path: Path, meet: Callable[[Job, Path], object]) -> None:
    folder = comm.bcast(tmp_path)
    mpisign.stop_on_signal()
    job = Job()
    meet(job, folder)
    assert not mpisign.stop_requested()
    if comm.rank == comm.size - 1:
        signal.raise_signal(signal.SIGUSR1)
    assert not mpisign.stop_requested()
    for _ in range(2):
        meet(job, folder)
        assert mpisign.stop_requested()


def test_all_stop_at_the_same_step(comm: MPI.Comm) -> None:
    """Though the ranks are told at different steps."""
    mpisign.stop_on_signal()
    job = Job()
    while not mpisign.stop_requested():
        if job.step == 3 + comm.rank:
            signal.raise_signal(signal.SIGTERM)
        job.train(job.step + 1)
    assert comm.allgather(job.step) == [4] * comm.size


def test_it_travels_for_nothing(comm: MPI.Comm) -> None:
    job = Job().train(2)
    before = job.optimizer.report.bytes_sent
    mpisign.stop_on_signal()
    signal.raise_signal(signal.SIGUSR1)
    job.train(3)
    assert mpisign.stop_requested()
    assert job.optimizer.report.bytes_sent == before
    assert job.optimizer.join() == 0, "the numbers of a call arrive as they were"
