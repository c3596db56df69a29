"""mpisign.exchange as it goes on a GPU, on real ranks, and on jobs of which only some ranks have one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from gpu_branch import gpu_branch, needs_compiler
from methods_table import ALONE, among, exchanges, packs_signs

import mpisign
from mpisign.exchange import staging

from . import ballots

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.mpi, needs_compiler]

Shapes = tuple[tuple[int, ...], ...]
SHAPES: Shapes = ((3, 5, 7), (64,), (), (0,), (1,), (33, 2), (127,))
LONG_ROWS = ((33, 65), *SHAPES)
METHODS = among(1, packs_signs)
EXCHANGES = ("allgather", "two_phase", "hierarchical")
POLICIES = [(zeros, ties) for zeros in ("coin", "abstain", "positive", "rows") for ties in ("coin", "zero", "positive")]
SMALL = 64 / (1 << 20)  # MiB of a bucket: several buckets


def rounds(rank: int, steps: int = 4, shapes: Shapes = SHAPES) -> list[list[torch.Tensor | None]]:
    """Gradients by step: one is missing, another in each step and on each rank."""
    drawn: list[list[torch.Tensor | None]] = []
    for step in range(steps):
        gradients: list[torch.Tensor | None] = [
            *ballots.draw(ballots.parameters(*shapes), ballots.generator(step, rank))
        ]
        gradients[(step + rank) % len(shapes)] = None
        drawn.append(gradients)
    return drawn


def train(
    gpu: bool,
    steps: Sequence[Sequence[torch.Tensor | None]],
    scale: float = 1.0,
    shapes: Shapes = SHAPES,
    **options: Any,
) -> list[tuple[Any, ...]]:
    """By step: decisions, parameters, memory, and what the report says."""
    tensors = ballots.parameters(*shapes)
    seen: list[tuple[Any, ...]] = []
    with gpu_branch(gpu):
        sgd = torch.optim.SGD(tensors, lr=0.25)
        optimizer = mpisign.DistributedSignOptimizer(sgd, ballots.named(tensors), apply="optimizer", **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
        scaler.scale(torch.zeros(()))
        for gradients in steps:
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor.grad = None if gradient is None else gradient * scale
            scaler.step(optimizer)
            scaler.update()
            memory = optimizer.state_dict()["mpisign"]["memory"]
            report = optimizer.report
            seen.append(
                (
                    [None if t.grad is None else str(ballots.flat(t.grad).tolist()) for t in tensors],
                    [ballots.flat(t).tolist() for t in tensors],
                    {(i, key): ballots.flat(v).tolist() for i, state in memory.items() for key, v in state.items()},
                    (report.voters, report.abstentions, report.ties, report.exchange, report.bytes_sent),
                    report.ended_at,
                    [] if report.ties is None else [str(share) for share in report.agreement()],  # NaN equals NaN then
                )
            )
    return seen


def assert_same(
    comm: MPI.Comm, steps: Sequence[Sequence[torch.Tensor | None]], **options: Any
) -> list[tuple[Any, ...]]:
    """All ranks as on the host, all as on a GPU, and every other one: the same in everything. Returns what it was."""
    host = train(False, steps, **options)
    assert train(True, steps, **options) == host
    assert train(comm.rank % 2 == 1, steps, **options) == host, "the odd ranks as on a GPU"
    return host


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_gpu_decides_the_bits_of_the_host(comm: MPI.Comm, method: mpisign.Method, exchange: str) -> None:
    assert_same(comm, rounds(comm.rank), method=method, exchange=exchange, bucket_cap_mb=SMALL)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(("zeros", "ties"), POLICIES)
def test_every_policy(comm: MPI.Comm, zeros: str, ties: str, exchange: str) -> None:
    steps = rounds(comm.rank, 2)
    seen = assert_same(comm, steps, method=mpisign.signsgd(), zeros=zeros, ties=ties, exchange=exchange, seed=5)
    if comm.size == 2:
        assert all(report[2] > 0 for _, _, _, report, *_ in seen), "two ranks tie often"


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_rank_with_a_nan_abstains_and_keeps_its_memory(comm: MPI.Comm, method: mpisign.Method, scale: float) -> None:
    """Also where a loss scale must be taken out first."""
    steps, spoilt = rounds(comm.rank, 3), comm.size - 1
    if comm.rank == spoilt:
        steps[1] = [None if g is None else torch.full_like(g, float("nan")) for g in steps[1]]
    seen = assert_same(comm, steps, method=method, scale=scale)
    voters = [report[0] for _, _, _, report, *_ in seen]
    everybody = tuple(range(comm.size))
    assert voters == [everybody, everybody[:-1], everybody]
    if comm.rank == spoilt:
        assert seen[1][2].items() >= seen[0][2].items(), "what the memory held it still holds"


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_ballot_ends_at_the_first_bad_value(comm: MPI.Comm, method: mpisign.Method, exchange: str) -> None:
    """On each rank elsewhere, in the middle of a batch; those that come later in backward are the others' affair."""
    steps, places = rounds(comm.rank, 3), (5, 1, 4, 0, 6)
    steps[1] = [*ballots.draw(ballots.parameters(*SHAPES), ballots.generator(1, comm.rank))]
    spoilt = steps[1][places[comm.rank % 5]]
    assert spoilt is not None
    spoilt.view(-1)[-1] = float("-inf")
    seen = assert_same(comm, steps, method=method, exchange=exchange, bucket_cap_mb=SMALL)
    assert dict(seen[1][4]) == {rank: f"p{places[rank % 5]}" for rank in range(comm.size)}


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_rows_of_zeros_abstain(comm: MPI.Comm, method: mpisign.Method, exchange: str) -> None:
    """Of a matrix whose rows are long enough, other rows on each rank; and on rank 0 a parameter that is one row."""
    steps = rounds(comm.rank, 3, LONG_ROWS)
    for gradients in steps:
        if gradients[0] is not None:
            gradients[0][comm.rank :: comm.size + 1] = 0.0
        if comm.rank == 0 and gradients[-1] is not None:
            gradients[-1].zero_()
    options: dict[str, Any] = {"method": method, "exchange": exchange, "bucket_cap_mb": SMALL, "shapes": LONG_ROWS}
    by_rows = assert_same(comm, steps, **options, zeros="rows")
    by_coins = train(False, steps, **options, zeros="coin")
    assert by_rows[0][0] == by_coins[0][0], "the first step finds the rows"
    assert by_rows[2][0] != by_coins[2][0]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_gpu_aware_mpi_is_given_the_memory_that_kernels_work_on(
    comm: MPI.Comm, exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tensors, through DLPack; a rank that does so and one that stages understand each other."""
    steps = rounds(comm.rank, 2)
    options: dict[str, Any] = {"zeros": "abstain", "exchange": exchange, "bucket_cap_mb": SMALL}
    host = train(False, steps, method=mpisign.signum(0.5), **options)
    if comm.rank != 1:
        monkeypatch.setenv("MPISIGN_GPU_AWARE_MPI", "1")
    given: list[object] = []
    monkeypatch.setattr(staging.Buffer, "ready", lambda buffer: given.append(type(buffer.mpi)))
    assert train(True, steps, method=mpisign.signum(0.5), **options) == host
    staged = comm.rank == 1 or exchange == "hierarchical"  # the node's memory is the host's
    assert set(given) == {np.ndarray if staged else torch.Tensor}


def test_a_maximum_over_ranks_is_staged_even_then(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open MPI's nonblocking reductions crash on GPU memory."""
    monkeypatch.setenv("MPISIGN_GPU_AWARE_MPI", "1")
    with gpu_branch():
        buffer = staging.Buffer((3,), torch.float32, torch.device("cpu"), staged=True)
    assert isinstance(buffer.mpi, np.ndarray)
    buffer.tensor.fill_(comm.rank)
    buffer.push()
    assert comm.allgather(buffer.mpi.tolist()) == [[rank] * 3 for rank in range(comm.size)]
    buffer.mpi[:] = 7
    buffer.pull()
    assert buffer.tensor.tolist() == [7] * 3


@pytest.mark.parametrize("name", ["lion mean", "mean", "median"])
def test_methods_with_other_messages(comm: MPI.Comm, name: str) -> None:
    for exchange in exchanges(ALONE[name]):
        assert_same(comm, rounds(comm.rank, 2), method=ALONE[name], exchange=exchange, bucket_cap_mb=SMALL)


@pytest.mark.parametrize(
    ("name", "exchange"), [("ef_signsgd", "allgather"), ("double_squeeze", "two_phase")], ids=["ranks", "and deciders"]
)
def test_methods_whose_scales_are_sums(comm: MPI.Comm, name: str, exchange: str) -> None:
    """A GPU adds them up in fp64, the host in fp32: the last bits differ, but all ranks still apply the same."""
    options: dict[str, Any] = {"method": ALONE[name], "exchange": exchange, "bucket_cap_mb": SMALL}
    host, mixed = (train(gpu, rounds(comm.rank, 2), **options) for gpu in (False, comm.rank % 2 == 1))
    assert len(set(map(str, comm.allgather([decisions for decisions, *_ in mixed])))) == 1
    for (mine, _, _, report, *_), (its, _, _, its_report, *_) in zip(host, mixed, strict=True):
        assert report == its_report
        for decision, other in zip(mine, its, strict=True):
            assert json.loads(other or "[]") == pytest.approx(json.loads(decision or "[]"), rel=1e-2)


def test_ranks_out_of_batches_follow(comm: MPI.Comm) -> None:
    """Rank r has r + 1 batches; who is done goes on taking part."""
    ends = []
    for gpu in (False, True, comm.rank % 2 == 1):
        tensors = ballots.parameters(*SHAPES)
        with gpu_branch(gpu):
            sgd = torch.optim.SGD(tensors, lr=0.25)
            optimizer = mpisign.DistributedSignOptimizer(sgd, ballots.named(tensors), method=mpisign.signum(0.5))
            for gradients in rounds(comm.rank, comm.rank + 1):
                for tensor, gradient in zip(tensors, gradients, strict=True):
                    tensor.grad = gradient
                optimizer.step()
            optimizer.join()
        ends.append([ballots.flat(t).tolist() for t in tensors])
    assert ends[0] == ends[1] == ends[2]
    assert all(end == ends[0] for end in comm.allgather(ends[0]))
