"""mpisign.integrations.fsdp on real ranks and real FSDP2, against the plain model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import mpisign
from mpisign.integrations import fsdp

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.mpi, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def group(job: None) -> Iterator[None]:
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(rank: int, step: int = 0) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + rank))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]


def sharded(shards: int, **options: Any) -> tuple[nn.Sequential, Any]:
    model = net()
    mesh = fsdp.split(shards)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, fsdp.vote(model, **options)


@pytest.mark.parametrize("shards", [1, 2])
def test_what_replicas_decide(comm: MPI.Comm, shards: int) -> None:
    if comm.size % shards:
        pytest.skip("needs a multiple of 2 ranks")
    each = []
    for rank in range(comm.size):
        plain = net()
        plain(batch(rank)).square().sum().backward()
        each.append(gradients(plain))
    ballots = [[g.numpy() for g in its] for its in each]
    replicas = [
        [np.mean([its[at] for its in ballots[first : first + shards]], axis=0) for at in range(4)]
        for first in range(0, comm.size, shards)
    ]
    model, votes = sharded(shards, method=mpisign.mean())
    assert (mpisign.size(), mpisign.rank()) == (comm.size // shards, comm.rank // shards)
    model(batch(comm.rank)).square().sum().backward()
    for at, decided in enumerate(gradients(model)):
        torch.testing.assert_close(decided, torch.from_numpy(np.mean([its[at] for its in replicas], axis=0)))
    assert set(votes.reports) == {"0", "2"}
    assert votes.reports["0"].voters == tuple(range(mpisign.size()))
    distributed.destroy_process_group()
    mpisign.shutdown()
    mpisign.init()
    model, votes = sharded(shards, method=mpisign.signsgd())
    model(batch(comm.rank)).square().sum().backward()
    for at, decided in enumerate(gradients(model)):
        score = np.sign(np.stack([its[at] for its in replicas])).sum(axis=0)
        clear = score != 0
        assert (decided.numpy()[clear] == np.sign(score)[clear]).all()
        assert (np.abs(decided.numpy()) == 1).all()


@pytest.mark.mpi(min_size=2)
def test_two_jobs_of_one_mpirun(comm: MPI.Comm) -> None:
    mpisign.shutdown()
    part = comm.Split(comm.rank > 0)
    mpisign.init(part)
    fsdp.split(1)
    assert (mpisign.rank(), mpisign.size()) == (part.rank, part.size)
    assert distributed.get_world_size() == part.size
    mpisign.shutdown()
    part.Free()


def test_memory_can_be_saved(comm: MPI.Comm) -> None:
    model, votes = sharded(1)

    def steps(first: int) -> list[torch.Tensor]:
        for step in (first, first + 1):
            model.zero_grad()
            model(batch(comm.rank, step)).square().sum().backward()
        return [its.clone() for its in gradients(model)]

    steps(0)
    saved = copy.deepcopy(votes.state_dict())
    expected = steps(2)
    votes.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(steps(2), expected, strict=True))


def test_what_would_change_a_decision_is_an_error_on_all_ranks(comm: MPI.Comm) -> None:
    model, _ = sharded(1)
    scaler = torch.amp.GradScaler("cpu", enabled=comm.rank == comm.size - 1)
    with pytest.raises((mpisign.OptionError, RuntimeError), match="GradScaler would divide"):
        scaler.scale(model(batch(comm.rank)).sum()).backward()
    del scaler


def test_what_fsdp_divides_after_the_vote_is_an_error(comm: MPI.Comm) -> None:
    mesh = fsdp.split(comm.size)
    for dtype in (torch.float32, torch.float64):
        model = net().to(dtype)
        fully_shard(model, mesh=mesh)
        fsdp.vote(model, method=mpisign.signsgd())
        loss = model(batch(comm.rank).to(dtype)).sum()
        if dtype == torch.float64 and comm.size > 2:
            with pytest.raises((mpisign.OptionError, RuntimeError), match="more than 2 shards: pass it mp_policy"):
                loss.backward()
        else:
            loss.backward()
            assert all((its.abs() == 1).all() for its in gradients(model))


def test_what_is_refused(comm: MPI.Comm) -> None:
    with pytest.raises(mpisign.OptionError, match="no module of this model is sharded"):
        fsdp.vote(net())
    with pytest.raises(mpisign.OptionError, match=r"takes method, zeros, ties, .*, and not clip_grad_norm, overlap$"):
        fsdp.vote(net(), clip_grad_norm=1.0, overlap=True)
    with pytest.raises(mpisign.OptionError, match="shards"):
        fsdp.split(0)
    with pytest.raises(mpisign.OptionError, match="cannot be divided"):
        fsdp.split(comm.size + 1)
