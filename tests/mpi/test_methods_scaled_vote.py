"""mpisign.scaled_vote on real ranks: the oracle's decisions by every exchange, and what a minority cannot do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import oracle
import pytest
import torch

import mpisign
from mpisign.attacks import Adversary, Constant, Scaled, SignFlip

from . import ballots
from .steps import assert_same_everywhere, drawn, memories, step, wrap

if TYPE_CHECKING:
    from mpi4py import MPI

    from .ballots import Floats

pytestmark = pytest.mark.mpi

EXCHANGES = ("allgather", "two_phase", "auto")
# Rows of 64 and of 70 elements, of which some are cut by shards; less than 64; vectors, a scalar, nothing.
SHAPES = ((9, 64), (6, 7, 10), (5, 63), (333,), (), (0,), (40, 100), (1, 200), (1,))


def model(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return ballots.parameters(*SHAPES, dtypes=[dtype])


def gradients(tensors: Sequence[torch.Tensor], *seeds: int) -> list[torch.Tensor]:
    """Multiples of 1/4, of another size on each rank; a fifth are zero, and a third of all rows."""
    random = ballots.generator(*seeds)
    drawn = []
    for t in tensors:
        values = torch.randn(t.shape, generator=random, dtype=torch.float64).mul(4 + seeds[-1]).round().div(4)
        values[torch.rand(t.shape, generator=random) < 0.2] = 0
        if t.dim() > 1:
            values[torch.rand(t.shape[0], generator=random) < 0.33] = 0
        drawn.append(values.to(t.dtype))
    return drawn


def wire(tensor: torch.Tensor) -> Floats:
    """A dense tensor's elements in the order of the wire, which is the one in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).double().numpy()


def rows_of(tensor: torch.Tensor) -> Any:
    """The row of each element, in the wire's order."""
    rows = oracle.count_rows(tuple(tensor.shape))
    index = torch.empty_like(tensor, dtype=torch.int64)
    index.copy_(torch.arange(rows).view(-1, *[1] * (tensor.dim() - 1)) if tensor.dim() else torch.zeros(()))
    return wire(index).astype(np.int64)


def expected(
    tensors: Sequence[torch.Tensor], everyones: Sequence[Sequence[torch.Tensor | None]], at: int, **policy: Any
) -> list[Floats | None]:
    first_words, words = {}, 0
    for place in reversed(range(len(tensors))):
        first_words[place] = words
        words += -(-tensors[place].numel() // 32) + 1
    decided: list[Floats | None] = []
    for place, tensor in enumerate(tensors):
        given = {rank: its[place] for rank, its in enumerate(everyones) if its[place] is not None}
        updates = [wire(g) for g in given.values()]
        decided.append(
            oracle.scaled_vote(updates, rows_of(tensor), at, first_words[place], ranks=list(given), **policy)
            if updates
            else None
        )
    return decided


def check(ours: Sequence[torch.Tensor], decided: Sequence[Floats | None]) -> None:
    for tensor, its in zip(ours, decided, strict=True):
        assert (tensor.grad is None) == (its is None)
        if its is not None and tensor.grad is not None:
            np.testing.assert_allclose(wire(tensor.grad), its, rtol=1e-6, atol=0)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("ties", ["coin", "zero", "positive"])
@pytest.mark.parametrize("zeros", ["rows", "coin", "abstain", "positive"])
def test_it_is_the_oracles(comm: MPI.Comm, zeros: str, ties: str, exchange: str) -> None:
    """Also where rank 0 has no gradient of a parameter, and where a NaN ends the last rank's ballot."""
    tensors = model(torch.float64)
    optimizer = wrap(tensors, mpisign.scaled_vote(), exchange=exchange, zeros=zeros, ties=ties, seed=3)
    for at in range(3):
        everyones: list[list[torch.Tensor | None]] = [list(gradients(tensors, at, r)) for r in range(comm.size)]
        everyones[0][6] = None
        mine = list(everyones[comm.rank])
        if at == 2 and comm.size > 1:
            broken = everyones[-1][3]
            if comm.rank == comm.size - 1:
                mine[3] = torch.full_like(broken, torch.nan)
            everyones[-1][:4] = [None] * 4
        for tensor, gradient in zip(tensors, mine, strict=True):
            tensor.grad = None if gradient is None else gradient.clone()
        optimizer.step()
        check(tensors, expected(tensors, everyones, at, zeros=zeros, ties=ties, seed=3))
    assert_same_everywhere(comm, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_exchanges_decide_the_same_bits(comm: MPI.Comm, dtype: torch.dtype) -> None:
    """However the messages are cut: a part of a row has the scale of the whole, and the coins are the same ones."""
    seen = []
    for exchange, cap in (("allgather", 1.0), ("two_phase", 1.0), ("two_phase", 64 / 2**20), ("auto", 4e-5)):
        tensors = model(dtype)
        optimizer = wrap(tensors, mpisign.scaled_vote(0.5), exchange=exchange, bucket_cap_mb=cap)
        for at in range(3):
            step(optimizer, tensors, gradients(tensors, at, comm.rank))
        seen.append([ballots.flat(t).tolist() for t in tensors])
    assert all(its == seen[0] for its in seen)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_rows_that_lie_apart(comm: MPI.Comm, exchange: str) -> None:
    """Channels last, and a transposed weight."""
    tensors = [
        torch.nn.Parameter(torch.zeros(6, 20, 5, 5).contiguous(memory_format=torch.channels_last)),
        torch.nn.Parameter(torch.zeros(100, 7).t()),
        torch.nn.Parameter(torch.zeros(70)),
    ]
    optimizer = wrap(tensors, mpisign.scaled_vote(), exchange=exchange)
    for at in range(2):
        everyones = [gradients(tensors, at, rank) for rank in range(comm.size)]
        laid = [[torch.empty_like(t).copy_(g).detach() for t, g in zip(tensors, its, strict=True)] for its in everyones]
        step(optimizer, tensors, laid[comm.rank])
        check(tensors, expected(tensors, laid, at))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_row_that_most_ranks_do_not_use_stays(comm: MPI.Comm, exchange: str) -> None:
    """A large vocabulary of which each rank looks up few words."""
    (words,) = tensors = ballots.parameters((500, 64), dtypes=[torch.float32])
    optimizer = wrap(tensors, mpisign.scaled_vote(), exchange=exchange)
    used = np.zeros((comm.size, 500), bool)
    for rank in range(comm.size):
        used[rank, :3] = True  # of all
        used[rank, 10 * rank + 10 : 10 * rank + 20] = True  # of this rank alone
    gradient = torch.zeros(500, 64)
    gradient[torch.from_numpy(used[comm.rank])] = 1.0 + comm.rank
    for _ in range(20):
        step(optimizer, tensors, [gradient])
    scale = np.median(np.where(used, np.arange(1.0, 1 + comm.size)[:, None], 0.0), axis=0)
    np.testing.assert_allclose(words.detach().numpy(), -2.0 * np.repeat(scale[:, None], 64, 1), rtol=1e-5)
    assert not words[-100:].any()


@pytest.mark.parametrize(
    "attack", [SignFlip(), Scaled(-1e30), Scaled(0.0), Constant(math.nan), Constant(3e38)], ids=repr
)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_minority_moves_neither_signs_nor_scales(comm: MPI.Comm, exchange: str, attack: Any) -> None:
    """Where the honest agree on a sign, it stays; the scale stays between the smallest and the largest of theirs."""
    hostile = (comm.size - 1) // 2
    tensors = ballots.parameters((4, 64), (10,), dtypes=[torch.float32])
    optimizer = wrap(tensors, mpisign.scaled_vote(), exchange=exchange)
    adversary = Adversary(attack, range(hostile), comm, i_know_this_is_an_attack=True)
    for tensor in tensors:
        tensor.grad = torch.full_like(tensor, 2.0 + comm.rank)
    adversary.corrupt(tensors)
    optimizer.step()
    for tensor in tensors:
        assert bool((tensor.grad >= 2.0 + hostile).all())
        assert bool((tensor.grad <= 1.0 + comm.size).all())


def test_error_feedback_keeps_what_a_ranks_own_message_loses(comm: MPI.Comm) -> None:
    tensors = model(torch.float64)
    optimizer = wrap(tensors, mpisign.scaled_vote(error_feedback=True), exchange="two_phase")
    errors = [np.zeros(t.numel()) for t in tensors]
    for at in range(3):
        mine = drawn(tensors, at, comm.rank)
        for place, gradient in enumerate(mine):
            p = errors[place] + ballots.flat(gradient)
            row = rows_of(tensors[place])
            errors[place] = p - (oracle.scales(p, row)[row] * np.sign(p) if p.size else p)
        step(optimizer, tensors, mine)
    for ours, its in zip(memories(optimizer, "error"), errors, strict=True):
        np.testing.assert_allclose(ours, its, rtol=0, atol=1e-5)


@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
def test_the_bytes_are_a_bit_a_coordinate_and_the_scales(comm: MPI.Comm, exchange: str) -> None:
    tensors = ballots.parameters((32 * comm.size, 128), dtypes=[torch.float32])
    optimizer = wrap(tensors, mpisign.scaled_vote(), exchange=exchange)
    step(optimizer, tensors, drawn(tensors, 0, comm.rank))
    share = 4 * (32 * 4 + 32)  # of 32 rows, in bytes
    whole = share * (2 if exchange == "two_phase" else comm.size)
    assert optimizer.report.bytes_sent - optimizer.report.header_bytes == (comm.size - 1) * whole


def test_only_scaled_rows_can_be_voted_on(comm: MPI.Comm) -> None:
    method = mpisign.Method(mpisign.mean().memory, mpisign.ef_signsgd().codec, mpisign.scaled_vote().rule)
    with pytest.raises(mpisign.OptionError, match=r"votes on signs with scales, not on 'scaled_bits': ScaledRows"):
        wrap(model(), method)
    with pytest.raises(mpisign.OptionError, match=r"momentum= or error_feedback=True, not both"):
        mpisign.scaled_vote(0.9, error_feedback=True)
