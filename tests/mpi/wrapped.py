"""Wrapped optimizers on real ranks, and what their parameters hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import oracle
import torch

import mpisign

from . import ballots

if TYPE_CHECKING:
    from mpi4py import MPI

EXCHANGES = ("allgather", "two_phase", "auto")
SHAPES = ((7, 5), (33,), (4, 9), (), (0,), (64,))
NAN, INF = float("nan"), float("inf")

Wrapped = mpisign.DistributedSignOptimizer


def wrap(tensors: Sequence[torch.Tensor], lr: float = 1.0, **options: Any) -> Wrapped:
    options.setdefault("method", mpisign.signsgd())
    options.setdefault("zeros", "coin")  # what the oracle's ballots do unless told otherwise
    options.setdefault("apply", "optimizer")  # which leaves the decision in p.grad, where tests look at it
    return Wrapped(torch.optim.SGD(tensors, lr=lr), ballots.named(tensors), **options)


def give(tensors: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = None if gradient is None else gradient.clone()


def sizes_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [t.numel() for t in tensors]


def grads_of(tensors: Sequence[torch.Tensor]) -> list[list[float] | None]:
    return [None if t.grad is None else ballots.flat(t.grad).tolist() for t in tensors]


def lists(decisions: Sequence[oracle.Ballot | None]) -> list[list[int] | None]:
    return [None if d is None else d.tolist() for d in decisions]


def snapshot(tensors: Sequence[torch.Tensor]) -> bytes:
    return b"".join(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)


def assert_equal_on_all_ranks(comm: MPI.Comm, tensors: Sequence[torch.Tensor]) -> None:
    assert len(set(comm.allgather(snapshot(tensors)))) == 1
