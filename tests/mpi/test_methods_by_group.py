"""Parameter groups with methods of their own, on real ranks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from methods_table import TABLE, among, is_random

import mpisign

from . import ballots
from .steps import EXCHANGES, assert_same_everywhere, drawn

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi

SHAPES = ((20, 10), (33,), (7, 3), (500,), (), (64,))
OTHERS = [name for name, method in among(5).items() if not method.exchanges_models]


def grouped(method: mpisign.Method, of_group: mpisign.Method, **options: Any) -> tuple[list[torch.nn.Parameter], Any]:
    """Every second parameter is by a method of its own."""
    tensors = ballots.parameters(*SHAPES, dtypes=[torch.float32])
    groups = [{"params": tensors[::2]}, {"params": tensors[1::2], "method": of_group}]
    optimizer = mpisign.DistributedSignOptimizer(
        torch.optim.SGD(groups, lr=0.1), ballots.named(tensors), method=method, **options
    )
    optimizer.set_epoch(0)
    return tensors, optimizer


def alone(tensors: list[torch.nn.Parameter], method: mpisign.Method, **options: Any) -> Any:
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(tensors, lr=0.1), method=method, **options)
    optimizer.set_epoch(0)
    return optimizer


def test_norms_by_full_precision_and_the_rest_by_vote(comm: MPI.Comm) -> None:
    tensors, optimizer = grouped(mpisign.signum(), mpisign.mean())
    gradients = drawn(tensors, 0, comm.rank)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient.clone()
    optimizer.step()
    means = [np.mean(its, axis=0) for its in zip(*ballots.gathered(comm, gradients), strict=True)]
    for tensor, mean in list(zip(tensors, means, strict=True))[1::2]:
        np.testing.assert_allclose(ballots.flat(tensor.grad), mean, rtol=1e-5, atol=1e-6)
    assert all((tensor.grad.abs() == 1).all() for tensor in tensors[::2])
    report = optimizer.report
    assert set(report.method.split(", ")) == {"signum", "mean"}
    assert isinstance(report.ties, int)
    assert len(report.agreement()) == comm.size
    assert report.voters == tuple(range(comm.size))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", OTHERS)
def test_each_parameter_goes_as_its_method_goes_alone(comm: MPI.Comm, name: str, exchange: str) -> None:
    """Beside signum's, whose coins do not matter here as nothing is zero and no vote of ours ties."""
    other = TABLE[name](comm.size)
    if exchange not in exchanges(other):
        pytest.skip("it cannot be decided in shards")
    usual = mpisign.signum()
    tensors, optimizer = grouped(usual, other, exchange=exchange, ties="zero")
    apart = [copy.deepcopy(tensors[::2]), copy.deepcopy(tensors[1::2])]
    optimizers = [
        alone(apart[0], usual, exchange=exchange, ties="zero"),
        alone(apart[1], other, exchange=exchange, ties="zero"),
    ]
    for at in range(3):
        gradients = drawn(tensors, at, comm.rank)
        for some, its in ((tensors, gradients), (apart[0], gradients[::2]), (apart[1], gradients[1::2])):
            for tensor, gradient in zip(some, its, strict=True):
                tensor.grad = gradient.clone()
        for one in (optimizer, *optimizers):
            one.step()
        assert_same_everywhere(comm, tensors)
        assert all(torch.equal(a, b) for a, b in zip(tensors[::2], apart[0], strict=True)), at
        if not is_random(other):  # noise is of the place in the layout
            assert all(torch.equal(a, b) for a, b in zip(tensors[1::2], apart[1], strict=True)), at


def test_a_nan_ends_the_ballot_of_its_method_alone(comm: MPI.Comm) -> None:
    tensors, optimizer = grouped(mpisign.signum(), mpisign.mean())
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    if comm.rank == comm.size - 1:
        tensors[3].grad[7] = torch.nan
    optimizer.step()
    assert optimizer.report.ended_at == {comm.size - 1: "p3"}
    assert all((tensor.grad == 1).all() for tensor in tensors[::2])
    assert (tensors[5].grad == 1).all()
    if comm.size == 1:
        assert tensors[3].grad is None
        assert tensors[1].grad is None


def test_states_know_the_methods(comm: MPI.Comm) -> None:
    """Resuming is exact, a method is no part of the state, and another method's memory starts fresh with a warning."""
    tensors, optimizer = grouped(mpisign.signum(), mpisign.ef_signsgd())
    for at in range(4):
        if at == 2:
            saved, kept = copy.deepcopy((optimizer.state_dict(), tensors))
        for tensor, gradient in zip(tensors, drawn(tensors, at, comm.rank), strict=True):
            tensor.grad = gradient.clone()
        optimizer.step()
    assert all("method" not in group for group in saved["param_groups"])
    again, other = grouped(mpisign.signum(), mpisign.ef_signsgd())
    other.load_state_dict(saved)
    for mine, its in zip(again, kept, strict=True):
        mine.data.copy_(its.data)
    assert other.param_groups[1]["method"].name == "ef_signsgd"
    for at in (2, 3):
        for tensor, gradient in zip(again, drawn(again, at, comm.rank), strict=True):
            tensor.grad = gradient.clone()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(again, tensors, strict=True))
    _, different = grouped(mpisign.signum(), mpisign.mean())
    with pytest.warns(UserWarning, match="starts fresh"):
        different.load_state_dict(saved)


def test_models_cannot_be_exchanged_beside_gradients(comm: MPI.Comm) -> None:
    with pytest.raises(mpisign.OptionError, match="monna exchanges models, so it must be the method of all parameters"):
        grouped(mpisign.signum(), mpisign.monna(0))
    with pytest.raises(mpisign.OptionError, match="of a parameter group is not a Method"):
        grouped(mpisign.signum(), "mean")  # type: ignore[arg-type]


def test_ranks_with_other_methods_for_a_group_are_named(comm: MPI.Comm) -> None:
    if comm.size == 1:
        return
    tensors, optimizer = grouped(mpisign.signum(), mpisign.mean() if comm.rank else mpisign.median())
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    with pytest.raises(mpisign.ConsistencyError, match="another layout"):
        optimizer.step()


def test_a_checkpoint_of_such_a_job(comm: MPI.Comm, tmp_path: Any) -> None:
    folder = comm.bcast(tmp_path)
    tensors, optimizer = grouped(mpisign.signum(), mpisign.ef_signsgd())
    model = torch.nn.ParameterList(tensors)
    for tensor, gradient in zip(tensors, drawn(tensors, 0, comm.rank), strict=True):
        tensor.grad = gradient.clone()
    optimizer.step()
    mpisign.checkpoint.save(folder, model, optimizer, step=1)
    again, other = grouped(mpisign.signum(), mpisign.ef_signsgd())
    mpisign.checkpoint.load(folder, torch.nn.ParameterList(again), other)
    mpisign.check_consistency(torch.nn.ParameterList(again), other)
    for place, fields in optimizer.state_dict()["mpisign"]["memory"].items():
        for field, value in fields.items():
            assert torch.equal(value, other.state_dict()["mpisign"]["memory"][place][field])


@pytest.mark.mpi(min_size=2)
def test_join_with_methods_by_group(comm: MPI.Comm) -> None:
    tensors, optimizer = grouped(mpisign.signum(), mpisign.mean())
    for at in range(1 + comm.rank):
        for tensor, gradient in zip(tensors, drawn(tensors, at, comm.rank), strict=True):
            tensor.grad = gradient.clone()
        optimizer.step()
    optimizer.join()
    assert_same_everywhere(comm, tensors)
    assert optimizer.param_groups[1]["method"].name == "mean"
