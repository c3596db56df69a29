"""mpisign.attacks on real ranks: adversaries send what the attack says, and honest ranks what they always did."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import mpisign
from mpisign import attacks
from mpisign.attacks import Adversary, Attack

from . import ballots

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi

SHAPES = ((3, 5), (64,), (), (0,), (33, 2))
BLIND = [attacks.SignFlip(), attacks.Scaled(), attacks.Constant(), attacks.RandomSigns(), attacks.Gaussian()]
OMNISCIENT = [
    attacks.SignFlip(omniscient=True),
    attacks.InnerProduct(),
    attacks.ALittleIsEnough(),
    attacks.Mimic(),
    attacks.ColludingSigns(),
]


def adversary(comm: MPI.Comm, attack: Attack, ranks: list[int], **options: Any) -> Adversary:
    return Adversary(attack, ranks, comm, i_know_this_is_an_attack=True, **options)


def upper_half(comm: MPI.Comm) -> list[int]:
    """The adversaries of these tests: nobody, of one rank."""
    return list(range((comm.size + 1) // 2, comm.size))


def with_gradients(comm: MPI.Comm, *seeds: int) -> list[torch.nn.Parameter]:
    tensors = ballots.parameters(*SHAPES)
    random = ballots.generator(comm.rank, *seeds)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=random).to(tensor.dtype)
    return tensors


def flat(tensors: list[torch.nn.Parameter]) -> np.ndarray:
    return np.concatenate([ballots.flat(tensor.grad) for tensor in tensors])


@pytest.mark.parametrize("attack", BLIND + OMNISCIENT, ids=repr)
def test_adversaries_send_what_the_attack_says(comm: MPI.Comm, attack: Attack) -> None:
    tensors = with_gradients(comm)
    before = np.stack(comm.allgather(flat(tensors)))
    evil = upper_half(comm)
    adversary(comm, attack, evil, seed=7).corrupt(tensors)
    after = np.stack(comm.allgather(flat(tensors)))

    honest = [rank for rank in range(comm.size) if rank not in evil]
    assert (after[honest] == before[honest]).all()
    shown = torch.from_numpy(before[honest] if attack.omniscient else before[:0])
    for rank in evil:
        generator = torch.Generator().manual_seed(7 * comm.size + rank)
        expected = attack(torch.from_numpy(before[rank]), shown, generator)
        places = torch.split(expected, [tensor.numel() for tensor in tensors])
        rounded = [piece.to(tensor.dtype).double() for piece, tensor in zip(places, tensors, strict=True)]
        assert (after[rank] == torch.cat(rounded).numpy()).all(), rank


def test_the_vote_hears_the_adversaries(comm: MPI.Comm) -> None:
    """All ranks agree, so the colluders' share alone decides who wins."""
    for evil in ([], upper_half(comm), list(range(1, comm.size))):
        (weight,) = ballots.parameters((100,), dtypes=[torch.float32])
        weight.grad = torch.randn(100, generator=ballots.generator(0))
        truth = weight.grad.sign()
        optimizer = mpisign.DistributedSignOptimizer(
            torch.optim.SGD([weight], lr=1.0), method=mpisign.signsgd(), ties="zero"
        )
        adversary(comm, attacks.ColludingSigns(), evil).corrupt([weight])
        optimizer.synchronize()
        assert torch.equal(weight.grad, truth * np.sign(comm.size - 2 * len(evil)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_rank_that_sends_no_numbers_is_named(comm: MPI.Comm, value: float) -> None:
    tensors = with_gradients(comm)
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(tensors, lr=1.0), ballots.named(tensors))
    adversary(comm, attacks.Constant(value), upper_half(comm)).corrupt(tensors)
    optimizer.step()
    assert sorted(optimizer.report.abstentions) == upper_half(comm)
    mpisign.check_consistency(torch.nn.ParameterList(tensors))


def test_view_and_place_corrupt_what_leaves_the_momentum(comm: MPI.Comm) -> None:
    """A nonlinear attack on the momentum: at every step, the vote is that of momenta of which some are colluders'."""
    beta, evil = 0.9, upper_half(comm)
    (weight,) = ballots.parameters((200,), dtypes=[torch.float64])
    velocity = torch.zeros(200, dtype=torch.float64)  # what the method's own momentum holds on this rank
    optimizer = mpisign.DistributedSignOptimizer(
        torch.optim.SGD([weight], lr=1.0), method=mpisign.signum(beta), ties="zero"
    )
    colluders = adversary(
        comm,
        attacks.ColludingSigns(),
        evil,
        view=lambda p: beta * velocity + (1 - beta) * p.grad,
        place=lambda p, sent: p.grad.copy_((sent - beta * velocity) / (1 - beta)),
    )
    for step in range(3):
        weight.grad = torch.randn(200, generator=ballots.generator(comm.rank, step), dtype=torch.float64)
        momenta = np.stack(comm.allgather((beta * velocity + (1 - beta) * weight.grad).numpy()))
        honest = torch.from_numpy(momenta[[rank for rank in range(comm.size) if rank not in evil]])
        opposed = attacks.ColludingSigns()(honest[0], honest, torch.Generator())
        colluders.corrupt([weight])
        velocity = beta * velocity + (1 - beta) * weight.grad
        optimizer.synchronize()
        assert torch.equal(weight.grad, (honest.sign().sum(0) + len(evil) * opposed.sign()).sign())
        optimizer.zero_grad()


def test_a_parameter_without_gradient_counts_as_zeros(comm: MPI.Comm) -> None:
    first, second = ballots.parameters((4,), (4,), dtypes=[torch.float32])
    evil = upper_half(comm)
    if comm.rank != 0:
        first.grad = torch.ones(4)
    if comm.rank not in evil:
        second.grad = torch.full((4,), 2.0)
    adversary(comm, attacks.SignFlip(omniscient=True), evil).corrupt([first, second])
    if comm.rank in evil:
        others = comm.size - len(evil)
        torch.testing.assert_close(first.grad, torch.full((4,), -(others - 1) / others))
        assert second.grad is None
    else:
        assert (first.grad is None) == (comm.rank == 0)
        assert second.grad.tolist() == [2.0] * 4


def test_ranks_must_play_the_same_attack(comm: MPI.Comm) -> None:
    if comm.size == 1:
        return
    with pytest.raises(
        mpisign.ConsistencyError, match=rf"ranks \[{comm.size - 1}\] play another attack than the others"
    ):
        adversary(comm, attacks.SignFlip(), [0] if comm.rank < comm.size - 1 else [1])
