"""Rows of zeros on real ranks: who has one abstains there, from the step on that follows the first such row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import oracle
import pytest
import torch

import mpisign

from . import ballots
from .rows_of_zeros import SHAPES, gradients_with_zero_rows
from .wrapped import NAN, assert_equal_on_all_ranks, give, wrap

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi

EXCHANGES = ("allgather", "two_phase")


def expected_vote(
    everyones: list[list[Any]], step: int, told: set[int], mean: bool = False
) -> tuple[list[Any], int, set[int]]:
    """By the oracle: each parameter's decision, the ties, and the parameters in which somebody has a row of zeros."""
    sizes = [g.size for g in everyones[0]]
    decisions, tied, found = [], 0, set()
    for i, start in enumerate(oracle.first_words(sizes)):
        cast = []
        for rank, mine in enumerate(everyones):
            zero = oracle.zero_rows(mine[i], SHAPES[i])
            if zero.any():
                found.add(i)
            coin = ballots.coins(0, step, oracle.zeros_stream(rank), start, sizes[i])
            cast.append(np.where(zero & (i in told), 0, oracle.ballot(mine[i], "coin", coin)))
        if mean:
            spoken = np.sum([ballot != 0 for ballot in cast], axis=0)
            decisions.append(np.sum(cast, axis=0) / np.maximum(spoken, 1))
            continue
        decision, here = oracle.majority(cast, "coin", ballots.coins(0, step, oracle.TIES, start, sizes[i]))
        decisions.append(np.where(np.any([ballot != 0 for ballot in cast], axis=0), decision, 0))
        tied += here
    return decisions, tied, found


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("cap", [None, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_zeros_abstain(comm: MPI.Comm, dtype: torch.dtype, cap: float | None, exchange: str) -> None:
    tensors = ballots.parameters(*SHAPES, dtypes=[dtype])
    optimizer = wrap(tensors, zeros="rows", exchange=exchange, bucket_cap_mb=cap)
    told: set[int] = set()
    for step in range(5):
        gradients = gradients_with_zero_rows(tensors, step, comm.rank)
        everyones = ballots.gathered(comm, gradients)
        decisions, ties, found = expected_vote(everyones, step, told)
        give(tensors, gradients)
        optimizer.step()
        for i, (tensor, decision) in enumerate(zip(tensors, decisions, strict=True)):
            assert ballots.flat(tensor.grad).tolist() == decision.tolist(), (step, i)
        assert optimizer.report.ties == ties
        told |= found
        assert optimizer.state_dict()["mpisign"]["rows"] == sorted(told)
    assert told
    assert_equal_on_all_ranks(comm, tensors)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_mean_of_signs_is_of_those_who_speak(comm: MPI.Comm, exchange: str) -> None:
    tensors = ballots.parameters(*SHAPES, dtypes=[torch.float64])
    optimizer = wrap(tensors, method=mpisign.lion(0.0, 0.0, vote=False), zeros="rows", exchange=exchange)
    told: set[int] = set()
    for step in range(4):
        gradients = gradients_with_zero_rows(tensors, step, comm.rank)
        decisions, _, found = expected_vote(ballots.gathered(comm, gradients), step, told, mean=True)
        give(tensors, gradients)
        optimizer.step()
        for tensor, decision in zip(tensors, decisions, strict=True):
            np.testing.assert_allclose(ballots.flat(tensor.grad), decision, rtol=1e-15)
        told |= found


def test_an_embedding_that_nobody_looks_up_stays(comm: MPI.Comm) -> None:
    """Padding and unused rows, which with coins alone would walk at full speed."""
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(50, 64, padding_idx=0)
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(embedding.parameters(), lr=1e-3))
    before = embedding.weight.detach().clone()
    for step in range(20):
        optimizer.zero_grad(set_to_none=False)
        random = ballots.generator(step, comm.rank)
        embedding(torch.randint(0, 20, (8,), generator=random)).square().sum().backward()
        optimizer.step()
        if step == 0:
            before.copy_(embedding.weight.detach())  # the first such step still tosses coins
    moved = (embedding.weight != before).any(1)
    assert not moved[20:].any()
    assert not moved[0]
    assert moved[1:20].all()


def test_models_without_zero_rows_pay_nothing(comm: MPI.Comm) -> None:
    tensors = ballots.parameters((9, 64), (33,), dtypes=[torch.float32])
    sizes = []
    for zeros in ("rows", "coin"):
        optimizer = wrap(tensors, zeros=zeros)
        for _ in range(3):
            give(tensors, [torch.ones_like(t) for t in tensors])
            optimizer.step()
            sizes.append(optimizer.report.bytes_sent)
    assert len(set(sizes)) == 1, "two segments' bits fit into the same byte"


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_agreement_counts_rows_that_spoke(comm: MPI.Comm, exchange: str) -> None:
    """Rank 0 has a row of zeros; on the other all agree."""
    (tensor,) = ballots.parameters((2, 64), dtypes=[torch.float32])
    optimizer = wrap([tensor], zeros="rows", exchange=exchange)
    for _ in range(2):
        tensor.grad = torch.ones(2, 64)
        if comm.rank == 0:
            tensor.grad[1] = 0
        optimizer.step()
    assert optimizer.report.agreement() == [1.0] * comm.size
    if comm.size == 1:
        assert tensor.grad[1].tolist() == [0.0] * 64


def test_with_a_nan_in_another_parameter(comm: MPI.Comm) -> None:
    """Who has ended its ballot before it does not say anything of its rows."""
    first, last = ballots.parameters((3, 64), (3, 64), dtypes=[torch.float32])
    optimizer = wrap([first, last], zeros="rows")
    for step in range(3):
        first.grad, last.grad = torch.full((3, 64), -1.0), torch.ones(3, 64)
        first.grad[1] = 0
        if step == 2 and comm.rank == comm.size - 1:
            last.grad[0, 0] = NAN
        optimizer.step()
    if comm.size > 1:
        assert first.grad[0].tolist() == [-1.0] * 64
        assert first.grad[1].tolist() == [0.0] * 64
    assert_equal_on_all_ranks(comm, [first, last])


@pytest.mark.mpi(min_size=2)
def test_ranks_that_tell_of_other_rows_are_named(comm: MPI.Comm) -> None:
    """As after loading different states: the headers' sizes would not fit each other."""
    (tensor,) = ballots.parameters((3, 64), dtypes=[torch.float32])
    optimizer = wrap([tensor], zeros="rows")
    if comm.rank == 0:
        optimizer._memory.rows.add(tensor)
    tensor.grad = torch.ones(3, 64)
    with pytest.raises(mpisign.ConsistencyError, match=r"ranks .* have another layout .*rows of 'p0' are told"):
        optimizer.step()


@pytest.mark.parametrize("how", ["transposed", "channels last"])
def test_rows_are_those_of_the_first_dimension_whatever_the_order_in_memory(comm: MPI.Comm, how: str) -> None:
    weight = (
        torch.zeros(64, 4).t() if how == "transposed" else torch.zeros(4, 8, 3, 3).to(memory_format=torch.channels_last)
    )
    tensor = torch.nn.Parameter(weight)
    optimizer = wrap([tensor], zeros="rows")
    for _ in range(2):
        tensor.grad = torch.full_like(tensor, -1.0)
        tensor.grad[2] = 0
        optimizer.step()
    rows = tensor.grad.flatten(1)
    assert rows[2].tolist() == [0.0] * rows.shape[1]
    assert (rows[[0, 1, 3]] == -1).all()
