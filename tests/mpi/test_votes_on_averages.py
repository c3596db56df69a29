"""Gradients that are the same on all ranks before the vote are noticed, and so are DDP and FSDP."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import distributed, nn
from torch.distributed import fsdp
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import mpisign
from mpisign import DistributedSignOptimizer
from mpisign.averages import warn_of_averaging

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi(min_size=2)

STEPS = 5


def model_of(inputs: int = 20) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, 4))


def train(model: nn.Module, seed: int, method: mpisign.Method | None = None, steps: int = STEPS) -> None:
    optimizer = DistributedSignOptimizer(SGD(model.parameters(), lr=1e-3), method=method)
    generator = torch.Generator().manual_seed(seed)
    inputs = next(model.parameters()).shape[1]
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, inputs, generator=generator)).square().mean().backward()
        optimizer.step()
    assert optimizer.report is not None
    assert not optimizer.report.skipped


@pytest.fixture
def gloo(comm: MPI.Comm, folder: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=comm.rank, world_size=comm.size)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("method", [mpisign.signum(), mpisign.noisy_signsgd(0.1), mpisign.mean()], ids=str)
def test_the_same_data_on_every_rank(comm: MPI.Comm, method: mpisign.Method) -> None:
    """Whatever the ballots are: dead units toss coins, and noise is each rank's own."""
    with pytest.warns(
        UserWarning, match=r"gradients of all ranks were the same.*DistributedSampler.*ddp\.no_sync"
    ) as said:
        train(model_of(), seed=0, method=method, steps=12)
    assert len([it for it in said if "were the same" in str(it.message)]) == 1


@pytest.mark.parametrize(
    "method", [mpisign.dp_sign(1.0, 0.1), mpisign.ternary_vote(1.0, 1.0, private=True)], ids=lambda method: method.name
)
def test_private_votes_tell_nothing_of_gradients(comm: MPI.Comm, method: mpisign.Method) -> None:
    """So that nobody can say whether they are the same; also where one parameter group alone has such a method."""
    train(model_of(), seed=0, method=method)
    model = model_of()
    groups = [{"params": model[:2].parameters()}, {"params": model[2].parameters(), "method": method}]
    optimizer = DistributedSignOptimizer(SGD(groups, lr=1e-3))
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.ones(8, 20)).square().mean().backward()
        optimizer.step()


def test_data_of_ones_own_on_every_rank(comm: MPI.Comm) -> None:
    train(model_of(), seed=comm.rank)


def test_models_too_small_to_tell(comm: MPI.Comm) -> None:
    train(nn.Linear(3, 2), seed=0)


def test_gradients_that_are_zero_everywhere(comm: MPI.Comm) -> None:
    model = model_of()
    optimizer = DistributedSignOptimizer(SGD(model.parameters(), lr=1e-3))
    for _ in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


def test_two_steps_are_an_accident(comm: MPI.Comm) -> None:
    model = model_of()
    optimizer = DistributedSignOptimizer(SGD(model.parameters(), lr=1e-3))
    for step in range(9):
        generator = torch.Generator().manual_seed(step if step % 3 else 1000 * comm.rank + step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.usefixtures("gloo")
def test_ddp_averages_before_the_vote(comm: MPI.Comm) -> None:
    """Also where it has taken the model after the optimizer, as Accelerate does."""
    model = model_of()
    optimizer = DistributedSignOptimizer(SGD(model.parameters(), lr=1e-3))
    ddp = DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(comm.rank)
    texts = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        ddp(torch.randn(8, 20, generator=generator)).square().mean().backward()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer.step()
        texts += [str(it.message) for it in said]
    assert ["DistributedDataParallel module" in text for text in texts] == [True, False]
    assert "Do not wrap the model (train ddp.module; with Lightning pass MpisignStrategy()" in texts[0]
    assert ["the gradients of all ranks were the same" in text for text in texts] == [False, True]


@pytest.mark.usefixtures("gloo")
def test_ddp_of_another_model_and_of_one_process_are_no_matter(comm: MPI.Comm) -> None:
    """The groups of one process each are what somebody has who starts Lightning with devices=1."""
    other = DistributedDataParallel(nn.Linear(3, 2))
    groups = [distributed.new_group([rank]) for rank in range(comm.size)]
    model = model_of()
    alone = DistributedDataParallel(model, process_group=groups[comm.rank])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, seed=comm.rank)
    del other, alone


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("kind", ["flat", "original", "fully_shard"])
def test_fsdp_shards_and_averages(comm: MPI.Comm, kind: str) -> None:
    model = model_of()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        if kind == "fully_shard":
            if not hasattr(fsdp, "fully_shard"):
                pytest.skip("this torch has none")
            fsdp.fully_shard(model)
        else:
            cpu = torch.device("cpu")
            model = fsdp.FullyShardedDataParallel(model, device_id=cpu, use_orig_params=kind == "original")
    with pytest.warns(UserWarning, match="belong to an FSDP module"):
        warn_of_averaging(list(model.parameters()))
