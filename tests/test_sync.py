"""mpisign.sync at one rank: nothing to do, done right, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mpisign

ODD_TENSORS = {
    "0-d": torch.tensor(3),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "complex": torch.ones(3, dtype=torch.complex64),
    "expanded": torch.ones(3, 1).expand(3, 4),
    "transposed": torch.arange(6).view(2, 3).t(),
    "no gradient": nn.Parameter(torch.ones(2)),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.mark.usefixtures("world")
def test_one_rank_keeps_what_it_has() -> None:
    net = model()
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    mpisign.broadcast_parameters(net.state_dict())
    mpisign.broadcast_parameters(net.named_parameters())
    mpisign.broadcast_optimizer_state(optimizer)
    mpisign.broadcast_optimizer_state(optimizer.wrapped)
    mpisign.check_consistency(net, optimizer)
    after = optimizer.state_dict()
    torch.testing.assert_close(net.state_dict(), before[0], rtol=0, atol=0)
    torch.testing.assert_close(after["state"], before[1]["state"], rtol=0, atol=0)
    torch.testing.assert_close(after["mpisign"]["memory"], before[1]["mpisign"]["memory"], rtol=0, atol=0)


@pytest.mark.usefixtures("world")
def test_tensors_of_all_kinds() -> None:
    before = {name: tensor.detach().clone() for name, tensor in ODD_TENSORS.items()}
    mpisign.broadcast_parameters({name: tensor for name, tensor in ODD_TENSORS.items() if name != "expanded"})
    with pytest.raises(mpisign.OptionError, match="'expanded' overlap"):
        mpisign.broadcast_parameters(ODD_TENSORS)
    for name, tensor in ODD_TENSORS.items():
        assert torch.equal(tensor, before[name])
    net = nn.Module()
    for i, tensor in enumerate(ODD_TENSORS.values()):
        net.register_buffer(f"buffer{i}", tensor.detach())
    mpisign.check_consistency(net)


@pytest.mark.usefixtures("world")
def test_objects() -> None:
    thing = {"epoch": 3, "best": [1.5]}
    assert mpisign.broadcast_object(thing) == thing
    assert mpisign.allgather_object(thing) == [thing]


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("entry", [("epoch", 3), ("lr", 0.1), ("names", ["a"])])
def test_only_tensors_are_parameters(entry: tuple[str, Any]) -> None:
    with pytest.raises(mpisign.OptionError, match=rf"'{entry[0]}' .*broadcast_object\(\)"):
        mpisign.broadcast_parameters(dict([entry]))


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("root", [-1, 1, 100])
@pytest.mark.parametrize(
    "broadcast",
    [
        lambda root: mpisign.broadcast_parameters(model().state_dict(), root_rank=root),
        lambda root: mpisign.broadcast_optimizer_state(torch.optim.SGD(model().parameters(), lr=1.0), root_rank=root),
        lambda root: mpisign.broadcast_object(1, root_rank=root),
    ],
    ids=["parameters", "optimizer state", "object"],
)
def test_the_root_is_a_rank(broadcast: Callable[[int], None], root: int) -> None:
    with pytest.raises(mpisign.OptionError, match=rf"root_rank={root} .* 0 \.\. 0"):
        broadcast(root)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("broadcast_parameters", ({},)),
        ("broadcast_optimizer_state", (torch.optim.SGD(model().parameters(), lr=1.0),)),
        ("broadcast_object", (1,)),
        ("allgather_object", (1,)),
        ("check_consistency", (model(),)),
    ],
)
def test_before_init(name: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(mpisign.NotInitializedError, match=rf"{name}\(\)"):
        getattr(mpisign, name)(*arguments)
