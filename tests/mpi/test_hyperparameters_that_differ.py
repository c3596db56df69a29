"""Ranks that apply something else to the decision than others are told so, in the step or the next."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

import mpisign
from mpisign import ConsistencyError, DistributedSignOptimizer

from .wrapped import assert_equal_on_all_ranks

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi

two_ranks = pytest.mark.mpi(min_size=2)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(2, 3))]


def give(tensors: list[nn.Parameter], rank: int) -> None:
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(rank))


def wrapped(tensors: list[nn.Parameter], kind: Any = SGD, **options: Any) -> DistributedSignOptimizer:
    groups = [{"params": tensors[:1]}, {"params": tensors[1:], **options}]
    return DistributedSignOptimizer(kind(groups, lr=0.1), method=mpisign.mean())


def refused(comm: MPI.Comm, step: Callable[[], Any], *says: str) -> None:
    """On every rank, by the same words."""
    with pytest.raises(ConsistencyError) as caught:
        step()
    text = str(caught.value)
    assert f"this is rank {comm.rank}" in text
    assert len(set(comm.allgather(text.replace(f"this is rank {comm.rank}", "")))) == 1
    for its in says:
        assert re.search(its, text), (its, text)
    mpisign.barrier()  # the channel is in order


@two_ranks
@pytest.mark.parametrize(
    ("kind", "option", "usual", "other"),
    [
        (SGD, "lr", 0.1, 0.1000000001),
        (SGD, "weight_decay", 0.0, 0.5),
        (SGD, "momentum", 0.0, 0.9),
        (SGD, "nesterov", False, True),
        (Adam, "betas", (0.9, 0.999), (0.9, 0.99)),
        (AdamW, "eps", 1e-8, 1e-7),
        (SGD, "of_mine", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])),
    ],
)
def test_an_option_of_a_group(comm: MPI.Comm, kind: Any, option: str, usual: Any, other: Any) -> None:
    tensors, odd = parameters(), comm.size - 1
    optimizer = wrapped(tensors, kind, **{option: usual})
    give(tensors, comm.rank)
    optimizer.step()
    before = [tensor.tolist() for tensor in tensors]
    if comm.rank == odd:
        optimizer.param_groups[1][option] = other
    give(tensors, comm.rank)
    refused(
        comm,
        optimizer.step,
        rf"ranks \[{odd}\] apply something else",
        rf"'{option}' of parameter group 1 = .* on rank {odd}, '{option}' of parameter group 1 = .* on rank 0",
    )
    assert [tensor.tolist() for tensor in tensors] == before, "nothing was applied"
    optimizer.param_groups[1][option] = usual
    optimizer.step()
    assert_equal_on_all_ranks(comm, tensors)


@two_ranks
def test_both_values_are_told(comm: MPI.Comm) -> None:
    tensors, odd = parameters(), comm.size - 1
    optimizer = wrapped(tensors, lr=0.25 if comm.rank == odd else 0.5)
    refused(comm, optimizer.step, rf"= 0\.25 on rank {odd}, .* = 0\.5 on rank 0", r"mpisign\.average")


@two_ranks
def test_a_scheduler_that_heeds_the_loss_of_its_rank(comm: MPI.Comm) -> None:
    tensors = parameters()
    optimizer = wrapped(tensors)
    scheduler = ReduceLROnPlateau(optimizer, patience=1)

    def train() -> None:
        for step in range(6):
            give(tensors, comm.rank)
            optimizer.step()
            scheduler.step(1.0 if comm.rank == comm.size - 1 else 1.0 / (step + 1))

    refused(comm, train, rf"'lr' of parameter group 0 = 0\.01\d* on rank {comm.size - 1}, .* = 0\.1 on rank 0")
    assert_equal_on_all_ranks(comm, tensors)


def test_a_schedule_that_is_the_same(comm: MPI.Comm) -> None:
    """Also where only one rank has the scheduler, and tells the others."""
    tensors = parameters()
    optimizer = wrapped(tensors)
    scheduler = CosineAnnealingLR(optimizer, 10) if comm.rank == 0 else None
    for _ in range(5):
        give(tensors, comm.rank)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        rates = mpisign.broadcast_object([group["lr"] for group in optimizer.param_groups])
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    assert_equal_on_all_ranks(comm, tensors)


@two_ranks
def test_a_tensor_that_is_changed_in_place(comm: MPI.Comm) -> None:
    tensors, rate = parameters(), torch.tensor(0.5)
    optimizer = wrapped(tensors, lr=rate)
    give(tensors, comm.rank)
    optimizer.step()
    if comm.rank == comm.size - 1:
        rate.mul_(0.5)
    refused(comm, optimizer.step, rf"= 0\.25 on rank {comm.size - 1}, .* = 0\.5 on rank 0")


@two_ranks
@pytest.mark.parametrize("back", [False, True])
def test_a_change_between_vote_and_step_is_told_by_the_next(comm: MPI.Comm, back: bool) -> None:
    tensors, odd = parameters(), comm.size - 1
    optimizer = wrapped(tensors)
    give(tensors, comm.rank)
    optimizer.synchronize()
    if comm.rank == odd:
        optimizer.param_groups[0]["lr"] = 0.3
    with optimizer.skip_synchronize():
        optimizer.step()
    if back:
        optimizer.param_groups[0]["lr"] = 0.1
    give(tensors, comm.rank)
    refused(comm, optimizer.step, ("applied in the step before: " if back else "") + "'lr' of parameter group 0 = 0.3")


@two_ranks
def test_another_optimizer(comm: MPI.Comm) -> None:
    class Mine(SGD):
        """Of one rank alone."""

    tensors = parameters()
    optimizer = wrapped(tensors, Mine if comm.rank == comm.size - 1 else SGD)
    refused(comm, optimizer.step, f"the optimizer Mine on rank {comm.size - 1}, the optimizer SGD on rank 0")


def test_ranks_that_have_joined_are_exempt(comm: MPI.Comm) -> None:
    """Their schedulers stand still. With the others' state they go on together."""
    tensors = parameters()
    optimizer = wrapped(tensors)
    steps = 2 if comm.rank == comm.size - 1 else 1
    for _ in range(steps):
        give(tensors, comm.rank)
        optimizer.step()
    if comm.rank < comm.size - 1:
        optimizer.param_groups[0]["lr"] = 0.7
    optimizer.join()
    give(tensors, comm.rank)
    optimizer.step()
    assert_equal_on_all_ranks(comm, tensors)


@two_ranks
def test_of_ranks_that_have_not_joined_the_odd_one_is_named(comm: MPI.Comm) -> None:
    tensors, odd = parameters(), comm.size - 1
    if comm.size < 4:
        pytest.skip("needs 4 ranks")
    optimizer = wrapped(tensors, lr={0: 0.7, odd: 0.3}.get(comm.rank, 0.5))
    refused(comm, optimizer.join if comm.rank == 0 else optimizer.step, rf"ranks \[{odd}\] apply", r"= 0\.5 on rank 1")


def test_methods_whose_replicas_differ_are_exempt(comm: MPI.Comm) -> None:
    tensors = parameters()
    sgd = SGD(tensors, lr=0.1 * (comm.rank + 1))
    optimizer = DistributedSignOptimizer(sgd, method=mpisign.monna(0))
    for _ in range(2):
        give(tensors, comm.rank)
        optimizer.step()
    mpisign.check_consistency(nn.ParameterList(tensors), optimizer)


def flip_momentum(optimizer: torch.optim.Optimizer, tensor: nn.Parameter) -> None:
    buffer = optimizer.state[tensor]["momentum_buffer"]
    buffer[2] = torch.nextafter(buffer[2], torch.tensor(9.0))


def drop_momentum(optimizer: torch.optim.Optimizer, tensor: nn.Parameter) -> None:
    del optimizer.state[tensor]["momentum_buffer"]


@two_ranks
@pytest.mark.parametrize("change", [flip_momentum, drop_momentum])
@pytest.mark.parametrize("plain", [False, True], ids=["wrapped", "plain"])
def test_check_consistency_sees_the_state(
    comm: MPI.Comm, change: Callable[[torch.optim.Optimizer, nn.Parameter], None], plain: bool
) -> None:
    model = nn.ParameterList(parameters())
    sgd = SGD(model.parameters(), lr=0.1, momentum=0.5)
    optimizer = DistributedSignOptimizer(sgd, method=mpisign.mean())
    give(list(model), comm.rank)
    optimizer.step()
    either = sgd if plain else optimizer
    mpisign.check_consistency(model, either)
    if comm.rank == comm.size - 1:
        change(sgd, model[0])
    refused(comm, lambda: mpisign.check_consistency(model, either), "'momentum_buffer' of '0' in the optimizer's state")
