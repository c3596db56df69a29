"""Momentum in the wrapped optimizer averages votes: said once, with what to do instead, and only around votes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

import mpisign
from mpisign import DistributedSignOptimizer, Method

pytestmark = pytest.mark.usefixtures("world")


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))]


def said(act: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(it.message) for it in caught if "averages votes" in str(it.message)]


class Lion(optim.Optimizer):
    """As others' are: it keeps an average."""

    def __init__(self, params: Any, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": 1e-3, "betas": betas})

    def step(self, closure: Any = None) -> None:
        pass


@pytest.mark.parametrize("method", [mpisign.signum(), mpisign.signsgd(), mpisign.ternary_vote(4.0, 5.0)], ids=str)
def test_sgd(method: Method) -> None:
    (text,) = said(lambda: DistributedSignOptimizer(optim.SGD(parameters(), lr=0.1, momentum=0.8), method=method))
    assert "SGD with momentum=0.8 (parameter group 0) around the vote of" in text
    assert "momentum=0 and pass method=mpisign.signum(0.8)" in text


@pytest.mark.parametrize(
    "make",
    [
        lambda: optim.SGD([{"params": [p], "momentum": at / 2} for at, p in enumerate(parameters())], lr=0.1),
        lambda: Lion(parameters()),
        *([lambda: optim.Muon(parameters()[1:])] if hasattr(optim, "Muon") else []),
    ],
)
def test_others_that_keep_an_average(make: Callable[[], optim.Optimizer]) -> None:
    assert len(said(lambda: DistributedSignOptimizer(make()))) == 1


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({}, mpisign.signum()),
        ({"momentum": 0.9}, mpisign.mean()),
        ({"momentum": 0.9}, mpisign.ef_signsgd()),
        ({"momentum": 0.9}, mpisign.lion(vote=False)),
        ({"momentum": 0.9, "method": mpisign.mean()}, mpisign.signum()),
    ],
)
def test_where_it_is_right_nothing_is_said(options: dict[str, Any], method: Method) -> None:
    def make() -> None:
        groups = [{"params": parameters()[:1], **options}, {"params": parameters()[1:], **options}]
        DistributedSignOptimizer(optim.SGD(groups, lr=0.1), method=method)

    assert said(make) == []


def test_adam_has_a_warning_of_its_own() -> None:
    with pytest.warns(UserWarning, match="divides each coordinate") as caught:
        DistributedSignOptimizer(optim.AdamW(parameters()))
    assert len(caught) == 1


@pytest.mark.parametrize("how", ["scheduler", "group"])
def test_what_turns_it_on_later(how: str) -> None:
    """OneCycleLR does, by default."""
    tensors = parameters()
    optimizer = DistributedSignOptimizer(optim.SGD(tensors, lr=0.1))

    def step() -> None:
        for tensor in tensors:
            tensor.grad = torch.ones_like(tensor)
        optimizer.step()

    assert said(step) == []
    if how == "scheduler":
        optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
        place = 0
    else:
        tensors += parameters()
        optimizer.add_param_group({"params": tensors[2:], "momentum": 0.5})
        place = 1
    (text,) = said(step)
    assert f"(parameter group {place})" in text
    assert "cycle_momentum=False" in text
    assert said(step) == [], "once"
