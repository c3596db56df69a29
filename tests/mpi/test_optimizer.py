"""mpisign.optimizer on real ranks: replicas stay equal, methods do what the papers say, reports are right.

Who does not vote is in test_optimizer_abstentions.py, ranks that differ are in test_optimizer_consistency.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import oracle
import pytest
import torch

import mpisign

from . import ballots
from .wrapped import EXCHANGES, NAN, SHAPES, Wrapped, give, grads_of, lists, sizes_of, snapshot, wrap

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi

# ------------------------------------------------------------------------------------------- replicas stay equal


def train_on_rough_ground(comm: MPI.Comm, steps: int, **options: Any) -> list[torch.nn.Parameter]:
    """Every rank pulls elsewhere and has coordinates it knows nothing of; gradients are missing or NaN now and then."""
    tensors = ballots.parameters(*SHAPES)
    optimizer = wrap(tensors, lr=0.01, method=mpisign.signum(0.9), **options)
    random = ballots.generator(comm.rank)
    targets = [torch.randn(t.shape, generator=random).to(t.dtype) for t in tensors]
    known = [torch.rand(t.shape, generator=random) < 0.7 for t in tensors]
    for step in range(steps):
        optimizer.zero_grad()
        losses = [
            ((t - target) * k).double().square().sum() for t, target, k in zip(tensors, targets, known, strict=True)
        ]
        absent = 1 + (step + comm.rank) % (len(losses) - 1)
        sum(loss for i, loss in enumerate(losses) if i != absent).backward()
        if step % 20 == comm.rank:
            tensors[0].grad[0, 0] = NAN
        optimizer.step()
    return tensors


SOME_POLICIES = [("rows", "coin"), ("abstain", "zero")]
POLICIES = [(zeros, ties) for zeros in ("rows", "coin", "abstain", "positive") for ties in ("coin", "zero", "positive")]


@pytest.mark.parametrize(
    ("zeros", "ties"),
    [
        *SOME_POLICIES,
        *(pytest.param(*both, marks=pytest.mark.long) for both in POLICIES if both not in SOME_POLICIES),
    ],
)
def test_parameters_are_bit_identical_after_many_steps(comm: MPI.Comm, zeros: str, ties: str) -> None:
    """On all ranks, and whichever way the votes went ("auto" takes one of the two)."""
    ends, steps = set(), 200 if comm.size <= 3 else 60
    for exchange in ("allgather", "two_phase"):
        tensors = train_on_rough_ground(comm, steps, zeros=zeros, ties=ties, exchange=exchange)
        assert all(t.abs().max() > 0.05 for t in tensors if t.numel() > 1)
        ends.update(comm.allgather(snapshot(tensors)))
    assert len(ends) == 1


# ------------------------------------------------------------------------------------------- methods, by their papers


def test_signsgd(comm: MPI.Comm) -> None:
    check_method(comm, mpisign.signsgd(), lambda m, g: (g, m))


def test_signum(comm: MPI.Comm) -> None:
    check_method(comm, mpisign.signum(0.5), lambda m, g: oracle.momentum(m, g, 0.5))


def test_lion(comm: MPI.Comm) -> None:
    check_method(comm, mpisign.lion(0.5, 0.75), lambda m, g: oracle.lion(m, g, 0.5, 0.75))


def check_method(
    comm: MPI.Comm, method: mpisign.Method, remember: Callable[[Any, Any], tuple[Any, Any]], steps: int = 6
) -> None:
    """Small integers and decays that are powers of two: no arithmetic rounds, so that every sign must agree."""
    tensors = ballots.parameters(*SHAPES)
    optimizer = wrap(tensors, lr=0.25, method=method, seed=11)
    random = ballots.generator(comm.rank)
    memories = [[np.zeros(n) for n in sizes_of(tensors)] for _ in range(comm.size)]
    positions = [np.zeros(n) for n in sizes_of(tensors)]
    for step in range(steps):
        gradients = ballots.draw(tensors, random)
        everyones = ballots.gathered(comm, gradients)
        updates = [
            [remember(m, g) for m, g in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(memories, everyones, strict=True)
        ]
        memories = [[kept for _, kept in mine] for mine in updates]
        decisions, ties = ballots.vote(
            [[sent for sent, _ in mine] for mine in updates], sizes_of(tensors), step, seed=11
        )
        give(tensors, gradients)
        optimizer.step()
        assert grads_of(tensors) == lists(decisions), f"step {step}"
        assert optimizer.report.ties == ties
        positions = [x - 0.25 * decision for x, decision in zip(positions, decisions, strict=True)]
        assert [ballots.flat(t).tolist() for t in tensors] == [x.tolist() for x in positions]


def test_mean(comm: MPI.Comm) -> None:
    """The wrapped optimizer sees the mean gradient, so its own momentum is ordinary momentum SGD."""
    (tensor,) = tensors = ballots.parameters((40,), dtypes=[torch.float64])
    optimizer = Wrapped(torch.optim.SGD(tensors, lr=0.1, momentum=0.9), method=mpisign.mean())
    random = ballots.generator(comm.rank)
    position, velocity = np.zeros(40), np.zeros(40)
    for _ in range(5):
        tensor.grad = torch.randn(40, generator=random, dtype=torch.float64)
        velocity = 0.9 * velocity + oracle.mean([g for (g,) in ballots.gathered(comm, [tensor.grad])])
        position -= 0.1 * velocity
        optimizer.step()
    np.testing.assert_allclose(tensor.detach().numpy(), position, rtol=1e-12)
    with pytest.raises(mpisign.MpisignError, match="casts no votes"):
        optimizer.report.agreement()


def test_a_group_added_on_all_ranks_takes_part(comm: MPI.Comm) -> None:
    old, new = tensors = ballots.parameters((40,), (70,), dtypes=[torch.float32])
    optimizer = wrap([old], method=mpisign.signum(0.5))
    old.grad = torch.full((40,), 4.0)
    optimizer.step()
    optimizer.add_param_group({"params": [new], "lr": 0.5})
    # Old memory 2, so that -1 does not turn it; new memory 0.
    give(tensors, [torch.full((40,), -1.0), torch.full((70,), -1.0)])
    optimizer.step()
    assert old.tolist() == [-2.0] * 40
    assert new.tolist() == [0.5] * 70


# ------------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    ("zeros", "ties"), [("coin", "coin"), ("abstain", "zero"), ("abstain", "coin"), ("coin", "zero")]
)
def test_agreement_is_the_share_of_each_ballot_that_won(comm: MPI.Comm, zeros: str, ties: str, exchange: str) -> None:
    tensors = ballots.parameters(*SHAPES)
    sizes = sizes_of(tensors)
    optimizer = wrap(tensors, zeros=zeros, ties=ties, exchange=exchange)
    silent = comm.size - 1 if comm.size > 2 else None
    gradients = ballots.draw(tensors, ballots.generator(comm.rank))
    if comm.rank == 0:
        gradients[1] = None
    give(tensors, gradients)
    if comm.rank == silent:
        tensors[-1].grad[0] = NAN  # the first on the wire, so that its ballot ends before it has begun
    everyones = ballots.gathered(comm, gradients)
    if silent is not None:
        everyones[silent] = [None] * len(tensors)
    decisions, _ = ballots.vote(everyones, sizes, 0, zeros=zeros, ties=ties)
    optimizer.step()

    expected = []
    for rank, updates in enumerate(everyones):
        agreed = spoken = 0
        for update, decision, n, start in zip(updates, decisions, sizes, oracle.first_words(sizes), strict=True):
            if update is not None:
                coins = ballots.coins(0, 0, oracle.zeros_stream(rank), start, n)
                ballot = oracle.ballot(update, zeros, coins)
                spoken += np.count_nonzero(ballot * decision)
                agreed += np.count_nonzero(ballot * decision == 1)
        expected.append(agreed / spoken if spoken else NAN)
    shares = optimizer.report.agreement()
    assert shares == pytest.approx(expected, nan_ok=True)
    assert len(set(map(str, comm.allgather(shares)))) == 1

    earlier = optimizer.report
    give(tensors, gradients)
    optimizer.step()
    with pytest.raises(mpisign.MpisignError, match="step 0 are gone"):
        earlier.agreement()


def test_the_report_is_the_same_on_every_rank(comm: MPI.Comm) -> None:
    tensors = ballots.parameters(*SHAPES)
    optimizer = wrap(tensors)
    give(tensors, ballots.draw(tensors, ballots.generator(comm.rank)))
    optimizer.step()
    reports = comm.allgather(dataclasses.replace(optimizer.report, seconds={}, exposed_seconds=0.0, _agreement=None))
    assert all(report == reports[0] for report in reports)
    assert set(optimizer.report.seconds) == {"pack", "exchange", "decide", "unpack"}
    assert all(seconds > 0 for seconds in optimizer.report.seconds.values())
