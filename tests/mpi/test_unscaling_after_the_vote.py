"""Horovod's order for mixed precision on real ranks: scales that differ, and an Inf on one rank, part no replicas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch.amp import GradScaler

import mpisign
from mpisign import Method

from . import ballots
from .wrapped import assert_equal_on_all_ranks, wrap

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.mpi, pytest.mark.few]

METHODS = [mpisign.signsgd(), mpisign.signum(), mpisign.lion(vote=False), mpisign.mean(), mpisign.ef_signsgd()]


def train(comm: MPI.Comm, method: Method, *, after: bool) -> tuple[list[bytes], list[float]]:
    """Parameters after each step, and this rank's scales."""
    tensors = ballots.parameters((40, 3), (5,))
    for tensor in tensors:
        torch.nn.init.constant_(tensor, 1.0)
    optimizer = wrap(tensors, lr=0.25, method=method)
    scaler = GradScaler("cpu", init_scale=2.0 ** (10 + comm.rank), growth_interval=3)
    generator = torch.Generator().manual_seed(comm.rank)
    parameters, scales = [], []
    for step in range(6):
        optimizer.zero_grad()
        loss = sum((t * torch.randn(t.shape, generator=generator)).sum() for t in tensors)
        scaler.scale(loss).backward()
        if step == 2 and comm.rank == comm.size - 1:
            assert tensors[1].grad is not None
            tensors[1].grad[3] = torch.inf
        if after:
            optimizer.synchronize()
            scaler.unscale_(optimizer)
        else:
            scaler.unscale_(optimizer)
            optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(tensors, 4.0)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        assert_equal_on_all_ranks(comm, tensors)
        parameters.append(b"".join(t.detach().numpy().tobytes() for t in tensors))
        scales.append(scaler.get_scale())
    return parameters, scales


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_replicas_stay_equal_and_train_with_the_same_bits(comm: MPI.Comm, method: Method) -> None:
    expected = train(comm, method, after=False)
    found = train(comm, method, after=True)
    assert found == expected
    assert len(set(found[0])) == (6 if comm.size > 1 else 5), "a step is left out only if nobody votes"
    backed_off = found[1][2] < found[1][1]
    assert comm.allgather(backed_off) == [rank == comm.size - 1 for rank in range(comm.size)]
