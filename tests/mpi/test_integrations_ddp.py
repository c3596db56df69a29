"""mpisign.integrations.ddp on real ranks and real DDP, against DistributedSignOptimizer around the plain model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import mpisign
from mpisign.integrations.ddp import init_process_group, vote

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def group(job: None) -> Iterator[None]:
    init_process_group("gloo")
    yield
    distributed.destroy_process_group()


class Net(nn.Module):
    """``spare`` is used only if its batch says so."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 50, dtype=dtype), nn.Linear(50, 3, dtype=dtype)
        self.spare = nn.Linear(3, 3, dtype=dtype)

    def forward(self, x: torch.Tensor, spare: bool = True) -> torch.Tensor:
        x = self.last(self.first(x).relu())
        return self.spare(x) if spare else x


def batch(rank: int, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + rank)).to(dtype)


def train(rank: int, ddp: bool, steps: int = 4, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """Plain SGD on votes, either way."""
    net = Net(dtype)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=0.01, weight_decay=0.1)
    model: nn.Module = net
    if ddp:
        model = DistributedDataParallel(net, bucket_cap_mb=0.0005)  # several buckets
        vote(model, **options)
    else:
        optimizer = mpisign.DistributedSignOptimizer(optimizer, net.named_parameters(), **options)
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(rank, step, dtype)).square().mean().backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", [mpisign.signum(0.9), mpisign.mean(), mpisign.ef_signsgd()], ids=lambda m: m.name)
def test_the_same_bits_as_the_optimizer_around_the_plain_model(
    comm: MPI.Comm, method: mpisign.Method, dtype: torch.dtype
) -> None:
    mine, plain = (
        train(comm.rank, True, dtype=dtype, method=method),
        train(comm.rank, False, dtype=dtype, method=method),
    )
    for (name, a), b in zip(mine.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name
    mpisign.check_consistency(mine)


@pytest.mark.mpi(min_size=2)
def test_gradients_are_decisions_and_hooks_see_every_rank(comm: MPI.Comm) -> None:
    model = DistributedDataParallel(Net())
    its = vote(model)
    model(batch(comm.rank, 0)).sum().backward()
    assert all(bool((p.grad.abs() == 1).all()) for p in model.parameters() if p.grad is not None)
    assert its.report is not None
    assert its.report.voters == tuple(range(comm.size))
    assert its.report.method == "signum"


@pytest.mark.mpi(min_size=2)
def test_unused_parameters(comm: MPI.Comm) -> None:
    """Who has not used them does not vote on them; where nobody has, they stay as they are."""
    model = DistributedDataParallel(Net(), find_unused_parameters=True)
    vote(model, method=mpisign.mean())
    net: Any = model.module
    model(batch(0, 0), spare=comm.rank == 0).square().mean().backward()
    expected = Net()
    expected(batch(0, 0)).square().mean().backward()
    assert torch.equal(net.spare.weight.grad, expected.spare.weight.grad), "a mean of one"
    model.zero_grad()
    model(batch(comm.rank, 1), spare=False).square().mean().backward()
    assert net.spare.weight.grad is None


@pytest.mark.mpi(min_size=2)
def test_what_has_accumulated_is_voted_on_as_a_sum(comm: MPI.Comm) -> None:
    model = DistributedDataParallel(Net())
    vote(model, method=mpisign.mean())
    with model.no_sync():
        model(batch(comm.rank, 0)).square().mean().backward()
    model(batch(comm.rank, 1)).square().mean().backward()
    net, total = Net(), [torch.zeros_like(p) for p in model.parameters()]
    for rank in range(comm.size):
        net.zero_grad()
        for step in range(2):
            net(batch(rank, step)).square().mean().backward()
        for sofar, p in zip(total, net.parameters(), strict=True):
            sofar.add_(p.grad)
    for p, its in zip(model.parameters(), total, strict=True):
        torch.testing.assert_close(p.grad, its / comm.size)


@pytest.mark.mpi(min_size=2)
def test_a_nan_on_one_rank_and_on_all(comm: MPI.Comm) -> None:
    model = DistributedDataParallel(Net())
    its = vote(model)
    x = batch(comm.rank, 0)
    model(x * (float("nan") if comm.rank == 1 else 1.0)).square().sum().backward()
    assert its.report is not None
    assert its.report.voters == tuple(rank for rank in range(comm.size) if rank != 1)
    assert all(bool((p.grad.abs() == 1).all()) for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    model(x * float("nan")).square().sum().backward()
    assert its.report.skipped
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.mpi(min_size=2)
def test_memory_can_be_saved(comm: MPI.Comm) -> None:
    def steps(model: DistributedDataParallel, its: Any, first: int) -> list[torch.Tensor]:
        for step in (first, first + 1):
            model.zero_grad()
            model(batch(comm.rank, step)).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model = DistributedDataParallel(Net())
    its = vote(model)
    steps(model, its, 0)
    saved = copy.deepcopy(its.state_dict())
    expected = steps(model, its, 2)
    model = DistributedDataParallel(Net())
    its = vote(model)
    its.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(steps(model, its, 2), expected, strict=True))


def test_what_is_refused(comm: MPI.Comm) -> None:
    with pytest.raises(mpisign.OptionError, match="Linear is none"):
        vote(nn.Linear(2, 2))  # type: ignore[arg-type]
    model = DistributedDataParallel(Net())
    takes = "takes method, zeros, ties, exchange, seed, clip_grad_norm, bucket_cap_mb, and not"
    for options in ({"overlap": True}, {"every": 4}, {"apply": "auto"}, {"backward_passes_per_step": 2}):
        with pytest.raises(mpisign.OptionError, match=rf"^rank {comm.rank}: vote\(\) {takes} {next(iter(options))}$"):
            vote(model, **options)
    with pytest.raises(mpisign.OptionError, match=f"{takes} delay, outer$"):
        vote(model, outer=None, delay=1)
    with pytest.raises(mpisign.OptionError, match="exchanges models"):
        vote(model, method=mpisign.monna(0))
    vote(model)
    with pytest.raises(mpisign.OptionError, match="a communication hook already"):
        vote(model)
    if comm.size == 1:
        return
    alone = [distributed.new_group([rank]) for rank in range(comm.size)][comm.rank]
    with pytest.raises(mpisign.OptionError, match="this is rank 0 of 1, and to MPI"):
        vote(DistributedDataParallel(Net(), process_group=alone))


@pytest.mark.mpi(min_size=2)
def test_a_grad_scaler_is_an_error_on_all_ranks(comm: MPI.Comm) -> None:
    model = DistributedDataParallel(Net())
    vote(model)
    scaler = torch.amp.GradScaler("cpu", enabled=comm.rank == 1)
    with pytest.raises((mpisign.OptionError, RuntimeError), match="GradScaler would divide"):
        scaler.scale(model(batch(comm.rank, 0)).sum()).backward()
    del scaler
