"""mpisign.optimizer on real ranks: those that differ from each other, or from when they were saved."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mpisign

from . import ballots
from .wrapped import SHAPES, give, grads_of, snapshot, wrap

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi

# ------------------------------------------------------------------------------------------- states of others


@pytest.mark.mpi(min_size=2)
def test_a_state_of_a_job_of_another_size_is_refused(comm: MPI.Comm) -> None:
    (tensor,) = tensors = ballots.parameters((4,))
    optimizer = wrap(tensors, method=mpisign.signum())
    tensor.grad = torch.ones(4)
    optimizer.step()
    state = optimizer.state_dict()
    alone = comm.Split(comm.rank)
    mpisign.shutdown()
    mpisign.init(alone)
    with pytest.raises(
        mpisign.CheckpointError, match=rf"rank 0: .*{comm.size} ranks and this one has 1, .*start with -n"
    ):
        optimizer.load_state_dict(state)
    mpisign.shutdown()
    alone.Free()


@pytest.mark.mpi(min_size=2)
def test_a_state_of_another_rank_loads_with_a_fresh_memory(comm: MPI.Comm) -> None:
    (tensor,) = tensors = ballots.parameters((4,))
    optimizer = wrap(tensors, method=mpisign.signum())
    tensor.grad = torch.ones(4)
    optimizer.step()
    neighbour = comm.allgather(optimizer.state_dict())[comm.rank - 1]
    with pytest.warns(
        UserWarning, match=f"rank {comm.rank}: .*starts fresh.*state of rank {neighbour['mpisign']['rank']}"
    ):
        optimizer.load_state_dict(neighbour)
    assert optimizer.state_dict()["mpisign"]["memory"] == {}


def test_a_state_saved_after_shutdown_is_still_this_ranks(comm: MPI.Comm) -> None:
    tensor = torch.nn.Parameter(torch.zeros(5))
    optimizer = wrap([tensor])
    tensor.grad = torch.ones(5)
    optimizer.step()
    mpisign.shutdown()
    saved = optimizer.state_dict()["mpisign"]
    assert (saved["rank"], saved["size"]) == (comm.rank, comm.size)


# ------------------------------------------------------------------------------------------- ranks that differ


def frozen(tensors: list[torch.nn.Parameter]) -> dict[str, Any]:
    tensors[1].requires_grad_(False)
    return {}


def reshaped(tensors: list[torch.nn.Parameter]) -> dict[str, Any]:
    tensors[1] = torch.nn.Parameter(torch.zeros(11, 3))
    return {}


def retyped(tensors: list[torch.nn.Parameter]) -> dict[str, Any]:
    tensors[1] = torch.nn.Parameter(torch.zeros(33, dtype=torch.float16))
    return {}


def longer(tensors: list[torch.nn.Parameter]) -> dict[str, Any]:
    tensors.append(torch.nn.Parameter(torch.zeros(3)))
    return {}


def option(**options: Any) -> Callable[[list[torch.nn.Parameter]], dict[str, Any]]:
    return lambda tensors: options


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(frozen, "'p1'", id="frozen"),
        pytest.param(reshaped, r"'p1' \(11, 3\)", id="shape"),
        pytest.param(retyped, r"'p1' \(33,\) float16", id="dtype"),
        pytest.param(longer, "'p6'", id="one-parameter-more"),
        pytest.param(option(method=mpisign.signum(0.8)), r"signum .*0\.8", id="method"),
        pytest.param(option(zeros="positive"), "zeros='positive'", id="zeros"),
        pytest.param(option(ties="zero"), "ties='zero'", id="ties"),
        pytest.param(option(seed=7), "seed=7", id="seed"),
        pytest.param(option(exchange="two_phase"), "exchange 'two_phase'", id="exchange"),
        pytest.param(option(bucket_cap_mb=4e-6), "bucket", id="bucket-cap"),
        pytest.param(option(clip_grad_norm=1.0), r"clip_grad_norm 1\.0 on rank \d, none on rank 0", id="clip"),
        pytest.param(option(audit=2), r"audit 2 on rank \d, none on rank 0", id="audit"),
        pytest.param(option(overlap=True), r"overlap= or delay= True on rank \d, none on rank 0", id="overlap"),
    ],
)
def test_another_layout_or_option_on_one_rank_is_an_error_on_all(
    comm: MPI.Comm, change: Callable[[list[torch.nn.Parameter]], dict[str, Any]], named: str
) -> None:
    odd = comm.size - 1
    tensors = ballots.parameters(*SHAPES, dtypes=[torch.float32])
    options = change(tensors) if comm.rank == odd else {}
    optimizer = wrap(tensors, **options)
    drawn = ballots.draw(tensors, ballots.generator(comm.rank))
    give(tensors, [g if t.requires_grad else None for t, g in zip(tensors, drawn, strict=True)])
    before = snapshot(tensors), grads_of(tensors)
    with pytest.raises(mpisign.ConsistencyError) as error:
        optimizer.step()
    message = str(error.value)
    assert f"ranks [{odd}]" in message
    assert f"this is rank {comm.rank}" in message
    assert re.search(named, message)
    assert f" on rank {odd}" in message
    assert (snapshot(tensors), grads_of(tensors)) == before


@pytest.mark.mpi(min_size=2)
def test_ranks_a_step_apart_are_an_error_on_all(comm: MPI.Comm) -> None:
    (tensor,) = tensors = ballots.parameters((4,))
    odd = comm.size - 1
    optimizer = wrap(tensors)
    for _ in range(2):
        tensor.grad = torch.ones(4)
        optimizer.step()
    state = optimizer.state_dict()
    state["mpisign"]["step"] -= comm.rank == odd
    optimizer.load_state_dict(state)
    with pytest.raises(
        mpisign.ConsistencyError, match=rf"step: rank {odd} at 1, the others at 2 \(this is rank {comm.rank}\)"
    ):
        optimizer.step()
    assert tensor.tolist() == [-2.0] * 4

    mpisign.broadcast_optimizer_state(optimizer)  # brings the numbers together again
    tensor.grad = torch.ones(4)
    optimizer.step()
    assert tensor.tolist() == [-3.0] * 4


@pytest.mark.mpi(min_size=2)
def test_a_group_added_on_one_rank_is_an_error_on_all(comm: MPI.Comm) -> None:
    old, new = ballots.parameters((40,), (70,), dtypes=[torch.float32])
    optimizer = wrap([old])
    if comm.rank == 0:
        optimizer.add_param_group({"params": [new]})
    old.grad = torch.ones(40)
    with pytest.raises(mpisign.ConsistencyError, match=r"'group1\.param0'"):
        optimizer.step()


@pytest.mark.mpi(min_size=2)
def test_two_optimizers_alike_are_not_mistaken_for_each_other(comm: MPI.Comm) -> None:
    """Ranks that step them in another order would else vote on each other's parameters."""
    tensors = [torch.nn.Parameter(torch.zeros(40)) for _ in range(2)]
    optimizers = [wrap([tensor]) for tensor in tensors]
    for tensor in tensors:
        tensor.grad = torch.ones(40)
    with pytest.raises(mpisign.ConsistencyError, match=r"optimizer \d+ of the job"):
        optimizers[comm.rank == 0].step()
    assert all(tensor.tolist() == [0.0] * 40 for tensor in tensors)
