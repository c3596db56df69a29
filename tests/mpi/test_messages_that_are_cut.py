"""What is larger than MPI counts is cut, whatever it is: tried with limits of a few bytes, as 2 GiB take long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from methods_table import Make, walk

import mpisign
from mpisign import cuts
from mpisign.session import current

from .steps import EXCHANGES, drawn, model, step, wrap

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi


def cutting(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(cuts, "LIMIT_BYTES", limit)


def trained(make: Make, exchange: str, sums: bool = False) -> tuple[list[torch.nn.Parameter], int]:
    """Parameters after two steps, and in how many parts the largest message was sent."""
    tensors = model()
    optimizer = wrap(tensors, make(mpisign.size()), exchange=exchange)
    for at in range(2):
        optimizer._memory.unsummed = sums
        step(optimizer, tensors, drawn(tensors, at, mpisign.rank()))
    exchanges = optimizer._plan.exchanges
    return tensors, max(len(one._operations if one.name == "allgather" else one._up) for one in exchanges)


ONE_OF_A_KIND = {"signum", "lion", "mean", "top_k", "krum", "sto_sign", "ef_signsgd", "sparsign"}


@walk(lambda method: method.name.partition("(")[0] in ONE_OF_A_KIND)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_step_has_the_same_bits(exchange: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        whole, parts = trained(make, exchange)
    except mpisign.OptionError:  # on every rank: the method needs the other
        return
    assert parts == 1
    cutting(monkeypatch, 56)
    cut, parts = trained(make, exchange)
    assert parts > 1
    for one, other in zip(whole, cut, strict=True):
        assert torch.equal(one, other)


@walk(lambda method: bool(method.memory.summed))
def test_a_sum_of_memories_is_the_same(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = trained(make, "auto", sums=True)
    cutting(monkeypatch, 56)
    cut, _ = trained(make, "auto", sums=True)
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("limit", [1, 7, 100])
def test_objects_arrive_whole(limit: int, comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    cutting(monkeypatch, limit)
    expected = [bytes(range(50 * rank % 256)) for rank in range(comm.size)]
    assert mpisign.allgather_object(expected[comm.rank]) == expected
    for root in range(comm.size):
        assert mpisign.broadcast_object(comm.rank, root) == root
        heard = current().gather_bytes(expected[comm.rank], "timeline()", root=root)
        assert heard == (expected if root == comm.rank else [])


@pytest.mark.parametrize("limit", [5, 1000])
def test_parameters_and_optimizer_state_arrive_whole(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cutting(monkeypatch, limit)
    torch.manual_seed(mpisign.rank())
    tensors = {"large": torch.randn(300), "transposed": torch.randn(5, 7).T, "bytes": torch.randn(3).bfloat16()}
    mpisign.broadcast_parameters(tensors)
    torch.manual_seed(0)
    assert torch.equal(tensors["large"], torch.randn(300))
    assert torch.equal(tensors["transposed"], torch.randn(5, 7).T)
    assert torch.equal(tensors["bytes"], torch.randn(3).bfloat16())

    parameter = torch.nn.Parameter(torch.zeros(300))
    adam = torch.optim.Adam([parameter], lr=1.0 + mpisign.rank())
    parameter.grad = torch.randn(300) + mpisign.rank()
    adam.step()
    mpisign.broadcast_optimizer_state(adam)
    assert adam.param_groups[0]["lr"] == 1.0
    state = mpisign.allgather_object(adam.state[parameter]["exp_avg"])
    assert all(torch.equal(state[0], its) for its in state)


def test_a_checkpoint_and_a_timeline_are_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cutting(monkeypatch, 1000)
    net = torch.nn.Linear(3, 2)
    mpisign.broadcast_parameters(net.state_dict())
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), net.named_parameters())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    mpisign.checkpoint.save(folder / "checkpoints", model=net, optimizer=optimizer, step=1)
    assert mpisign.checkpoint.load(folder / "checkpoints", model=net, optimizer=optimizer).step == 1
    mpisign.check_consistency(net)
    mpisign.timeline(folder / "trace.json")
    if mpisign.rank() == 0:
        assert json.loads((folder / "trace.json").read_text())["traceEvents"]
