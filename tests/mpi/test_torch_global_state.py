"""No result depends on what a program has told torch: devices, types, modes, threads, seeds."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from methods_table import Make, walk_exchanges
from torch_states import MANY, STATES, State

import mpisign
from mpisign import attacks, checkpoint
from mpisign.checkpoint.state import map_tensors

from . import ballots
from .steps import drawn, wrap

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.mpi, pytest.mark.few]

SHAPES = ((181, 182), (33,), (7, 9))  # the first is large enough for torch to share it among threads


def model() -> list[torch.nn.Parameter]:
    return ballots.parameters(*SHAPES, dtypes=[torch.float32, torch.float32, torch.float64])


def text(tree: Any) -> str:
    """Every bit of it."""
    return repr(map_tensors(tree, lambda tensor: (tensor.dtype, tensor.detach().numpy().tobytes())))


def trained(comm: MPI.Comm, make: Make, exchange: str, state: State) -> str:
    """What four steps leave, of which every other one, and what precedes them, is made in that state."""
    tensors = model()
    with state():
        optimizer = wrap(tensors, make(comm.size), exchange=exchange)
    for at in range(4):
        for tensor, gradient in zip(tensors, drawn(tensors, at, comm.rank), strict=True):
            tensor.grad = gradient
        with state() if at % 2 == 0 else nullcontext():
            optimizer.step()
            shares = optimizer.report.agreement() if optimizer.method.elects else []
    return text([optimizer.state_dict(), tensors, optimizer.report.ties, shares])


@pytest.mark.long
@walk_exchanges(lambda method: not method.memory.private)  # whose noise nobody can repeat
def test_steps(comm: MPI.Comm, make: Make, exchange: str) -> None:
    usual = trained(comm, make, exchange, nullcontext)
    for name, state in MANY.items():
        assert trained(comm, make, exchange, state) == usual, name


@pytest.mark.parametrize("make", [mpisign.lion, mpisign.double_squeeze, mpisign.dgc])
def test_steps_in_each_state(comm: MPI.Comm, make: Callable[[], mpisign.Method]) -> None:
    usual = trained(comm, lambda size: make(), "auto", nullcontext)
    for name, state in STATES.items():
        assert trained(comm, lambda size: make(), "auto", state) == usual, name


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_gradients_made_in_it(comm: MPI.Comm, state: State) -> None:
    """By hand, without backward: in inference mode they are tensors that nothing outside may write to."""
    for method in (mpisign.signum(), mpisign.mean()):
        tensors = model()
        optimizer = wrap(tensors, method)
        gradients = drawn(tensors, 0, comm.rank)
        with state():
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor.grad = gradient.clone()
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                optimizer.step()
        expected = model()
        other = wrap(expected, method)
        for tensor, gradient in zip(expected, gradients, strict=True):
            tensor.grad = gradient.clone()
        other.step()
        assert text(tensors) == text(expected)


@pytest.mark.parametrize("state", MANY.values(), ids=MANY)
def test_all_else_that_ranks_do_together(comm: MPI.Comm, state: State, folder: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(9, 5), torch.nn.BatchNorm1d(5))
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.fill_(comm.rank)
    adam = torch.optim.AdamW(net.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="AdamW divides"):
        optimizer = mpisign.DistributedSignOptimizer(adam, method=mpisign.signum())
    for tensor in net.parameters():
        tensor.grad = torch.full_like(tensor, comm.rank - 0.5)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1 * (1 + comm.rank)
    extra = {"a": torch.arange(3)}
    with state():
        mpisign.broadcast_parameters(net.state_dict())
        mpisign.broadcast_optimizer_state(optimizer)
        mpisign.check_consistency(net, optimizer)
        checkpoint.save(folder, model=net, optimizer=optimizer, step=1, extra=extra)
    before = text([net.state_dict(), optimizer.state_dict()])
    for tensor in net.parameters():
        tensor.grad = torch.full_like(tensor, 0.5 - comm.rank)
    optimizer.step()
    after = text([net.state_dict(), optimizer.state_dict()])
    checkpoint.save(folder, model=net, optimizer=optimizer, step=2, asynchronous=True)
    with state():
        checkpoint.wait()
        resumed = checkpoint.load(folder / "step-00000001", model=net, optimizer=optimizer)
    assert resumed.extra["a"].tolist() == [0, 1, 2]
    assert text([net.state_dict(), optimizer.state_dict()]) == before
    for tensor in net.parameters():
        tensor.grad = torch.full_like(tensor, 0.5 - comm.rank)
    optimizer.step()
    assert text([net.state_dict(), optimizer.state_dict()]) == after


@pytest.mark.parametrize("state", MANY.values(), ids=MANY)
def test_attacks(comm: MPI.Comm, state: State) -> None:
    if comm.size == 1:
        pytest.skip("needs an honest rank")

    def sent(attack: attacks.Attack, state: State) -> str:
        tensors = model()
        for tensor, gradient in zip(tensors, drawn(tensors, 0, comm.rank), strict=True):
            tensor.grad = gradient
        with state():
            adversary = attacks.Adversary(attack, [0], comm, i_know_this_is_an_attack=True, seed=3)
            adversary.corrupt(tensors)
        return text([tensor.grad for tensor in tensors])

    every = [attacks.Gaussian(), attacks.RandomSigns(), attacks.ALittleIsEnough(), attacks.ColludingSigns()]
    every += [attacks.SignFlip(), attacks.SignFlip(omniscient=True), attacks.Constant(2.0), attacks.Mimic()]
    for attack in every:
        assert sent(attack, state) == sent(attack, nullcontext), attack


def test_nothing_is_drawn_from_global_generators(comm: MPI.Comm) -> None:
    before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002
    for method in (mpisign.noisy_signsgd(0.5), mpisign.dp_sign(1.0, 0.1), mpisign.sparsign(0.5), mpisign.dgc(0.05)):
        tensors = model()
        optimizer = wrap(tensors, method)
        for tensor, gradient in zip(tensors, drawn(tensors, 0, comm.rank), strict=True):
            tensor.grad = gradient
        optimizer.step()
        mpisign.broadcast_optimizer_state(optimizer)
        attacks.Adversary(attacks.Gaussian(), [0], comm, i_know_this_is_an_attack=True).corrupt(tensors)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (repr(np.random.get_state()), random.getstate()) == before[1:]  # noqa: NPY002
