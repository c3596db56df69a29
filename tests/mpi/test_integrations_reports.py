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


def test_local_steps_have_a_row_an_exchange(comm: MPI.Comm, folder: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(40))
    optimizer = mpisign.DistributedSignOptimizer(
        torch.optim.SGD([parameter], lr=0.1), method=mpisign.scaled_vote(), every=3
    )
    with write_reports(optimizer, folder / "steps.csv" if comm.rank == 0 else None):
        for _ in range(8):
            parameter.grad = torch.ones(40)
            optimizer.step()
    mpisign.barrier()
    with open(folder / "steps.csv", newline="") as file:
        assert [float(row["step"]) for row in csv.DictReader(file)] == [0, 1]


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


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases(comm: MPI.Comm, folder: Path) -> None:
    """A real run, which keeps what it is told in a folder."""
    wandb = pytest.importorskip("wandb")
    if comm.rank:
        steps(3, None)
        return
    settings = wandb.Settings(silent=True, x_disable_stats=True)
    with wandb.init(mode="offline", dir=str(folder), project="mpisign", settings=settings) as run:
        told = steps(3, run)
        assert run.step == told[-1]["step"]
        for key in told[-2].keys() - {"step"}:  # it takes a step for complete when the next one comes
            assert run.summary[f"mpisign/{key}"] == told[-2][key]


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
