"""mpisign.collectives on real ranks, against NumPy on what mpi4py has gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import mpisign
from mpisign import transfer
from mpisign.collectives import gather_each

from . import ballots

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi

FLOATS = [*ballots.DTYPES, torch.complex64]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def values(rank: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    random = ballots.generator(rank)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=random, dtype=torch.complex64 if dtype.is_complex else torch.float32).to(
            dtype
        )
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=random).to(dtype)


def oracle(rows: list[torch.Tensor], op: str, dtype: torch.dtype) -> torch.Tensor:
    """By NumPy in double precision, rounded once, by torch, as NumPy has no bfloat16."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    stack = np.stack([row.to(wide if dtype not in INTEGERS else torch.int64).numpy() for row in rows])
    found = {"sum": np.sum, "average": np.mean, "min": np.min, "max": np.max}[op](stack, axis=0)
    whole = op == "average" and dtype in [*INTEGERS, torch.bool]
    return torch.from_numpy(np.asarray(found)).to(torch.float64 if whole else dtype)


@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (300, 101)], ids=str)
@pytest.mark.parametrize("op", ["average", "sum", "min", "max"])
def test_allreduce_of_every_dtype(comm: MPI.Comm, op: str, shape: tuple[int, ...]) -> None:
    """The large ones go in two phases, with shards of different sizes."""
    for dtype in [*FLOATS, *INTEGERS, torch.bool]:
        if (op == "sum" and dtype == torch.bool) or (op in ("min", "max") and dtype.is_complex):
            continue
        mine = values(comm.rank, dtype, shape)
        before = mine.clone()
        result = mpisign.allreduce(mine, op)
        expected = oracle([values(rank, dtype, shape) for rank in range(comm.size)], op, dtype)
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result, expected, rtol=1e-15 if result.dtype == torch.float64 else 0, atol=0)
        assert torch.equal(mine, before)


def test_the_same_bits_on_every_rank_in_several_messages(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 100_000)
    mine = values(comm.rank, torch.float32, (70_001,))
    result = mpisign.allreduce(mine, "sum")
    assert torch.equal(
        result, oracle([values(r, torch.float32, (70_001,)) for r in range(comm.size)], "sum", mine.dtype)
    )
    assert len(set(comm.allgather(result.numpy().tobytes()))) == 1


def test_what_is_added_is_rounded_once(comm: MPI.Comm) -> None:
    """2048 + 1 is 2048 in half precision; 256 + 1 is 256 in bfloat16."""
    for dtype, large in ((torch.float16, 2048.0), (torch.bfloat16, 256.0)):
        mine = torch.tensor([large if comm.rank == 0 else 1.0], dtype=dtype)
        assert mpisign.allreduce(mine, "sum").item() == torch.tensor(large + comm.size - 1).to(dtype).item()


@pytest.mark.mpi(min_size=2)
def test_a_nan_wins(comm: MPI.Comm) -> None:
    mine = torch.tensor([float("nan") if comm.rank == 1 else 1.0, 2.0])
    for op in ("average", "sum", "min", "max"):
        result = mpisign.allreduce(mine, op)
        assert result[0].isnan()
        assert result[1] == (2.0 * comm.size if op == "sum" else 2.0)


def test_averages_of_numbers_arrays_and_tensors(comm: MPI.Comm) -> None:
    ranks = range(comm.size)
    for of_rank in (float, int, np.float32, np.int64, lambda rank: rank % 2 == 0, lambda rank: np.bool_(rank % 2 == 0)):
        result = mpisign.average(of_rank(comm.rank))
        assert type(result) is float
        assert result == np.mean([float(of_rank(rank)) for rank in ranks])
    array = np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::2] * comm.rank
    result = mpisign.average(array, name="an array")
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, np.mean([np.arange(6).reshape(2, 3)[:, ::2] * r for r in ranks], axis=0))
    foreign = np.array([comm.rank, 1.0], np.dtype(np.float32).newbyteorder())
    np.testing.assert_array_equal(mpisign.average(foreign), [np.mean(ranks), 1.0])
    tensor = torch.nn.Parameter(torch.full((2, 2), float(comm.rank)))
    result = mpisign.average(tensor)
    assert not result.requires_grad
    assert torch.equal(result, torch.full((2, 2), (comm.size - 1) / 2))
    assert mpisign.average(torch.tensor(comm.rank)).dtype == torch.float64


def test_what_is_no_plain_block_of_memory(comm: MPI.Comm) -> None:
    base = torch.arange(12.0).view(3, 4) + comm.rank
    shift = (comm.size - 1) / 2
    for mine, expected in (
        (base.t(), torch.arange(12.0).view(3, 4).t() + shift),
        (base[:, :1].expand(3, 4), torch.arange(0.0, 12.0, 4.0).view(3, 1).expand(3, 4) + shift),
        (torch._neg_view(base), -(torch.arange(12.0).view(3, 4) + shift)),
    ):
        assert torch.equal(mpisign.average(mine), expected)
        root = mine + comm.rank if mine.is_neg() else mine - comm.rank
        assert torch.equal(mpisign.broadcast(mine), root)


def test_allgather_takes_different_numbers_of_rows(comm: MPI.Comm) -> None:
    for dtype in [*FLOATS, *INTEGERS, torch.bool]:
        for inner in ((), (3,), (2, 0)):
            rows = [values(rank, dtype, (rank * 2, *inner)) for rank in range(comm.size)]
            result = mpisign.allgather(rows[comm.rank])
            assert result.dtype == dtype
            assert torch.equal(result, torch.cat(rows))
    assert mpisign.allgather(torch.tensor(comm.rank)).tolist() == list(range(comm.size))
    assert mpisign.allgather(torch.zeros(0, 2)).shape == (0, 2)


def test_each_ranks_tensor_of_any_shape_and_dtype(comm: MPI.Comm) -> None:
    kinds = [(torch.float32, (2, 3)), (torch.int64, ()), (torch.bfloat16, (0, 2)), (torch.bool, (5,))]
    each = [values(rank, *kinds[rank % len(kinds)]) for rank in range(comm.size)]
    found = gather_each(each[comm.rank])
    assert [(its.dtype, its.shape) for its in found] == [(its.dtype, its.shape) for its in each]
    assert all(torch.equal(a, b) for a, b in zip(found, each, strict=True))


def test_broadcast_leaves_what_it_is_given(comm: MPI.Comm) -> None:
    for root in {0, comm.size - 1}:
        for dtype in [*FLOATS, *INTEGERS, torch.bool]:
            mine = values(comm.rank, dtype, (4, 5))
            assert torch.equal(mpisign.broadcast(mine, root, name="it"), values(root, dtype, (4, 5)))
            assert torch.equal(mine, values(comm.rank, dtype, (4, 5)))
    assert mpisign.broadcast(torch.tensor(float(comm.rank))).item() == 0.0


T = torch.zeros(2, 3)
DIFFERENT: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "shape": (lambda: mpisign.allreduce(T), lambda: mpisign.allreduce(torch.zeros(3, 2)), r"shape \(3, 2\)"),
    "dtype": (lambda: mpisign.average(T), lambda: mpisign.average(T.double()), r"torch\.float64"),
    "op": (lambda: mpisign.allreduce(T), lambda: mpisign.allreduce(T, "sum"), "op='sum'"),
    "name": (lambda: mpisign.average(1.0, name="a"), lambda: mpisign.average(1.0, name="b"), "name='b'"),
    "kind": (lambda: mpisign.average(1.0), lambda: mpisign.average(torch.tensor(1.0)), "a tensor"),
    "inner": (lambda: mpisign.allgather(T), lambda: mpisign.allgather(T.t()), r"shape \(n, 2\)"),
    "0-d": (lambda: mpisign.allgather(T[0]), lambda: mpisign.allgather(T[0, 0]), r"shape \(\)"),
    "root": (lambda: mpisign.broadcast(T, 0), lambda: mpisign.broadcast(T, 1), "root_rank=1"),
}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("case", DIFFERENT)
def test_ranks_that_differ_are_named_on_all(comm: MPI.Comm, case: str) -> None:
    usual, other, said = DIFFERENT[case]
    odd = comm.size - 1
    with pytest.raises(
        mpisign.ConsistencyError, match=rf"ranks \[{odd}\] .*this is rank {comm.rank}.* in .*{said}.*on rank {odd}"
    ):
        (other if comm.rank == odd else usual)()
    assert mpisign.average(1.0) == 1.0, "and nothing is left on the way"


WRONG: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "op": (lambda: mpisign.allreduce(T), lambda: mpisign.allreduce(T, "median"), "op='median'.*'average'"),  # type: ignore[arg-type]
    "horovod's average=True": (lambda: mpisign.allreduce(T), lambda: mpisign.allreduce(T, True), "op=True"),  # type: ignore[arg-type]
    "flags": (lambda: mpisign.allreduce(T, "sum"), lambda: mpisign.allreduce(T > 0, "sum"), "bool.*convert"),
    "complex": (lambda: mpisign.allreduce(T, "max"), lambda: mpisign.allreduce(T + 0j, "max"), "complex64.*convert"),
    "sparse": (lambda: mpisign.allgather(T), lambda: mpisign.allgather(T.to_sparse()), "to_dense"),
    "a text": (lambda: mpisign.average(1.0), lambda: mpisign.average("1.0"), "'1.0' is none"),  # type: ignore[call-overload]
    "too large": (lambda: mpisign.average(1.0), lambda: mpisign.average(10**400), "is none"),
    "objects": (lambda: mpisign.average(1.0), lambda: mpisign.average(np.array([None])), "is none"),
    "a number": (lambda: mpisign.allreduce(T), lambda: mpisign.allreduce(1.0), "float is none.*average"),  # type: ignore[arg-type]
    "meta": (lambda: mpisign.broadcast(T), lambda: mpisign.broadcast(T.to("meta")), "meta device"),
    "root": (lambda: mpisign.broadcast(T), lambda: mpisign.broadcast(T, -1), "root_rank=-1"),
}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused_on_one_rank_is_told_to_all(comm: MPI.Comm, case: str) -> None:
    usual, other, said = WRONG[case]
    with pytest.raises(mpisign.OptionError, match=said):
        (other if comm.rank == 1 else usual)()
    assert mpisign.average(1.0) == 1.0


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_reduces_while_others_vote_is_an_error(comm: MPI.Comm) -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=1.0))
    parameter.grad = torch.ones(4)
    with pytest.raises(mpisign.ConsistencyError, match=r"ranks \[0\] are in average\(\)"):
        mpisign.average(1.0) if comm.rank == 0 else optimizer.step()


def test_in_inference_mode_and_under_autocast(comm: MPI.Comm) -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        result = mpisign.average(torch.tensor([1.0 + 2**-20]))
    assert result.item() == 1.0 + 2**-20
    assert not result.is_inference()
    torch.set_default_dtype(torch.float64)
    try:
        assert mpisign.average(torch.tensor([1.0], dtype=torch.float32)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_cross_ranks(comm: MPI.Comm) -> None:
    """On two nodes, of which the first has one rank more where their number is odd."""
    assert (mpisign.cross_rank(), mpisign.cross_size()) == (0, 1), "all are on this machine"
    mpisign.shutdown()
    mpisign.init(node_of=[rank % 2 for rank in range(comm.size)])
    local, node = divmod(comm.rank, 2)
    alone = comm.size == 2 * local + 1
    assert (mpisign.cross_rank(), mpisign.cross_size()) == (node, 1 if alone else 2)
    mpisign.shutdown()
    mpisign.init(node_of=[int(rank > 0) for rank in range(comm.size)])
    first = comm.rank <= 1
    assert (mpisign.cross_rank(), mpisign.cross_size()) == (
        comm.rank if first else 0,
        min(2, comm.size) if first else 1,
    )
