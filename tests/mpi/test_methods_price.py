"""mpisign.methods on real ranks: what crosses the wire, to the byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

import mpisign
from mpisign import Method

from . import ballots
from .steps import drawn, model, step, wrap

if TYPE_CHECKING:
    from mpi4py import MPI


pytestmark = pytest.mark.mpi


# ---------------------------------------------------------------------------------------------- the price


@pytest.mark.parametrize(
    ("method", "items"),
    [
        (mpisign.sto_sign(4.0), lambda n: -(-n // 32)),
        (mpisign.ternary_vote(4.0, 5.0), lambda n: 2 * -(-n // 32)),
        (mpisign.sparsign(0.5), lambda n: 2 * -(-n // 32)),
        (mpisign.ef_signsgd(), lambda n: 1 + -(-n // 32) + -(-n // 1024)),
        (mpisign.double_squeeze(), lambda n: 1 + -(-n // 32) + -(-n // 1024)),
        (mpisign.top_k(0.1), lambda n: 2 * max(1, round(0.1 * n)) if n > 1 else n),
        (mpisign.ef21(0.1), lambda n: 2 * max(1, round(0.1 * n)) if n > 1 else n),
        (mpisign.one_bit_adam(9), lambda n: n),
        (mpisign.zero_one_adam(), lambda n: n),
        (mpisign.stc(0.1), lambda n: 1 + min(n, max(1, round(0.1 * n)))),
        (mpisign.weighted_vote(), lambda n: 2 * -(-n // 32)),
        (mpisign.terngrad(), lambda n: min(n, 1) + 2 * -(-n // 32)),
        (mpisign.qsgd(7, 64), lambda n: -(-n // 64) + 4 * -(-n // 32)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_bytes_sent_are_the_formula(comm: MPI.Comm, method: Method, items: Callable[[int], int]) -> None:
    tensors = model()
    optimizer = wrap(tensors, method, exchange="allgather")
    step(optimizer, tensors, drawn(tensors, 0, comm.rank))
    sent = (comm.size - 1) * 4 * sum(items(t.numel()) for t in tensors)
    assert optimizer.report.bytes_sent - optimizer.report.header_bytes == sent


def test_both_ways_of_double_squeeze_cost_a_bit_a_coordinate(comm: MPI.Comm) -> None:
    (tensor,) = tensors = ballots.parameters((320 * comm.size,), dtypes=[torch.float32])
    optimizer = wrap(tensors, mpisign.double_squeeze(), exchange="two_phase")
    step(optimizer, tensors, drawn(tensors, 0, comm.rank))
    words = tensor.numel() // 32 // comm.size
    shard = 1 + words + -(-words // 32)  # a scale, and a bit a word that says whether it is silent
    assert optimizer.report.bytes_sent - optimizer.report.header_bytes == 2 * (comm.size - 1) * 4 * shard


@pytest.mark.parametrize("zeros", ["coin", "abstain"])
def test_a_mean_of_signs_comes_down_as_counts(comm: MPI.Comm, zeros: str) -> None:
    tensors = ballots.parameters((320 * comm.size,), dtypes=[torch.float32])
    optimizer = wrap(tensors, mpisign.lion(vote=False), exchange="two_phase", zeros=zeros)
    step(optimizer, tensors, drawn(tensors, 0, comm.rank))
    up = 2 if zeros == "abstain" else 1
    planes = up + math.ceil(math.log2(up * comm.size + 1))
    assert optimizer.report.bytes_sent - optimizer.report.header_bytes == (comm.size - 1) * planes * 320 // 8


def test_the_exact_maximum_costs_a_dense_reduction(comm: MPI.Comm) -> None:
    tensors = model()
    prices = []
    for method in (mpisign.sto_sign(4.0), mpisign.sto_sign()):
        optimizer = wrap(tensors, method)
        step(optimizer, tensors, drawn(tensors, 0, comm.rank))
        prices.append(optimizer.report.bytes_sent)
    elements = sum(t.numel() for t in tensors)
    assert prices[1] - prices[0] == 2 * (comm.size - 1) * 4 * elements // comm.size


@pytest.mark.parametrize(
    ("method", "up", "down"),
    [
        (mpisign.signum(), 1, 1),
        (mpisign.sto_sign(1.0), 1, 1),
        (mpisign.ternary_vote(), 2, 2),
        (mpisign.sparsign(1.0), 2, 2),
        (mpisign.mean(), 32, 32),
        (mpisign.median(), 32, 32),
        (mpisign.one_bit_adam(9), 32, 32),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_bits_both_ways(comm: MPI.Comm, method: Method, up: int, down: int) -> None:
    (tensor,) = tensors = ballots.parameters((64 * comm.size,), dtypes=[torch.float32])
    optimizer = wrap(tensors, method, exchange="two_phase")
    step(optimizer, tensors, drawn(tensors, 0, comm.rank))
    share = tensor.numel() // comm.size
    assert 8 * (optimizer.report.bytes_sent - optimizer.report.header_bytes) == (comm.size - 1) * share * (up + down)


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        (mpisign.lion(vote=False), lambda n, dim: 32 * -(-n // 32)),
        (mpisign.ef21(None), lambda n, dim: 32 * (1 + -(-n // 32) + -(-n // 1024))),
        (mpisign.dgc(0.05, warmup_epochs=0), lambda n, dim: 64 * max(1, round(0.05 * n)) if dim > 1 else 32 * n),
        (mpisign.dgc(0.05, warmup_epochs=3), lambda n, dim: 64 * max(1, round(0.25 * n)) if dim > 1 else 32 * n),
        (mpisign.krum(0), lambda n, dim: 32 * n),
        (mpisign.nearest_neighbour_mixing(0), lambda n, dim: 32 * n),
        (mpisign.monna(0), lambda n, dim: 32 * n),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_bits_of_what_is_gathered(comm: MPI.Comm, method: Method, bits: Callable[[int, int], int]) -> None:
    if method.name == "krum" and comm.size < 3:
        pytest.skip("needs 3 ranks")
    tensors = model()
    optimizer = wrap(tensors, method)
    step(optimizer, tensors, drawn(tensors, 0, comm.rank))
    sent = (comm.size - 1) * sum(bits(t.numel(), t.dim()) for t in tensors)
    assert 8 * (optimizer.report.bytes_sent - optimizer.report.header_bytes) == sent
