"""mpisign.checkpoint.local on real ranks: local steps go on bit for bit, also within a window, and on other numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from resumable import Job, assert_equal, assert_resuming_is_exact, assert_states_are_enough

import mpisign
from mpisign import Method

from .adam_steps import AdamJob, nesterov
from .regroup import job_of

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("every", [1, 2, 4])  # of six steps, of which two are before the save
@pytest.mark.parametrize(
    "method", [mpisign.scaled_vote(), mpisign.double_squeeze(), mpisign.top_k(0.2)], ids=lambda method: method.name
)
def test_resuming_is_exact(folder: Path, method: Method, every: int) -> None:
    assert_resuming_is_exact(folder, lambda: AdamJob(method, every, outer=nesterov))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_of_ranks_are_enough(comm: MPI.Comm, tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / f"rank{comm.rank}.pt"
    assert_states_are_enough(file, lambda: AdamJob(mpisign.scaled_vote(0.5), 4, dtype=dtype))


def test_the_model_in_a_checkpoint_is_the_common_one(comm: MPI.Comm, folder: Path) -> None:
    job = AdamJob(mpisign.mean(), 4).train(6)
    saved = job.save(folder)
    weights = torch.load(saved / "shared.pt", weights_only=True)["model"]
    with job.optimizer.common_parameters():
        for name, parameter in job.model.named_parameters():
            assert torch.equal(weights[name], parameter), name
    own = torch.load(saved / f"rank-{comm.rank:05d}.pt", weights_only=True)
    for name, parameter in job.model.named_parameters():
        assert torch.equal(own["parameters"][name], parameter), name
    job.train(8)
    job.save(folder)
    assert torch.load(folder / "step-00000008" / f"rank-{comm.rank:05d}.pt", weights_only=True)["parameters"] == {}


class Wrapped:
    """An optimizer as Accelerate hands it on, which has a few of its methods and nothing else."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.state_dict, self.load_state_dict = optimizer.state_dict, optimizer.load_state_dict


def test_through_a_wrapper(folder: Path) -> None:
    """In the middle of a window, where ranks differ."""
    job, other = (AdamJob(mpisign.mean(), 4) for _ in range(2))
    job.train(6)
    mpisign.checkpoint.save(folder, model=job.model, optimizer=Wrapped(job.optimizer), step=6)
    mpisign.checkpoint.load(folder, model=other.model, optimizer=Wrapped(other.optimizer))
    assert_equal(other.model.state_dict(), job.model.state_dict())
    assert_equal(other.optimizer.state_dict(), job.optimizer.state_dict())


@pytest.mark.parametrize("ranks", ["as many", "fewer"])
@pytest.mark.parametrize("who", ["the model alone", "a plain optimizer", "votes on gradients"])
def test_without_local_steps_all_get_what_is_common(comm: MPI.Comm, folder: Path, who: str, ranks: str) -> None:
    """From the middle of a window, in which each rank's parameters and optimizer are its own."""
    saving = AdamJob(mpisign.mean(), 4).train(6)
    saving.save(folder)
    with saving.optimizer.common_parameters():
        common = [p.detach().clone() for p in saving.model.parameters()]
    with job_of(comm, comm.size if ranks == "as many" else max(1, comm.size - 1)) as inside:
        if not inside:
            return
        model = AdamJob(mpisign.mean(), 4).model
        adam = torch.optim.AdamW(model.parameters(), lr=0.01)
        optimizer: Any = None if who == "the model alone" else adam
        if who == "votes on gradients":
            optimizer = mpisign.DistributedSignOptimizer(adam, model.named_parameters(), method=mpisign.mean())
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            mpisign.checkpoint.load(folder, model=model, optimizer=optimizer)
        said = " ".join(str(one.message) for one in warned)
        assert ("saved with every=" in said) == (optimizer is not None and mpisign.rank() == 0)
        assert all(torch.equal(p, its) for p, its in zip(model.parameters(), common, strict=True))
        if optimizer is None:
            return
        for at in range(3):  # on the same gradients, as a plain optimizer exchanges nothing
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, at - 1.0)
            optimizer.step()
        mpisign.check_consistency(model, buffers=False)
        assert float(adam.state[next(model.parameters())]["step"]) == 9


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("build", [lambda: AdamJob(mpisign.mean(), 4), lambda: Job(mpisign.monna(0))])
def test_schedules_of_ranks_may_differ(comm: MPI.Comm, folder: Path, build: Callable[[], Any]) -> None:
    """As after a loss of a rank's own, by which its rate falls."""
    job = build().train(1)
    for _ in range(comm.rank):
        job.scheduler.step()
    before = job.scheduler.state_dict()
    job.save(folder)
    other = build()
    other.load(folder)
    assert other.scheduler.state_dict() == before
    assert other.optimizer.param_groups[0]["lr"] == job.optimizer.param_groups[0]["lr"]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("fewer", [True, False])
@pytest.mark.parametrize("steps", [4, 5])
def test_on_another_number_of_ranks(comm: MPI.Comm, folder: Path, steps: int, fewer: bool) -> None:
    """At a window's end all goes on; what was done in a window that had begun is given up, with a warning."""
    old, new = (comm.size, comm.size - 1) if fewer else (comm.size - 1, comm.size)
    told, adams = None, None
    with job_of(comm, old) as inside:
        if inside:
            job = AdamJob(mpisign.scaled_vote(), 2, outer=nesterov).train(steps)
            job.save(folder)
            adams = job.optimizer.wrapped.state_dict()["state"][0]["exp_avg"]
            with job.optimizer.common_parameters():
                told = [p.detach().clone() for p in job.model.parameters()]
    told, adams = comm.bcast(told), comm.allgather(adams)
    with job_of(comm, new) as inside:
        if inside:
            job = AdamJob(mpisign.scaled_vote(), 2, outer=nesterov)
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                job.load(folder)
            said = " ".join(str(one.message) for one in warned)
            assert ("at most 1 steps" in said) == (steps == 5 and mpisign.rank() == 0)
            assert all(torch.equal(p, its) for p, its in zip(job.model.parameters(), told, strict=True))
            mine = job.optimizer.wrapped.state_dict()["state"][0]["exp_avg"]
            assert torch.equal(mine, adams[mpisign.rank() % old])
            mpisign.check_consistency(job.model, job.optimizer, buffers=False)
            job.train(steps + 2)
            mpisign.check_consistency(job.model, job.optimizer, buffers=False)
