"""A vote applied to the parameters at once: the bits of torch's SGD, and p.grad keeps the rank's own gradient."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

import mpisign

from . import ballots
from .rows_of_zeros import SHAPES, gradients_with_zero_rows
from .wrapped import NAN, assert_equal_on_all_ranks, give, snapshot

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi

METHODS = {"signsgd": mpisign.signsgd(), "signum": mpisign.signum(0.9), "lion": mpisign.lion()}


def model(dtype: torch.dtype, transposed: bool = False) -> list[torch.nn.Parameter]:
    made = ballots.parameters(*SHAPES, dtypes=[dtype])
    for seed, parameter in enumerate(made):
        parameter.data = torch.randn(parameter.shape, generator=ballots.generator(seed)).to(dtype)
        if transposed and parameter.dim() == 2:
            parameter.data = parameter.data.t().contiguous().t()
    return made


def pair(
    dtype: torch.dtype, sgd: Callable[[list[Any]], torch.optim.Optimizer], transposed: bool = False, **options: Any
) -> list[tuple[list[torch.nn.Parameter], Any]]:
    """The same model twice: its votes applied at once, and by torch."""
    made = []
    for apply in ("auto", "optimizer"):
        tensors = model(dtype, transposed)
        made.append((tensors, mpisign.DistributedSignOptimizer(sgd(tensors), apply=apply, **options)))
    return made


def plain(tensors: list[Any]) -> torch.optim.Optimizer:
    """Two groups, of which one decays, if torch itself knows one way to round that."""
    decay = 0.1 if tensors[0].dtype in (torch.float32, torch.float64) else 0.0
    groups = [{"params": tensors[:3], "lr": 0.01, "weight_decay": decay}, {"params": tensors[3:]}]
    return torch.optim.SGD(groups, lr=0.3)


def took_itself(tensors: list[Any], gradients: list[torch.Tensor]) -> bool:
    """Whether p.grad is still what was given."""
    return all(torch.equal(p.grad, g) for p, g in zip(tensors, gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
@pytest.mark.parametrize("method", METHODS)
def test_it_is_what_sgd_would_do(comm: MPI.Comm, method: str, exchange: str, dtype: torch.dtype) -> None:
    """Also where rows are silent, a rank has a NaN, and the learning rate changes."""
    here, there = pair(dtype, plain, method=METHODS[method], exchange=exchange)
    for step in range(5):
        gradients = gradients_with_zero_rows(here[0], step, comm.rank)
        if step == 3 and comm.rank == comm.size - 1:
            gradients[2][0, 0] = NAN
        for tensors, optimizer in (here, there):
            optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
            give(tensors, gradients)
            optimizer.step()
        assert snapshot(here[0]) == snapshot(there[0]), step
        assert here[1].report.ties == there[1].report.ties
    assert_equal_on_all_ranks(comm, here[0])


@pytest.mark.parametrize("zeros", ["rows", "coin", "abstain", "positive"])
@pytest.mark.parametrize("ties", ["coin", "zero", "positive"])
def test_policies(comm: MPI.Comm, zeros: str, ties: str) -> None:
    here, there = pair(torch.float32, plain, method=mpisign.signsgd(), zeros=zeros, ties=ties)
    for step in range(4):
        gradients = gradients_with_zero_rows(here[0], step, comm.rank)
        for tensors, optimizer in (here, there):
            give(tensors, gradients)
            optimizer.step()
        assert snapshot(here[0]) == snapshot(there[0]), step


def test_gradients_stay_and_versions_count(comm: MPI.Comm) -> None:
    (tensors, optimizer), _ = pair(torch.float32, plain, method=mpisign.signsgd())
    gradients = gradients_with_zero_rows(tensors, comm.rank)
    give(tensors, gradients)
    before = [(p.data_ptr(), p._version) for p in tensors]
    optimizer.step()
    assert took_itself(tensors, gradients)
    for (where, version), p in zip(before, tensors, strict=True):
        assert (p.data_ptr(), p._version > version) == (where, True)
    optimizer.synchronize()
    assert all(set(p.grad.flatten().tolist()) <= {-1.0, 0.0, 1.0} for p in tensors)


def test_parameters_without_a_gradient_stay(comm: MPI.Comm) -> None:
    """Also if one rank has a gradient and the others none: then all move, and they still have none."""
    (tensors, optimizer), _ = pair(torch.float32, plain, method=mpisign.signsgd())
    before = [p.detach().clone() for p in tensors]
    give(tensors, [torch.ones(p.shape) if i != 1 and (i != 4 or comm.rank == 0) else None
                   for i, p in enumerate(tensors)])  # fmt: skip
    optimizer.step()
    assert torch.equal(tensors[1], before[1])
    assert not torch.equal(tensors[4], before[4])
    assert (tensors[4].grad is None) == (comm.rank > 0)
    assert_equal_on_all_ranks(comm, tensors)


def hooked(tensors: list[Any]) -> torch.optim.Optimizer:
    sgd = torch.optim.SGD(tensors, lr=0.1)
    sgd.register_step_post_hook(lambda *_: None)
    return sgd


def watched(tensors: list[Any]) -> torch.optim.Optimizer:
    """By somebody's function around its step(), which takes over what a scheduler has written on that."""
    sgd = torch.optim.SGD(tensors, lr=0.1)
    StepLR(sgd, 1)
    step = sgd.step
    sgd.step = functools.wraps(step)(functools.partial(step))  # type: ignore[method-assign]
    return sgd


class Mine(torch.optim.SGD):
    """What its step does, only its owner knows."""


NOT_PLAIN: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    "maximize": lambda tensors: torch.optim.SGD(tensors, lr=0.1, maximize=True),
    "momentum": lambda tensors: torch.optim.SGD(tensors, lr=0.1, momentum=0.9),
    "nesterov": lambda tensors: torch.optim.SGD(tensors, lr=0.1, momentum=0.9, nesterov=True),
    "a tensor": lambda tensors: torch.optim.SGD(tensors, lr=torch.tensor(0.1)),
    "a hook": hooked,
    "a function": watched,
    "a subclass": Mine,
    "another": torch.optim.Rprop,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_whatever_is_not_plain_sgd_steps_itself(comm: MPI.Comm, kind: str) -> None:
    here, there = pair(torch.float32, NOT_PLAIN[kind], method=mpisign.signsgd(), zeros="coin")
    for step in range(2):
        gradients = gradients_with_zero_rows(here[0], step, comm.rank)
        for tensors, optimizer in (here, there):
            give(tensors, gradients)
            optimizer.step()
        assert not took_itself(here[0], gradients)
        assert snapshot(here[0]) == snapshot(there[0])


@pytest.mark.parametrize("first", [False, True], ids=["after wrapping", "before"])
def test_schedulers_of_the_wrapped_one(comm: MPI.Comm, first: bool) -> None:
    """They replace its step() by a function that counts, and warn where they have not seen it called."""
    schedules = []

    def sgd(tensors: list[Any]) -> torch.optim.Optimizer:
        made = plain(tensors)
        if first:
            schedules.append(StepLR(made, 1, 0.5))
        return made

    here, there = pair(torch.float32, sgd, method=mpisign.signsgd())
    if not first:
        schedules += [StepLR(optimizer.wrapped, 1, 0.5) for _, optimizer in (here, there)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            gradients = gradients_with_zero_rows(here[0], step, comm.rank)
            for (tensors, optimizer), schedule in zip((here, there), schedules, strict=True):
                give(tensors, gradients)
                optimizer.step()
                schedule.step()
            assert took_itself(here[0], gradients)
            assert snapshot(here[0]) == snapshot(there[0]), step
    assert here[1].param_groups[0]["lr"] == 0.01 / 16


def test_a_scheduler_before_any_step_says_so(comm: MPI.Comm) -> None:
    """Also where nobody has voted."""
    (tensors, optimizer), _ = pair(torch.float32, plain, method=mpisign.signsgd())
    schedule = StepLR(optimizer.wrapped, 1)
    give(tensors, [torch.full(p.shape, NAN) for p in tensors])
    optimizer.step()
    with pytest.warns(UserWarning, match=r"lr_scheduler\.step\(\)` before"):
        schedule.step()


def test_one_rank_with_a_hook_changes_nothing(comm: MPI.Comm) -> None:
    sgd = hooked if comm.rank == 0 else plain_of_one_group
    (tensors, optimizer), _ = pair(torch.float32, sgd, method=mpisign.signsgd())
    for step in range(3):
        give(tensors, gradients_with_zero_rows(tensors, step, comm.rank))
        optimizer.step()
    assert_equal_on_all_ranks(comm, tensors)


def plain_of_one_group(tensors: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(tensors, lr=0.1)


def test_parameters_in_another_order_than_the_wires(comm: MPI.Comm) -> None:
    """Transposed ones are in their own, and those with gaps are left to torch."""
    here, there = pair(torch.float32, plain, transposed=True, method=mpisign.signsgd())
    for tensors, optimizer in (here, there):
        tensors[6].data = torch.zeros(80, 100)[::2]
        for step in range(3):
            give(tensors, gradients_with_zero_rows(tensors, step, comm.rank))
            optimizer.step()
    assert snapshot(here[0]) == snapshot(there[0])


def test_values_are_left_to_torch(comm: MPI.Comm) -> None:
    """A mean beside votes: one optimizer steps once."""

    def sgd(tensors: list[Any]) -> torch.optim.Optimizer:
        groups = [{"params": tensors[:3]}, {"params": tensors[3:], "method": mpisign.mean()}]
        return torch.optim.SGD(groups, lr=0.1)

    here, there = pair(torch.float32, sgd, method=mpisign.signsgd())
    for step in range(3):
        for tensors, optimizer in (here, there):
            give(tensors, gradients_with_zero_rows(tensors, step, comm.rank))
            optimizer.step()
    assert snapshot(here[0]) == snapshot(there[0])


def test_another_option_is_refused() -> None:
    with pytest.raises(mpisign.OptionError, match=r"apply='always' is not known: choose one of 'auto', 'optimizer'"):
        mpisign.DistributedSignOptimizer(plain_of_one_group(model(torch.float32)), apply="always")
