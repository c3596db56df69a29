"""mpisign.optimizer on real ranks: those who do not vote, for want of a gradient or a finite one, or have joined."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

import pytest
import torch
from methods_table import FOUR, among, packs_signs

import mpisign

from . import ballots
from .wrapped import (
    EXCHANGES,
    INF,
    NAN,
    SHAPES,
    Wrapped,
    assert_equal_on_all_ranks,
    give,
    grads_of,
    lists,
    sizes_of,
    snapshot,
    wrap,
)

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi

AVERAGING = among(1, lambda method: packs_signs(method) and bool(method.memory.fields))

# ------------------------------------------------------------------------------------------- who does not vote


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_parameter_without_a_gradient_here_is_decided_by_the_others(comm: MPI.Comm, exchange: str) -> None:
    """Rank r lacks parameter r's gradient, everybody lacks the last one's."""
    tensors = ballots.parameters(*((40 + i,) for i in range(comm.size + 1)))
    optimizer = wrap(tensors, exchange=exchange)
    gradients: list[torch.Tensor | None] = list(ballots.draw(tensors, ballots.generator(comm.rank)))
    gradients[comm.rank] = gradients[-1] = None
    decisions, ties = ballots.vote(ballots.gathered(comm, gradients), sizes_of(tensors), 0)
    give(tensors, gradients)
    optimizer.step()
    assert decisions[-1] is None
    assert (decisions[0] is None) == (comm.size == 1)
    assert grads_of(tensors) == lists(decisions)
    assert optimizer.report.ties == ties
    assert not tensors[-1].any()
    if comm.size > 1:
        assert optimizer.report.voters == tuple(range(comm.size))
        assert not optimizer.report.skipped


def test_no_gradient_anywhere_skips_the_step(comm: MPI.Comm) -> None:
    tensors = [torch.nn.Parameter(torch.ones(5))]
    optimizer = Wrapped(torch.optim.SGD(tensors, lr=0.1, weight_decay=0.1))
    optimizer.step()
    assert optimizer.report.skipped
    assert optimizer.report.voters == ()
    assert optimizer.report.abstentions == dict.fromkeys(range(comm.size), "no gradient")
    assert tensors[0].tolist() == [1.0] * 5


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("method", FOUR, ids=attrgetter("name"))
def test_a_ballot_ends_at_what_is_not_finite(comm: MPI.Comm, method: mpisign.Method, bad: float, exchange: str) -> None:
    """The others decide there, and on all that follows, as if the rank were not there; before that it has its vote."""
    sick, ends_at = comm.size - 1, 2  # parameter 0 is sent last
    options = {"method": method, "zeros": "positive", "ties": "positive", "exchange": exchange}
    tensors, of_all, of_others = (ballots.parameters(*SHAPES) for _ in range(3))
    optimizer = wrap(tensors, **options)
    gradients = ballots.draw(tensors, ballots.generator(comm.rank))
    give(tensors, gradients)
    if comm.rank == sick:
        tensors[ends_at].grad[0, 0] = bad
    optimizer.step()
    report = optimizer.report
    assert report.voters == tuple(range(comm.size))
    assert report.abstentions == {}
    assert report.ended_at == {sick: f"p{ends_at}"}
    assert not report.skipped
    assert_equal_on_all_ranks(comm, tensors)

    together = wrap(of_all, **options)
    give(of_all, gradients)
    together.step()
    assert snapshot(tensors[ends_at + 1 :]) == snapshot(of_all[ends_at + 1 :])

    others = comm.Split(int(comm.rank == sick))
    mpisign.shutdown()
    mpisign.init(others)
    if comm.rank != sick:
        alone = wrap(of_others, **options)
        give(of_others, gradients)
        alone.step()
        assert snapshot(tensors[: ends_at + 1]) == snapshot(of_others[: ends_at + 1])
    elif comm.size == 1:
        assert not any(t.any() for t in tensors[: ends_at + 1])
    mpisign.shutdown()
    others.Free()


@pytest.mark.parametrize("method", AVERAGING.values(), ids=AVERAGING)
@pytest.mark.parametrize("dtype", ballots.DTYPES, ids=str)
def test_a_non_finite_gradient_does_not_poison_the_memory(
    comm: MPI.Comm, method: mpisign.Method, dtype: torch.dtype
) -> None:
    sick = comm.size - 1
    (tensor,) = tensors = ballots.parameters((40,), dtypes=[dtype])
    optimizer = wrap(tensors, method=method)
    for step in range(3):
        tensor.grad = torch.full_like(tensor, -2.0)
        if step == 1 and comm.rank == sick:
            tensor.grad[5] = NAN
        optimizer.step()
        assert optimizer.report.voters == tuple(r for r in range(comm.size) if step != 1 or r != sick)
    memory = optimizer.state_dict()["mpisign"]["memory"][0]["momentum"]
    assert memory.isfinite().all()
    assert (memory < 0).all()
    assert tensor.tolist() == [2.0 if comm.size == 1 else 3.0] * 40


def test_when_all_ranks_are_non_finite_no_rank_steps(comm: MPI.Comm) -> None:
    tensor = torch.nn.Parameter(torch.ones(40))
    optimizer = Wrapped(torch.optim.SGD([tensor], lr=0.1, weight_decay=0.1, momentum=0.9))
    tensor.grad = torch.full((40,), NAN)
    optimizer.step()
    assert optimizer.report.skipped
    assert optimizer.report.abstentions == dict.fromkeys(range(comm.size), "non-finite gradient")
    assert tensor.tolist() == [1.0] * 40
    assert not optimizer.state
    tensor.grad = torch.ones(40)
    optimizer.step()
    assert not optimizer.report.skipped
    assert (tensor < 1).all()


@pytest.mark.parametrize(("zeros", "moves"), [("abstain", -1.0), ("positive", 1.0)])
def test_silent_coordinates(comm: MPI.Comm, zeros: str, moves: float) -> None:
    """Rank 0 says -1 and all others say nothing: who is heard depends on what a zero votes."""
    (tensor,) = tensors = ballots.parameters((50,))
    optimizer = wrap(tensors, zeros=zeros, ties="positive")
    tensor.grad = torch.full((50,), -1.0 if comm.rank == 0 else 0.0)
    optimizer.synchronize()
    assert tensor.grad.tolist() == [-1.0 if comm.size == 1 else moves] * 50


def test_a_coordinate_on_which_all_are_silent_stays(comm: MPI.Comm) -> None:
    (tensor,) = tensors = ballots.parameters((50,))
    optimizer = wrap(tensors, zeros="abstain", ties="positive")
    tensor.grad = torch.zeros(50)
    tensor.grad[::2] = -0.0
    optimizer.synchronize()
    assert tensor.grad.tolist() == [0.0] * 50
    assert optimizer.report.ties == 0


# ------------------------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("unscale_first", [False, True])
def test_a_rank_whose_scaler_found_inf_abstains(comm: MPI.Comm, unscale_first: bool) -> None:
    sick = comm.size - 1
    tensor = torch.nn.Parameter(torch.zeros(40))
    optimizer = wrap([tensor], method=mpisign.signum(0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        optimizer.zero_grad()
        factor = INF if step == 1 and comm.rank == sick else -2.0
        scaler.scale((tensor * factor).sum()).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            assert optimizer.report.abstentions == {sick: "inf found by GradScaler"}
            assert optimizer.report.voters == tuple(range(sick))
        else:
            assert optimizer.report.abstentions == {}
    assert scaler.get_scale() == (512.0 if comm.rank == sick else 1024.0)
    assert tensor.tolist() == [2.0 if comm.size == 1 else 3.0] * 40
    memory = optimizer.state_dict()["mpisign"]["memory"][0]["momentum"]
    # Unscaled, and an average of as many gradients of -2 as this rank has voted with.
    assert memory.tolist() == [-1.5 if comm.rank == sick else -1.75] * 40


def test_a_scaled_gradient_votes_with_its_sign_even_where_unscaling_underflows(comm: MPI.Comm) -> None:
    """Small gradients are what the scaler is for: 2^-10 / 2^16 is no fp16 number, and still negative."""
    tensor = torch.nn.Parameter(torch.zeros(64, dtype=torch.float16))
    optimizer = wrap([tensor])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.zeros(()))  # from here on it has a scale
    tensor.grad = torch.full_like(tensor, -(2.0**-10))
    scaler.step(optimizer)
    assert tensor.tolist() == [1.0] * 64


@pytest.mark.mpi(min_size=2)
def test_a_rank_without_a_gradient_under_a_scaler(comm: MPI.Comm) -> None:
    (tensor,) = tensors = ballots.parameters((40,), dtypes=[torch.float32])
    optimizer = wrap(tensors)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = scaler.scale(-tensor.sum())
    if comm.rank != 0:
        loss.backward()
    scaler.step(optimizer)
    assert optimizer.report.abstentions == {0: "no gradient"}
    assert tensor.tolist() == [1.0] * 40


# ------------------------------------------------------------------------------------------- join


@pytest.mark.parametrize("method", FOUR, ids=attrgetter("name"))
def test_join_with_uneven_batches(comm: MPI.Comm, method: mpisign.Method) -> None:
    """Rank r has 2 + r batches: the last rank ends alone, and the others get what it then has."""
    tensors = ballots.parameters(*SHAPES)
    sgd = torch.optim.SGD(tensors, lr=0.25, momentum=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, step_size=2, gamma=0.5)
    optimizer = Wrapped(sgd, ballots.named(tensors), method=method)
    last = comm.size - 1
    random = ballots.generator(comm.rank)
    for step in range(2 + comm.rank):
        give(tensors, ballots.draw(tensors, random))
        optimizer.step()
        schedule.step()
        joined = [r for r in range(comm.size) if 2 + r <= step]
        assert optimizer.report.abstentions == dict.fromkeys(joined, "joined")
    assert optimizer.join() == last
    assert_equal_on_all_ranks(comm, tensors)
    assert_equal_on_all_ranks(comm, [optimizer.state[t]["momentum_buffer"] for t in tensors])
    assert {group["lr"] for group in optimizer.param_groups} == set(comm.allgather(sgd.param_groups[0]["lr"]))
    assert all(t.any() for t in tensors if t.numel() > 1)

    give(tensors, ballots.draw(tensors, random))  # and the next epoch begins in step
    optimizer.step()
    assert optimizer.report.step == 2 + last
    assert optimizer.report.abstentions == {}
    assert_equal_on_all_ranks(comm, tensors)


def test_the_last_rank_alone_decides_the_steps_it_makes_alone(comm: MPI.Comm) -> None:
    (tensor,) = tensors = ballots.parameters((40,))
    optimizer = wrap(tensors)
    mine = 1.0 if comm.rank == comm.size - 1 else -1.0
    for _ in range(1 if mine < 0 else 4):
        tensor.grad = torch.full((40,), mine)
        optimizer.step()
    optimizer.join()
    together = {1: -1.0, 2: None}.get(comm.size, 1.0)  # a tie of two is the coin's
    if together is not None:
        assert tensor.tolist() == [together - 3.0] * 40
    else:
        assert set(tensor.tolist()) == {1.0 - 3.0, -1.0 - 3.0}


def test_those_who_join_at_the_same_time_keep_what_they_have(comm: MPI.Comm) -> None:
    (tensor,) = tensors = ballots.parameters((40,))
    optimizer = wrap(tensors)
    tensor.grad = torch.ones(40)
    optimizer.step()
    assert optimizer.join() == 0
    assert optimizer.join() == 0
    assert tensor.tolist() == [-1.0] * 40
