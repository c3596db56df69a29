"""Local steps at one rank, which are the plain optimizer's by windows of means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

import mpisign
from mpisign import DistributedSignOptimizer


def layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def local(model: nn.Module, every: int = 3, wrapped: Any = None, **options: Any) -> DistributedSignOptimizer:
    options.setdefault("method", mpisign.mean())
    wrapped = wrapped or AdamW(model.parameters(), lr=0.01)
    return DistributedSignOptimizer(wrapped, model.named_parameters(), every=every, **options)


def batch(at: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(at), dtype=torch.float64)


def backward(model: nn.Module, at: int) -> torch.Tensor:
    model.zero_grad()
    loss: torch.Tensor = model(batch(at)).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: Any, steps: range, clip: float | None = None) -> None:
    for at in steps:
        backward(model, at)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def values(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-13) -> bool:
    """By windows of means, which subtract a difference again that rounding has touched."""
    return all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in zip(values(ours), values(theirs), strict=True))


def pair(every: int = 3, build: Callable[[nn.Module], Any] | None = None) -> Iterator[Any]:
    """A model with local steps, and its twin with the plain optimizer."""
    build = build or (lambda model: AdamW(model.parameters(), lr=0.01))
    ours, theirs = layers(), layers()
    yield from (ours, local(ours, every, build(ours)), theirs, build(theirs))
