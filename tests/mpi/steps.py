"""Steps of a whole model by any method: its gradients, and what ranks remember and agree on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import mpisign
from mpisign import Method

from . import ballots

if TYPE_CHECKING:
    from mpi4py import MPI

    from .ballots import Floats


SHAPES = ((20, 10), (33,), (), (0,), (7, 3), (500,))
EPS = 1e-6  # scales travel as fp32, but what they lose is kept, so that fp64 identities hold far below this
EXCHANGES = ("allgather", "two_phase")
STEPS = 4

Vectors = list[Any]  # of one rank, by parameter: fp64 arrays, changed in place


def model(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return ballots.parameters(*SHAPES, dtypes=[dtype])


def wrap(tensors: Sequence[torch.nn.Parameter], method: Method, lr: float = 0.1, **options: Any) -> Any:
    sgd = torch.optim.SGD(tensors, lr=lr)
    options.setdefault("apply", "optimizer")  # which leaves the decision in p.grad, where tests look at it
    optimizer = mpisign.DistributedSignOptimizer(sgd, ballots.named(tensors), method=method, **options)
    optimizer.set_epoch(0)
    return optimizer


def drawn(tensors: Sequence[torch.Tensor], *seeds: int) -> list[torch.Tensor]:
    """Gradients without zeros, of different sizes on different ranks."""
    random = ballots.generator(*seeds)
    return [torch.randn(t.shape, generator=random, dtype=torch.float64).mul(1 + seeds[-1]).to(t.dtype) for t in tensors]


def step(optimizer: Any, tensors: Sequence[torch.nn.Parameter], gradients: Sequence[torch.Tensor]) -> None:
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient.clone()
    optimizer.step()


def memories(optimizer: Any, field: str) -> list[Floats]:
    """One field of this rank's memory, by parameter."""
    memory = optimizer.state_dict()["mpisign"]["memory"]
    return [ballots.flat(memory[place][field]) for place in sorted(memory)]


def mean_of_ranks(comm: MPI.Comm, values: Sequence[Floats]) -> list[Floats]:
    return [np.mean(ranks, axis=0) for ranks in zip(*comm.allgather(list(values)), strict=True)]


def servers_errors(optimizer: Any, tensors: Sequence[torch.Tensor], comm: MPI.Comm) -> list[Floats]:
    """What the deciding sides keep, put together from the ranks' pieces."""
    whole = [np.zeros(t.numel()) for t in tensors]
    for pieces in comm.allgather(optimizer.state_dict()["mpisign"]["pieces"]):
        for place, parts in pieces.items():
            for lo, part in parts.items():
                whole[place][lo : lo + part.numel()] = ballots.flat(part)
    return whole


def assert_close(ours: Sequence[Floats], expected: Sequence[Floats], tolerance: float = EPS) -> None:
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def assert_same_everywhere(comm: MPI.Comm, tensors: Sequence[torch.Tensor]) -> None:
    mine = [ballots.flat(t) for t in tensors]
    for place, theirs in enumerate(zip(*comm.allgather(mine), strict=True)):
        assert all(np.array_equal(mine[place], one) for one in theirs), place


def zeros(ranks: int) -> list[Vectors]:
    return [[np.zeros(math.prod(shape)) for shape in SHAPES] for _ in range(ranks)]


def everyones(comm: MPI.Comm, at: int) -> list[Vectors]:
    """The gradients of all ranks at a step: ``[rank][parameter]``."""
    return [[ballots.flat(g) for g in drawn(model(torch.float64), at, rank)] for rank in range(comm.size)]


def whole(vectors: Sequence[Any]) -> Any:
    """All parameters of a rank as the one vector of which rules take distances."""
    return np.concatenate(list(vectors))
