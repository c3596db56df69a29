"""What tests of local steps on real ranks share: a model, AdamW's steps on drawn gradients, decisions by NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import oracle
import torch
from resumable import Job
from torch import nn
from torch.optim import SGD, AdamW

import mpisign
from mpisign import Method

from . import ballots

if TYPE_CHECKING:
    from .ballots import Floats

SHAPES = ((5, 70), (3, 7), (33,), (), (0,))
NAN = float("nan")
EXCHANGES = ("allgather", "two_phase")
Decide = Callable[[list[list["Floats"]], int], list["Floats"]]
Rates = dict[str, Any]

ADAMW: Rates = {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1}


def model(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    random = ballots.generator(7)
    return [nn.Parameter(torch.randn(s, generator=random, dtype=torch.float64).to(dtype)) for s in SHAPES]


def wrap(tensors: Sequence[torch.Tensor], every: int = 3, **options: Any) -> mpisign.DistributedSignOptimizer:
    options.setdefault("method", mpisign.scaled_vote())
    wrapped = options.pop("wrapped", None) or AdamW(tensors, **ADAMW)
    return mpisign.DistributedSignOptimizer(wrapped, ballots.named(tensors), every=every, **options)


def drawn(at: int, rank: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    random = ballots.generator(at, rank)
    return [torch.randn(s, generator=random, dtype=torch.float64).to(dtype) for s in SHAPES]


def give(tensors: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = None if gradient is None else gradient.clone()


def train(optimizer: Any, tensors: Sequence[torch.Tensor], steps: range, rank: int) -> None:
    for at in steps:
        give(tensors, drawn(at, rank, tensors[0].dtype))
        optimizer.step()


def flats(tensors: Sequence[torch.Tensor]) -> list[Floats]:
    return [ballots.flat(t) for t in tensors]


def means(differences: list[list[Floats]], at: int) -> list[Floats]:
    return [np.mean(its, axis=0) for its in zip(*differences, strict=True)]


def scaled_votes(differences: list[list[Floats]], at: int) -> list[Floats]:
    first, words = {}, 0
    for place in reversed(range(len(SHAPES))):
        first[place], size = words, int(np.prod(SHAPES[place], dtype=int))
        words += -(-size // 32) + 1  # the length of a segment does not matter: nothing ties
    out = []
    for place, its in enumerate(zip(*differences, strict=True)):
        size = len(its[0])
        row = np.arange(size) // (size // oracle.count_rows(SHAPES[place])) if size else np.zeros(0, int)
        out.append(oracle.scaled_vote(its, row, at, first[place], ties="positive") if size else its[0])
    return out


class AdamJob(Job):
    """The job that tests of resuming train, with AdamW on each rank's own gradients."""

    def __init__(self, method: Method, every: int, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__(plain=True, dtype=dtype)
        adam = AdamW(self.model.parameters(), lr=0.01)
        named = self.model.named_parameters()
        self.optimizer = mpisign.DistributedSignOptimizer(adam, named, method=method, every=every, **options)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)


def nesterov(parameters: Any) -> SGD:
    return SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)
