"""mpisign.methods on real ranks: what every method promises to any number of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from methods_table import Make, walk

import mpisign
from mpisign import Method
from mpisign.rules import VectorRule

from . import ballots
from .steps import assert_same_everywhere, drawn, model, step, wrap

if TYPE_CHECKING:
    from mpi4py import MPI


pytestmark = pytest.mark.mpi


# ------------------------------------------------------------------------------------------- every method


@walk(lambda method: not method.exchanges_models)
def test_replicas_stay_the_same(comm: MPI.Comm, make: Make) -> None:
    tensors = model()
    optimizer = wrap(tensors, make(comm.size))
    for at in range(4):
        optimizer.set_epoch(at // 2)
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
    assert_same_everywhere(comm, tensors)
    assert all(torch.isfinite(t).all() for t in tensors)
    assert any((t != 0).any() for t in tensors)


@walk()
def test_a_nan_ends_a_ballot_and_memories_take_in_what_is_finite(comm: MPI.Comm, make: Make) -> None:
    """It is in the last parameter of the wire, so all others are voted on, except by methods that see all first."""
    tensors = model()
    optimizer = wrap(tensors, make(comm.size))
    step(optimizer, tensors, drawn(tensors, 0, comm.rank))
    before = copy.deepcopy(optimizer.state_dict()["mpisign"]["memory"])
    memory, rule = optimizer.method.memory, optimizer.method.rule
    wholly = memory.needs_all or isinstance(rule, VectorRule)
    # What follows the decision is the same on all ranks.
    common = {"average", "momentum", "variance"} if memory.running else set()
    gradients = drawn(tensors, 1, comm.rank)
    broken = comm.rank == comm.size - 1
    if broken:
        gradients[0].view(-1)[3] = torch.nan
    step(optimizer, tensors, gradients)
    if not optimizer.method.exchanges_models:
        assert optimizer.report.skipped == (comm.size == 1 and wholly)
        assert optimizer.report.ended_at == {comm.size - 1: "p0"}
        assert (comm.size - 1 in optimizer.report.voters) == (not wholly)
        assert_same_everywhere(comm, tensors)
    assert all(torch.isfinite(t).all() for t in tensors)
    if broken:
        for place, fields in optimizer.state_dict()["mpisign"]["memory"].items():
            for key in fields.keys() - common:
                if memory.needs_all:
                    assert torch.equal(fields[key], before[place][key]), key
                elif place == 0:
                    assert fields[key].view(-1)[3] == before[place][key].view(-1)[3], key
                assert torch.isfinite(fields[key]).all()


@pytest.mark.parametrize(
    ("make", "spare"),
    [
        (mpisign.trimmed_mean, 1),
        (mpisign.krum, 3),
        (mpisign.multi_krum, 3),
        (mpisign.nearest_neighbour_mixing, 1),
        (mpisign.monna, 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_too_many_adversaries_for_the_job(comm: MPI.Comm, make: Callable[[int], Method], spare: int) -> None:
    """It is said when the optimizer is made, on every rank; one adversary fewer is fine."""
    most = (comm.size - spare) // 2
    with pytest.raises(mpisign.OptionError, match=rf"at least 2 f \+ {spare} = .*, and this job has {comm.size}"):
        wrap(model(), make(most + 1))
    if most >= 0:
        wrap(model(), make(most))


@walk(lambda method: isinstance(method.rule, VectorRule))
def test_whole_vectors_cannot_be_decided_in_shards(comm: MPI.Comm, make: Make) -> None:
    with pytest.raises(mpisign.OptionError, match=r"exchange='two_phase' decides shards.* needs whole vectors"):
        wrap(model(), make(comm.size), exchange="two_phase")


# ------------------------------------------------------------------------------------------- loss scaling


@walk(lambda method: not method.memory.private)  # whose noise cannot be drawn again
def test_a_loss_scale_makes_no_difference(comm: MPI.Comm, make: Make) -> None:
    """GradScaler's factor is taken out once, of all that a memory looks at: bounds and norms, too."""
    scaled, plain = ballots.parameters((40, 3), (7,)), ballots.parameters((40, 3), (7,))
    optimizers = [wrap(tensors, make(comm.size)) for tensors in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for at in range(3):
        gradients = drawn(plain, at, comm.rank)
        for tensor, gradient in zip(scaled, gradients, strict=True):
            tensor.grad = gradient * scaler.get_scale()
        scaler.scale(torch.zeros(()))  # what makes a scaler work without a loss
        scaler.step(optimizers[0])
        scaler.update()
        step(optimizers[1], plain, gradients)
    for a, b in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
