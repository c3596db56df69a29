"""Optimizers that vote alone, and parameters for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

import mpisign
from mpisign import DistributedSignOptimizer

Parameters = list[nn.Parameter]


def vectors(*sizes: int) -> Parameters:
    return [nn.Parameter(torch.zeros(size)) for size in sizes]


def voting(parameters: Iterable[Any], lr: float = 1.0, **options: Any) -> DistributedSignOptimizer:
    """signSGD, so that a step of size 1 moves every coordinate by its gradient's sign."""
    return DistributedSignOptimizer(SGD(parameters, lr=lr), method=mpisign.signsgd(), **options)


def give_gradients(parameters: Iterable[torch.Tensor], value: float = 3.0) -> None:
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, value)


def values(parameter: torch.Tensor) -> set[float]:
    return set(parameter.detach().flatten().tolist())


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
