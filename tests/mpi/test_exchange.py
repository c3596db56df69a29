"""mpisign.exchange on real ranks: every way across decides the oracle's bits, at the price that is printed on it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import oracle
import pytest
import torch
from shapes import resnet50

import mpisign

from . import ballots

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi

EXCHANGES = ("allgather", "two_phase", "auto")
SHAPES = ((3, 5, 7), (64,), (), (0,), (1,), (33, 2), (127,))
ONE_SEGMENT_A_BUCKET = 4 / (1 << 20)  # MiB


def wrap(tensors: Sequence[torch.nn.Parameter], **options: Any) -> mpisign.DistributedSignOptimizer:
    options.setdefault("method", mpisign.signsgd())
    return mpisign.DistributedSignOptimizer(torch.optim.SGD(tensors, lr=1.0), ballots.named(tensors), **options)


def words_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [-(-t.numel() // 32) for t in tensors]


def decisions_of(tensors: Sequence[torch.Tensor]) -> list[list[float]]:
    return [ballots.flat(t.grad).tolist() for t in tensors]


@pytest.mark.parametrize("ties", ["coin", "zero", "positive"])
@pytest.mark.parametrize("zeros", ["coin", "abstain", "positive"])
def test_every_exchange_decides_the_oracles_bits(comm: MPI.Comm, zeros: str, ties: str) -> None:
    tensors = ballots.parameters(*SHAPES)
    sizes = [t.numel() for t in tensors]
    drawn = [ballots.draw(tensors, ballots.generator(step, comm.rank)) for step in range(2)]
    expected = [
        ballots.vote(ballots.gathered(comm, gradients), sizes, step, zeros=zeros, ties=ties, seed=5)
        for step, gradients in enumerate(drawn)
    ]
    for exchange, cap in itertools.product(EXCHANGES, (1.0, ONE_SEGMENT_A_BUCKET)):
        optimizer = wrap(tensors, zeros=zeros, ties=ties, seed=5, exchange=exchange, bucket_cap_mb=cap)
        for gradients, (decision, tied) in zip(drawn, expected, strict=True):
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor.grad = gradient.clone()
            optimizer.synchronize()
            assert decisions_of(tensors) == [d.tolist() for d in decision], (exchange, cap)
            assert optimizer.report.ties == tied, (exchange, cap)
            optimizer.zero_grad()


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_shards_may_be_uneven_and_empty(comm: MPI.Comm, exchange: str) -> None:
    """From fewer words than ranks to a few more, with a plane of abstentions beside the signs."""
    for words in range(1, 2 * comm.size + 2):
        (tensor,) = tensors = ballots.parameters((32 * words - 5,))
        (tensor.grad,) = gradients = ballots.draw(tensors, ballots.generator(words, comm.rank))
        updates = ballots.gathered(comm, gradients)
        optimizer = wrap(tensors, zeros="abstain", ties="coin", exchange=exchange)
        optimizer.synchronize()
        (decision,), tied = ballots.vote(updates, [tensor.numel()], 0, zeros="abstain")
        assert ballots.flat(tensor.grad).tolist() == decision.tolist()
        assert optimizer.report.ties == tied


def test_a_parameter_larger_than_any_block(comm: MPI.Comm) -> None:
    """Packed in pieces, counted in blocks, and big enough for "auto" to take two phases."""
    (tensor,) = tensors = ballots.parameters(((1 << 20) + 33,), dtypes=[torch.float32])
    gradient = torch.randn(tensor.shape, generator=ballots.generator(comm.rank))
    total = np.zeros(tensor.numel(), np.int64)
    comm.Allreduce(np.sign(gradient.numpy()).astype(np.int64), total)
    for exchange in EXCHANGES:
        tensor.grad = gradient.clone()
        optimizer = wrap(tensors, method=mpisign.signum(), ties="zero", exchange=exchange)
        optimizer.synchronize()
        assert (tensor.grad.numpy() == np.sign(total)).all(), exchange
        assert optimizer.report.ties == np.count_nonzero(total == 0)


def test_the_mean_rounds_alike_on_every_way(comm: MPI.Comm) -> None:
    """Random floats, whose sum depends on the order: all sum in the order of the ranks, in the wire's precision."""
    tensors = ballots.parameters(*SHAPES)
    random = ballots.generator(comm.rank)
    gradients = [torch.randn(t.shape, generator=random, dtype=torch.float64).to(t.dtype) for t in tensors]
    everyones = ballots.gathered(comm, gradients)
    for exchange in EXCHANGES:
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient.clone()
        optimizer = wrap(tensors, method=mpisign.mean(), exchange=exchange)
        optimizer.synchronize()
        for i, tensor in enumerate(tensors):
            wire = np.float64 if tensor.dtype == torch.float64 else np.float32
            mean = oracle.mean([mine[i].astype(wire) for mine in everyones])
            assert torch.equal(tensor.grad.flatten(), torch.from_numpy(mean).to(tensor.dtype)), (exchange, i)
        assert optimizer.report.ties is None


def test_gradients_may_lie_differently_on_each_rank(comm: MPI.Comm) -> None:
    (tensor,) = ballots.parameters((6, 7, 2, 3), dtypes=[torch.float32])
    (gradient,) = ballots.draw([tensor], ballots.generator(comm.rank))
    (decision,), _ = ballots.vote(ballots.gathered(comm, [gradient]), [tensor.numel()], 0)
    tensor.grad = gradient.to(memory_format=torch.channels_last) if comm.rank % 2 else gradient
    wrap([tensor]).synchronize()
    assert tensor.grad.flatten().tolist() == decision.tolist()


def test_weights_may_be_channels_last(comm: MPI.Comm) -> None:
    """Then the order in memory is the order on the wire, and coins fall accordingly."""
    weight = torch.nn.Parameter(torch.zeros(6, 7, 2, 3).to(memory_format=torch.channels_last))
    gradient = torch.randint(-1, 2, weight.shape, generator=ballots.generator(comm.rank)).float()
    in_memory_order = gradient.permute(0, 2, 3, 1)
    (decision,), _ = ballots.vote(ballots.gathered(comm, [in_memory_order]), [weight.numel()], 0)
    weight.grad = gradient
    wrap([weight]).synchronize()
    assert weight.grad.permute(0, 2, 3, 1).flatten().tolist() == decision.tolist()


# -------------------------------------------------------------------------------------------------- the price


@pytest.mark.parametrize("zeros", ["coin", "abstain"])
@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
def test_bytes_sent_are_the_formula_plus_the_header(comm: MPI.Comm, exchange: str, zeros: str) -> None:
    tensors = ballots.parameters((1000, 33), (64,), (70, 70))
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer = wrap(tensors, exchange=exchange, zeros=zeros, bucket_cap_mb=ONE_SEGMENT_A_BUCKET)
    optimizer.step()
    planes = 2 if zeros == "abstain" else 1
    others = comm.size - 1
    if exchange == "allgather":
        messages = sum(others * 4 * planes * words for words in words_of(tensors))
    else:
        messages = sum(2 * others * 4 * planes * -(-words // comm.size) for words in words_of(tensors))
    report = optimizer.report
    assert report.exchange == (exchange,) * len(tensors)
    assert report.bytes_sent - report.header_bytes == messages
    # The handshake: seven numbers; with each message a status, where the ballot ends and a bit; the ties.
    assert report.header_bytes == others * (7 * 8 + len(tensors) * (1 + 4 + 1) + 8)


def test_the_header_is_small_beside_the_message(comm: MPI.Comm) -> None:
    shapes = resnet50()
    assert len(shapes) == 161
    tensors = ballots.parameters(*shapes, dtypes=[torch.bfloat16])
    elements = sum(t.numel() for t in tensors)
    assert elements == 25_557_032
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer = wrap(tensors, exchange="two_phase")
    optimizer.synchronize()
    report = optimizer.report
    assert report.header_bytes <= 0.001 * report.bytes_sent
    formula = 2 * (comm.size - 1) / comm.size * elements / 8
    assert formula <= report.bytes_sent <= 1.001 * formula


def test_auto_takes_two_phases_where_they_pay(comm: MPI.Comm) -> None:
    tensors = ballots.parameters((100,), (1 << 20,), dtypes=[torch.float16])  # messages of 16 bytes and 128 KiB
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer = wrap(tensors, exchange="auto", bucket_cap_mb=ONE_SEGMENT_A_BUCKET)
    optimizer.step()
    assert optimizer.report.exchange == ("two_phase" if comm.size > 2 else "allgather", "allgather")
