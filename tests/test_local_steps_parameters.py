"""mpisign.local_steps at one rank: parameters that come, go, are frozen and thawed, and groups with their methods."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from windowed import backward, layers, local, pair, same, train

import mpisign
from mpisign import DistributedSignOptimizer, OptionError

pytestmark = pytest.mark.usefixtures("world")


def test_groups_also_added_later() -> None:
    def build(model: nn.Module) -> AdamW:
        return AdamW([{"params": model[0].parameters(), "lr": 0.1}])

    def add(model: nn.Module, optimizer: Any) -> None:
        optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.001})

    ours, theirs = layers(), layers()
    optimizer, plain = DistributedSignOptimizer(build(ours), every=3, method=mpisign.mean()), build(theirs)
    for model, its in ((ours, optimizer), (theirs, plain)):
        train(model, its, range(2))
        add(model, its)
        train(model, its, range(2, 7))
    assert same(ours, theirs)
    assert [len(group["params"]) for group in optimizer.outer.param_groups] == [2, 2]


def test_a_group_added_later_is_looked_at_too() -> None:
    model = layers()
    optimizer = DistributedSignOptimizer(AdamW(model[0].parameters()), every=3, method=mpisign.mean())
    optimizer.add_param_group({"params": list(model[2].parameters()), "method": mpisign.signum()})
    backward(model, 0)
    with pytest.raises(OptionError, match=r"every= and method=signum.* need a rate"):
        optimizer.step()


def test_a_method_that_a_group_gets_later_is_looked_at_too() -> None:
    model = layers()
    optimizer = local(model)
    train(model, optimizer, range(1))
    optimizer.param_groups[0]["method"] = mpisign.scaled_vote()
    train(model, optimizer, range(1, 3))
    optimizer.param_groups[0]["method"] = mpisign.signum()
    for _ in range(2):
        with pytest.raises(OptionError, match=r"every= and method=signum.* need a rate"):
            train(model, optimizer, range(3, 4))


def test_groups_that_come_and_go_between_steps() -> None:
    """What is compared or saved before the next step is of the groups that there are by now."""
    model, more = layers(), nn.Linear(2, 2).double()
    optimizer = local(model, 2, outer=lambda its: SGD(its, lr=0.7, momentum=0.9))
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": list(more.parameters())})
    mpisign.check_consistency(nn.ModuleList([model, more]), optimizer)
    train(nn.Sequential(model, more), optimizer, range(2, 4))
    for parameter in optimizer.param_groups.pop(1)["params"]:
        del optimizer.state[parameter]
    assert optimizer.outer is not None
    optimizer.state_dict()
    assert len(optimizer.outer.state) == 4
    train(model, optimizer, range(4, 6))


def test_momentum_does_not_move_what_is_frozen() -> None:
    """Though its last gradient is left."""
    model, _, _, _ = pair(2)
    optimizer = local(model, 2)
    train(model, optimizer, range(1))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    assert model[0].weight.grad is not None
    train(model, optimizer, range(1, 4))
    assert torch.allclose(model[0].weight, before, rtol=0, atol=1e-13)


def test_frozen_parameters_may_be_of_any_type() -> None:
    """Such as the weights of a model that is quantized, beside which others are trained."""
    quantized = nn.Parameter(torch.arange(4, dtype=torch.uint8), requires_grad=False)
    trained = nn.Parameter(torch.zeros(3))
    optimizer = DistributedSignOptimizer(SGD([quantized, trained], lr=0.1), every=1, method=mpisign.mean())
    trained.grad = torch.ones(3)
    optimizer.step()
    assert quantized.tolist() == [0, 1, 2, 3]
    assert torch.equal(trained.detach(), torch.full((3,), -0.1))


def test_a_frozen_models_state_goes_back_and_forth() -> None:
    """The outer momentum of what is frozen waits until that is trained again."""

    def nesterov(parameters: Any) -> SGD:
        return SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)

    model = layers()
    optimizer = local(model, 2, outer=nesterov)
    train(model, optimizer, range(4))
    whole = copy.deepcopy(optimizer.state_dict())
    model[0].requires_grad_(False)
    train(model, optimizer, range(4, 8))
    frozen = copy.deepcopy(optimizer.state_dict())
    for state in (whole, frozen):
        optimizer.load_state_dict(state)
        train(model, optimizer, range(2))
    model[0].requires_grad_(True)
    train(model, optimizer, range(4))
    for state in (whole, frozen):
        optimizer.load_state_dict(state)
        train(model, optimizer, range(2))


@pytest.mark.parametrize(
    "method", [mpisign.ef_signsgd(), mpisign.double_squeeze(), mpisign.centered_clipping()], ids=lambda its: its.name
)
def test_memories_of_frozen_parameters_are_given_up(method: mpisign.Method) -> None:
    """A state loads whatever is frozen in the model, then and now, and so it does within one process."""

    def frozen_one(state: Any) -> Any:
        model = layers()
        model[0].requires_grad_(False)
        optimizer = local(model, 2, method=method)
        optimizer.load_state_dict(state)
        return model, optimizer

    model = layers()
    optimizer = local(model, 2, method=method)
    train(model, optimizer, range(3))
    whole = copy.deepcopy(optimizer.state_dict())
    model[0].requires_grad_(False)
    train(model, optimizer, range(3, 6))
    frozen = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(6, 8))
    model[0].requires_grad_(True)
    optimizer.load_state_dict(frozen)
    train(model, optimizer, range(4))
    train(*frozen_one(frozen), range(3))
    if not any(whole["mpisign"]["memory"].values()):
        train(*frozen_one(whole), range(3))
        return
    with pytest.warns(UserWarning, match=r"parameters \[0, 1\] are frozen, and the memory .* up: thaw those"):
        resumed = frozen_one(whole)
    train(*resumed, range(3))


def test_frozen_parameters() -> None:
    """Frozen within a window: it is exchanged a last time, and then left to whoever writes it."""
    ours, optimizer, theirs, plain = pair(3)
    for model, its in ((ours, optimizer), (theirs, plain)):
        train(model, its, range(1))
        model[0].requires_grad_(False)
        model[0].zero_grad()
        train(model, its, range(1, 4))
    assert same(ours, theirs)
    ours[0].weight.data.fill_(3.0)
    train(ours, optimizer, range(4, 9))
    assert set(ours[0].weight.flatten().tolist()) == {3.0}
    ours[0].requires_grad_(True)
    train(ours, optimizer, range(9, 10))
    with optimizer.common_parameters():
        assert set(ours[0].weight.flatten().tolist()) == {3.0}
