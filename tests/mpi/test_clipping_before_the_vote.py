"""clip_grad_norm: each rank's gradient is clipped to a norm before anything else is done with it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from gpu_branch import gpu_branch, needs_compiler
from methods_table import Make, walk_exchanges

import mpisign

from .steps import assert_same_everywhere, drawn, model, step, wrap

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.mpi, pytest.mark.few]

NORM = 2.5
SMALL = 64 / (1 << 20)  # MiB of a bucket: several messages
GPU = pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=needs_compiler)], ids=["host", "cuda"])


def clipped_by_hand(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """As NumPy does it, over all parameters."""
    norm = np.sqrt(sum(np.square(gradient.double().numpy()).sum() for gradient in gradients))
    return [gradient * float(min(1.0, NORM / norm)) for gradient in gradients]


def rounds(rank: int) -> list[list[torch.Tensor]]:
    """Beyond the norm, and in the third step below it."""
    tensors = model()
    every = [drawn(tensors, at, rank) for at in range(4)]
    for gradient in every[2]:
        gradient.mul_(1e-3)
    return every


@pytest.mark.long
@GPU
@walk_exchanges(lambda method: not method.memory.private)
def test_as_if_by_hand(comm: MPI.Comm, make: Make, exchange: str, gpu: bool) -> None:
    """Whatever comes after it: memories, their own clipping, maxima over ranks, both exchanges, several messages."""
    ours, theirs = model(), model()
    with gpu_branch(True) if gpu else nullcontext():
        options: dict[str, Any] = {"exchange": exchange, "bucket_cap_mb": SMALL}
        clips = wrap(ours, make(comm.size), clip_grad_norm=NORM, **options)
        plain = wrap(theirs, make(comm.size), **options)
        for gradients in rounds(comm.rank):
            step(clips, ours, gradients)
            step(plain, theirs, clipped_by_hand(gradients))
            for name in ("voters", "abstentions", "ended_at", "bytes_sent", "skipped"):
                assert getattr(clips.report, name) == getattr(plain.report, name), name
    if not clips.method.exchanges_models:
        assert_same_everywhere(comm, ours)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    a, b = (optimizer.state_dict()["mpisign"] for optimizer in (clips, plain))
    assert a.keys() == b.keys()
    for place, fields in a["memory"].items():
        for field, value in fields.items():
            torch.testing.assert_close(value, b["memory"][place][field], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
def test_a_huge_gradient_is_forgotten_soon(comm: MPI.Comm, exchange: str) -> None:
    """Without it, the momentum of 3e38 votes for hundreds of steps, whatever follows."""
    moved = []
    for norm in (None, 1.0):
        tensors = model()
        optimizer = wrap(tensors, mpisign.signum(), lr=1.0, exchange=exchange, clip_grad_norm=norm)
        for at in range(40):
            step(optimizer, tensors, [torch.full_like(t, 3e38 if at == 0 else -1e-3) for t in tensors])
        moved.append(float(tensors[0][0, 0].detach()))
    assert moved[0] == -40.0
    assert moved[1] > 0.0


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**16])
def test_a_loss_scale_is_taken_out_first(comm: MPI.Comm, scale: float) -> None:
    scaled, plain = model(), model()
    optimizers = [wrap(tensors, mpisign.signum(), clip_grad_norm=NORM) for tensors in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for gradients in rounds(comm.rank):
        for tensor, gradient in zip(scaled, gradients, strict=True):
            tensor.grad = gradient * scaler.get_scale()
        scaler.scale(torch.zeros(()))
        scaler.step(optimizers[0])
        scaler.update()
        step(optimizers[1], plain, gradients)
    assert all(map(torch.equal, scaled, plain))


@pytest.mark.parametrize("method", [mpisign.signum(), mpisign.double_squeeze(), mpisign.dgc(0.1, clip=1.0)], ids=str)
def test_a_rank_whose_gradient_has_no_norm_abstains_wholly(comm: MPI.Comm, method: mpisign.Method) -> None:
    """And its memory takes nothing in, as nothing says by how much."""
    tensors = model()
    optimizer = wrap(tensors, method, clip_grad_norm=NORM, bucket_cap_mb=SMALL)
    step(optimizer, tensors, drawn(tensors, 0, comm.rank))
    before = copy.deepcopy(optimizer.state_dict()["mpisign"]["memory"])
    gradients = drawn(tensors, 1, comm.rank)
    broken = comm.size - 1
    if comm.rank == broken:
        gradients[2].fill_(torch.inf)
    step(optimizer, tensors, gradients)
    assert optimizer.report.ended_at == {broken: "p2"}
    assert optimizer.report.voters == tuple(range(broken))
    assert set(optimizer.report.abstentions) == {broken}
    assert_same_everywhere(comm, tensors)
    if comm.rank == broken:
        for place, fields in optimizer.state_dict()["mpisign"]["memory"].items():
            for field, value in fields.items():
                assert torch.equal(value, before[place][field]), (place, field)


def test_some_parameters_by_another_method(comm: MPI.Comm) -> None:
    """The norm is that of all."""
    ours, theirs = model(), model()
    optimizers = []
    for tensors, norm in ((ours, NORM), (theirs, None)):
        groups = [{"params": tensors[:2], "method": mpisign.mean()}, {"params": tensors[2:]}]
        sgd = torch.optim.SGD(groups, lr=0.1)
        optimizers.append(mpisign.DistributedSignOptimizer(sgd, clip_grad_norm=norm))
    for gradients in rounds(comm.rank):
        step(optimizers[0], ours, gradients)
        step(optimizers[1], theirs, clipped_by_hand(gradients))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_ranks_that_clip_differently(comm: MPI.Comm) -> None:
    if comm.size == 1:
        pytest.skip("needs two ranks")
    tensors = model()
    optimizer = wrap(tensors, mpisign.signum(), clip_grad_norm=1.0 if comm.rank == 0 else 2.0)
    with pytest.raises(mpisign.ConsistencyError, match=r"clip_grad_norm"):
        step(optimizer, tensors, drawn(tensors, 0, comm.rank))


@pytest.mark.parametrize("norm", [0, -1.0, "1", True, float("nan")])
def test_it_is_a_positive_number(norm: Any) -> None:
    with pytest.raises(mpisign.OptionError, match=r"clip_grad_norm=.* must be a positive number, or None for never"):
        wrap(model(), mpisign.signum(), clip_grad_norm=norm)
