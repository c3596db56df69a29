"""mpisign.optimizer steps as torch's do: groups, schedulers, closures, hooks, accumulation, clipping. At one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, ReduceLROnPlateau, StepLR
from voting import give_gradients, two_layers, values, vectors, voting

import mpisign
from mpisign import DistributedSignOptimizer, SynchronizationError

pytestmark = pytest.mark.usefixtures("world")

# --------------------------------------------------------------------------------------- parameter groups


def test_groups_have_options_of_their_own() -> None:
    a, b = vectors(3, 4)
    optimizer = voting([{"params": [a], "lr": 0.5}, {"params": [b]}], lr=2.0)
    give_gradients([a, b])
    optimizer.step()
    assert (values(a), values(b)) == ({-0.5}, {-2.0})
    optimizer.param_groups[0]["lr"] = 8.0
    give_gradients([a, b], -3.0)
    optimizer.step()
    assert (values(a), values(b)) == ({7.5}, {0.0})


@pytest.mark.parametrize("add_to", ["wrapper", "wrapped optimizer"])
def test_a_group_added_later(add_to: str) -> None:
    a, b = vectors(3, 4)
    optimizer = DistributedSignOptimizer(SGD([a], lr=1.0), method=mpisign.signum(0.9))
    give_gradients([a])
    optimizer.step()
    (optimizer if add_to == "wrapper" else optimizer.wrapped).add_param_group({"params": [b], "lr": 0.5})
    give_gradients([a, b], -3.0)
    optimizer.step()
    assert values(a) == {-1.0 + 1.0}, "the momentum 0.9 * 0.3 - 0.3 is below zero"
    assert values(b) == {0.5}
    give_gradients([a], 0.2)
    optimizer.step()
    assert values(a) == {0.0 + 1.0}, "-0.03 * 0.9 + 0.02 would be above zero, had the memory been lost"


def test_errors_tell_the_group_added_later() -> None:
    model = two_layers()
    optimizer = voting(model[0].parameters())
    optimizer.add_param_group({"params": model[1].parameters()})
    model[1].bias.grad = model[1].bias.detach().to_sparse()
    with pytest.raises(mpisign.GradientError, match=r"'group1\.param1'"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "method", "message"),
    [
        ({"exchange": "two_phase"}, mpisign.krum(0), "two_phase"),
        ({"audit": 1}, mpisign.mean(), "audit=1 recounts votes"),
        ({"overlap": True}, mpisign.dp_sign(1.0, noise=0.1), "dp_sign needs all of them first"),
        ({}, "signum", "is not a Method"),
    ],
)
def test_a_method_added_later_is_checked_as_one_that_was_there(
    options: dict[str, Any], method: Any, message: str
) -> None:
    a, b = vectors(3, 4)
    optimizer = DistributedSignOptimizer(SGD([a], lr=1.0), **options)
    with pytest.raises(mpisign.OptionError, match=message):
        optimizer.add_param_group({"params": [b], "method": method})
    assert len(optimizer.param_groups) == 1


def test_a_named_group_added_later() -> None:
    model = two_layers()
    optimizer = voting(model[0].named_parameters())
    optimizer.add_param_group({"params": [(f"second.{name}", p) for name, p in model[1].named_parameters()]})
    model[1].bias.grad = model[1].bias.detach().to_sparse()
    with pytest.raises(mpisign.GradientError, match=r"'second\.bias'"):
        optimizer.step()


# --------------------------------------------------------------------------------------------- schedulers

SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "StepLR": lambda optimizer: StepLR(optimizer, 2, gamma=0.5),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, 5),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=1.0, total_steps=8),
}


@pytest.mark.parametrize("reload", [False, True], ids=["", "after load_state_dict"])
@pytest.mark.parametrize("attach", ["before wrapping", "to the wrapped", "to the wrapper"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers(make: Callable[[Optimizer], LRScheduler], attach: str, reload: bool) -> None:
    (p,) = vectors(3)
    sgd = SGD([p], lr=1.0, momentum=0.5)  # OneCycleLR turns the momentum too
    scheduler = make(sgd) if attach == "before wrapping" else None
    optimizer = DistributedSignOptimizer(sgd, method=mpisign.signsgd())
    scheduler = scheduler or make(sgd if attach == "to the wrapped" else optimizer)

    (q,) = vectors(3)
    plain = SGD([q], lr=1.0, momentum=0.5)
    plain_scheduler = make(plain)

    for step in range(6):
        if reload and step == 3:
            optimizer.load_state_dict(optimizer.state_dict())
        give_gradients([p], 7.0)
        give_gradients([q], 1.0)  # what the vote makes of it
        for one in (optimizer, scheduler, plain, plain_scheduler):
            one.step()
        assert torch.equal(p, q)
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert len({optimizer.param_groups[0]["lr"], 1.0}) == 2, "the schedule should have moved"


def test_reduce_on_plateau() -> None:
    parameters = vectors(3)
    optimizer = voting(parameters)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.25)
    for _ in range(2):
        give_gradients(parameters)
        optimizer.step()
        scheduler.step(1.0)
    assert optimizer.wrapped.param_groups[0]["lr"] == 0.25


# ------------------------------------------------------------------------------------- closures and hooks


def test_a_closure_is_called_once_before_the_vote() -> None:
    (p,) = vectors(3)
    optimizer = voting([p])
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (2 * p).sum() + 5
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == 5.0
    assert values(p) == {-1.0}
    assert optimizer.step() is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    (p,) = vectors(3)
    optimizer = voting([p], zeros="abstain")
    give_gradients([p])
    optimizer.step()
    gradient = p.grad
    optimizer.zero_grad(set_to_none=set_to_none)
    if set_to_none:
        assert p.grad is None
    else:
        assert p.grad is gradient
        assert values(p.grad) == {0.0}
    (p * 2).sum().backward()
    optimizer.step()
    assert values(p) == {-2.0}


def test_step_hooks_run_once_around_each_step() -> None:
    (p,) = vectors(3)
    optimizer = voting([p])
    seen: list[tuple[str, Any, set[float]]] = []
    for name, target in (("outer", optimizer), ("inner", optimizer.wrapped)):
        for when, register in (("before", target.register_step_pre_hook), ("after", target.register_step_post_hook)):
            register(lambda o, args, kwargs, at=f"{when} {name}": seen.append((at, o, values(p.grad))))
    give_gradients([p])
    optimizer.step()
    assert seen == [
        ("before outer", optimizer, {3.0}),
        ("before inner", optimizer.wrapped, {1.0}),
        ("after inner", optimizer.wrapped, {1.0}),
        ("after outer", optimizer, {1.0}),
    ]


def test_a_step_pre_hook_may_change_the_arguments() -> None:
    (p,) = vectors(3)
    optimizer = voting([p])
    give_gradients([p])
    handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: "from the hook"), kwargs))
    assert optimizer.step() == "from the hook"
    handle.remove()
    assert optimizer.step() is None


# ------------------------------------------------------------------- accumulation, synchronize(), clipping


def test_gradients_accumulate_over_several_backwards() -> None:
    (p,) = vectors(2)
    optimizer = voting([p])
    for weights in ([3.0, 1.0], [-1.0, -4.0], [-1.0, 1.0]):  # the sums are 1 and -2, the last alone is -1 and 1
        (p * torch.tensor(weights)).sum().backward()
    optimizer.step()
    assert p.tolist() == [-1.0, 1.0]
    assert optimizer.report is not None
    assert optimizer.report.step == 0, "one vote for three backwards"


def test_clipping_between_synchronize_and_step() -> None:
    (p,) = vectors(4)
    optimizer = voting([p])
    give_gradients([p])
    optimizer.synchronize()
    assert p.grad is not None
    assert values(p.grad) == {1.0}
    assert values(p) == {0.0}
    assert nn.utils.clip_grad_norm_([p], 1.0) == 2.0
    with optimizer.skip_synchronize():
        optimizer.step()
    assert p.tolist() == pytest.approx([-0.5] * 4)
    give_gradients([p])
    optimizer.step()
    assert p.tolist() == pytest.approx([-1.5] * 4)


def test_synchronize_twice_would_vote_on_votes() -> None:
    parameters = vectors(3)
    optimizer = voting(parameters)
    give_gradients(parameters)
    optimizer.synchronize()
    for again in (optimizer.synchronize, optimizer.step):
        with pytest.raises(SynchronizationError, match="skip_synchronize"):
            again()
    assert values(parameters[0]) == {0.0}
    optimizer.zero_grad()
    give_gradients(parameters)
    optimizer.step()
    assert values(parameters[0]) == {-1.0}


def test_a_step_that_skips_must_have_synchronized() -> None:
    parameters = vectors(3)
    optimizer = voting(parameters)
    give_gradients(parameters)
    with optimizer.skip_synchronize():
        with pytest.raises(SynchronizationError, match=r"call optimizer\.synchronize\(\) first"):
            optimizer.step()
        assert values(parameters[0]) == {0.0}
        optimizer.synchronize()
        optimizer.step()
        with pytest.raises(SynchronizationError):
            optimizer.step()
    assert values(parameters[0]) == {-1.0}


def test_an_error_under_skip_synchronize_ends_it() -> None:
    parameters = vectors(3)
    optimizer = voting(parameters)
    with pytest.raises(ZeroDivisionError), optimizer.skip_synchronize():
        raise ZeroDivisionError
    give_gradients(parameters)
    optimizer.step()
    assert values(parameters[0]) == {-1.0}


def test_a_closure_under_skip_synchronize_is_refused() -> None:
    (parameter,) = vectors(3)
    optimizer = voting([parameter])
    parameter.grad = torch.ones(3)
    optimizer.synchronize()
    with optimizer.skip_synchronize(), pytest.raises(mpisign.SynchronizationError, match="closure"):
        optimizer.step(lambda: 0.0)
    assert parameter.tolist() == [0.0] * 3


def test_join_leaves_the_last_report_whole() -> None:
    (parameter,) = vectors(3)
    optimizer = voting([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    optimizer.join()
    assert optimizer.report is not None
    assert optimizer.report.agreement() == [1.0]


def test_a_disabled_grad_scaler() -> None:
    (parameter,) = vectors(4)
    optimizer = voting([parameter])
    parameter.grad = torch.ones(4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.step(optimizer)
    scaler.update()
    assert parameter.tolist() == [-1.0] * 4
