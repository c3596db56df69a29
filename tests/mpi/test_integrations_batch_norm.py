"""SyncBatchNorm on real ranks, against torch's BatchNorm on the whole batch in one process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import mpisign
from mpisign.integrations.batch_norm import SyncBatchNorm

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi


def whole(size: int, inner: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """A batch for each rank, of different sizes."""
    random = torch.Generator().manual_seed(1)
    return [
        (torch.randn(2 + rank, 3, *inner, generator=random, dtype=torch.float64) * 3 + 1).to(dtype)
        for rank in range(size)
    ]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind, inner", [(nn.BatchNorm1d, ()), (nn.BatchNorm1d, (5,)), (nn.BatchNorm2d, (4, 2))])
def test_outputs_gradients_and_statistics(
    comm: MPI.Comm, kind: type[nn.BatchNorm1d], inner: tuple[int, ...], affine: bool, momentum: float | None
) -> None:
    batches = whole(comm.size, inner, torch.float64)
    oracle = kind(3, momentum=momentum, affine=affine).double()
    mine = SyncBatchNorm.convert(kind(3, momentum=momentum, affine=affine).double())
    assert isinstance(mine, SyncBatchNorm)
    for layer in (oracle, mine):
        if affine:
            with torch.no_grad():
                layer.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
                layer.bias.copy_(torch.tensor([0.0, 1.0, -3.0]))
    for step in range(2):
        everything = (torch.cat(batches) + step).requires_grad_()
        x = (batches[comm.rank] + step).requires_grad_()
        first = sum(len(its) for its in batches[: comm.rank])
        y, expected = mine(x), oracle(everything)
        torch.testing.assert_close(y, expected[first : first + len(x)])
        target = torch.cos(torch.arange(everything.numel(), dtype=torch.float64)).view(everything.shape)
        (y * target[first : first + len(x)]).sum().backward()
        (expected * target).sum().backward()
        torch.testing.assert_close(x.grad, everything.grad[first : first + len(x)])
        torch.testing.assert_close(mine.running_mean, oracle.running_mean)
        torch.testing.assert_close(mine.running_var, oracle.running_var)
    if affine:
        for ours, its in zip(mine.parameters(), oracle.parameters(), strict=True):
            torch.testing.assert_close(mpisign.allreduce(ours.grad, "sum"), its.grad)
    mine.eval()
    oracle.eval()
    torch.testing.assert_close(mine(batches[comm.rank]), oracle(batches[comm.rank]))


@pytest.mark.mpi(min_size=2)
def test_in_half_precision_and_with_a_rank_that_has_nothing(comm: MPI.Comm) -> None:
    batches = whole(comm.size, (4,), torch.bfloat16)
    layer = SyncBatchNorm(3)
    y = layer(batches[comm.rank])
    assert y.dtype == torch.bfloat16
    expected = nn.BatchNorm1d(3)(torch.cat(batches).float())
    first = sum(len(its) for its in batches[: comm.rank])
    torch.testing.assert_close(y.float(), expected[first : first + len(y)], rtol=0.02, atol=0.02)
    x = torch.randn(0 if comm.rank == 1 else 4, 3, requires_grad=True)
    y = SyncBatchNorm(3)(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_convert_keeps_what_is_there(comm: MPI.Comm) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Sequential(nn.BatchNorm2d(3, eps=0.1)), nn.ReLU()).eval()
    weight, buffer = net[1][0].weight, net[1][0].running_var
    assert SyncBatchNorm.convert(net) is net
    layer = net[1][0]
    assert type(layer) is SyncBatchNorm
    assert layer.weight is weight
    assert layer.running_var is buffer
    assert (layer.eps, layer.training) == (0.1, False)
    assert SyncBatchNorm.convert(layer) is layer
    with pytest.raises(ValueError, match="channels"):
        layer(torch.zeros(3))


@pytest.mark.mpi(min_size=2)
def test_a_model_that_is_trained_with_it_stays_the_same_on_all_ranks(comm: MPI.Comm) -> None:
    torch.manual_seed(0)
    net = SyncBatchNorm.convert(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)))
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(net.parameters(), lr=0.01))
    for x in whole(comm.size, (), torch.float32):
        optimizer.zero_grad()
        net(x + comm.rank).square().mean().backward()
        optimizer.step()
    mpisign.check_consistency(net, optimizer)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("track", [True, False])
def test_evaluation_is_not_collective(comm: MPI.Comm, track: bool) -> None:
    layer, plain = SyncBatchNorm(3, track_running_stats=track), nn.BatchNorm1d(3, track_running_stats=track)
    if comm.rank == 0:
        x = torch.randn(4, 3)
        assert torch.equal(layer.eval()(x), plain.eval()(x))
    mpisign.barrier()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bends", [True, False])
def test_gradients_of_gradients_are_refused(comm: MPI.Comm, bends: bool, affine: bool) -> None:
    layer, x = SyncBatchNorm(3, affine=affine), torch.randn(4, 3, requires_grad=True)

    def gradient(create_graph: bool) -> torch.Tensor:
        y = layer(x) * torch.arange(12.0).view(4, 3)
        return torch.autograd.grad((y.tanh() if bends else y).sum(), x, create_graph=create_graph)[0]

    first = gradient(create_graph=True)
    torch.testing.assert_close(first.detach(), gradient(create_graph=False))
    loss = x.sum() + first.square().sum()
    with pytest.raises(mpisign.GradientError, match="again"):
        torch.autograd.grad(loss, x, retain_graph=True)
    with pytest.raises(mpisign.GradientError, match="again"):
        loss.backward()
