"""mpisign.integrations.reports on real ranks: what is written, and where."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mpisign
from mpisign.integrations.reports import write_reports

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.mpi, pytest.mark.few]


def steps(count: int, to: Any, **options: Any) -> list[dict[str, float]]:
    """What the reports of the steps say."""
    parameter = torch.nn.Parameter(torch.zeros(40))
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=0.1))
    told = []
    with write_reports(optimizer, to, **options):
        for _ in range(count):
            parameter.grad = torch.ones(40)
            optimizer.step()
            assert optimizer.report is not None
            told.append(optimizer.report.as_dict())
    parameter.grad = torch.ones(40)
    optimizer.step()  # which nobody writes
    return told


def test_a_file_of_rank_0s_numbers(comm: MPI.Comm, folder: Path) -> None:
    told = steps(5, folder / "steps.csv" if comm.rank == 0 else None, every=2)
    mpisign.barrier()
    with open(folder / "steps.csv", newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert [row["step"] for row in rows] == [1, 3]
    if comm.rank == 0:
        assert rows == [told[1], told[3]]


def test_tensorboard(comm: MPI.Comm, folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    if comm.rank == 0:
        with SummaryWriter(folder) as writer:
            told = steps(3, writer)
        found = EventAccumulator(str(folder)).Reload()
        assert [(its.step, its.value) for its in found.Scalars("mpisign/bytes_sent")] == [
            (row["step"], row["bytes_sent"]) for row in told
        ]
        assert "mpisign/step" not in found.Tags()["scalars"]
    else:
        steps(3, None)


class Run:
    """What W&B's run has of all that it is used for here."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []

    def log(self, data: dict[str, float], step: int) -> None:
        self.logged.append((data, step))


def test_what_logs_as_wandb_does(comm: MPI.Comm) -> None:
    run = Run()
    told = steps(2, run)
    assert len(run.logged) == (2 if comm.rank == 0 else 0)
    for (data, step), row in zip(run.logged, told, strict=False):
        assert step == row["step"]
        assert data == {f"mpisign/{key}": value for key, value in row.items() if key != "step"}


def test_what_is_refused(comm: MPI.Comm) -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=0.1))
    with pytest.raises(mpisign.OptionError, match="every"):
        write_reports(optimizer, None, every=0)
    with pytest.raises(mpisign.OptionError, match="SGD has no reports"):
        write_reports(optimizer.wrapped, "x")  # type: ignore[arg-type]
    if comm.rank == 0:
        with pytest.raises(mpisign.OptionError, match="no path of a CSV file"):
            write_reports(optimizer, 3)
