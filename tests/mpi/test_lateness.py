"""mpisign.lateness on real ranks, of which one sleeps before each step."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import pytest
import torch

import mpisign
from mpisign.lateness import WINDOW

if TYPE_CHECKING:
    from mpi4py import MPI

SLEEP = 0.06


@pytest.mark.few
@pytest.mark.mpi(min_size=2)
def test_the_rank_that_sleeps_is_named(comm: MPI.Comm, caplog: pytest.LogCaptureFixture) -> None:
    """And that costs no byte."""
    sleeper = comm.size - 1
    for _ in range(3):  # where others compute, another may be late for longer
        caplog.clear()
        parameter = torch.nn.Parameter(torch.zeros(10))
        optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=0.1))
        sent = set()
        with caplog.at_level(logging.WARNING, "mpisign.lateness"):
            for step in range(2 * WINDOW + 2):
                if comm.rank == sleeper:
                    time.sleep(SLEEP)
                parameter.grad = torch.ones(10)
                optimizer.step()
                report = optimizer.report
                assert report is not None
                sent.add(report.bytes_sent)
                assert step >= WINDOW or report.waited_for is None
        if report.waited_for == sleeper:
            break
    assert report.waited_for == sleeper
    assert 0.1 < report.waited_share <= 1
    assert len(set(comm.allgather((report.waited_for, report.waited_share)))) == 1
    assert len(sent) == 1
    named = f"the others wait for rank {sleeper}: from step 0 to {2 * WINDOW - 1}"
    assert [record.getMessage().startswith(named) for record in caplog.records] == [True] * (comm.rank in (0, sleeper))


@pytest.mark.few
@pytest.mark.mpi(min_size=2)
def test_a_rank_that_has_joined_is_not_waited_for(comm: MPI.Comm) -> None:
    parameter = torch.nn.Parameter(torch.zeros(10))
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=0.1))
    for _ in range(10 if comm.rank == 0 else WINDOW + 5):
        parameter.grad = torch.ones(10)
        optimizer.step()
    optimizer.join()
    report = optimizer.report
    assert report is not None
    assert report.waited_for != 0
