"""Steps on nodes of every kind, which tests of the hierarchical exchange take by it and by the flat ones.

Where ranks are is told with ``node_of``, so that one machine does for many nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mpisign

from . import ballots

if TYPE_CHECKING:
    from mpi4py import MPI

Gradients = list[torch.Tensor | None]

EXCHANGES = ("allgather", "two_phase", "hierarchical")
SHAPES = ((3, 5, 7), (64,), (), (0,), (5, 70), (1,), (33, 2), (127,))
ROWS = 4  # the parameter whose rows are long enough to count
SMALL = 64 / (1 << 20)  # MiB of a bucket: several buckets

# By kind: the node of each of n ranks, or None where so many ranks cannot be so.
NODES: dict[str, Callable[[int], list[int] | None]] = {
    "one node": lambda n: [0] * n,
    "a rank a node": lambda n: list(range(n)) if n > 1 else None,
    "in turn": lambda n: [rank % 2 for rank in range(n)] if n > 2 else None,
    "all but one": lambda n: [0] * (n - 1) + [1] if n > 3 else None,
    "pairs": lambda n: [rank // 2 for rank in range(n)] if n > 3 else None,
    "halves": lambda n: [rank * 2 // n for rank in range(n)] if n > 5 else None,
    "uneven, of seven": lambda n: [0, 0, 0, 0, 1, 1, 2] if n == 7 else None,
    "uneven, of eight": lambda n: [2, 2, 2, 0, 1, 3, 3, 3] if n == 8 else None,
}
FEW = ("one node", "a rank a node", "in turn", "uneven, of seven", "uneven, of eight")


@contextmanager
def nodes(kind: str, comm: MPI.Comm) -> Iterator[list[int]]:
    """A job whose ranks are on such nodes. Yields the node of each."""
    node_of = NODES[kind](comm.size)
    assert node_of is not None
    mpisign.shutdown()
    mpisign.init(node_of=node_of, stall_timeout=60.0)
    yield node_of


def rounds(rank: int, steps: int = 3, *, missing: bool = True) -> list[Gradients]:
    """Gradients by step: zeros, ties, rows of zeros, and one is missing, another in each step and on each rank."""
    drawn: list[Gradients] = []
    for step in range(steps):
        gradients: Gradients = [*ballots.draw(ballots.parameters(*SHAPES), ballots.generator(step, rank))]
        rows = gradients[ROWS]
        assert rows is not None
        rows[rank % 2 :: 3] = 0.0
        if missing:
            gradients[(step + rank) % len(SHAPES)] = None
        drawn.append(gradients)
    return drawn


def wrap(tensors: Sequence[torch.nn.Parameter], **options: Any) -> mpisign.DistributedSignOptimizer:
    options = {"method": mpisign.signsgd(), "bucket_cap_mb": SMALL, "apply": "optimizer", **options}
    return mpisign.DistributedSignOptimizer(torch.optim.SGD(tensors, lr=0.25), ballots.named(tensors), **options)


def take(optimizer: mpisign.DistributedSignOptimizer, tensors: Sequence[torch.Tensor], gradients: Gradients) -> Any:
    """A step: what each parameter's decision and value are, and what the report says."""
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = None if gradient is None else gradient.clone()
    optimizer.step()
    report = optimizer.report
    return (
        [None if t.grad is None else str(ballots.flat(t.grad).tolist()) for t in tensors],
        [str(ballots.flat(t).tolist()) for t in tensors],
        (report.voters, report.abstentions, report.ended_at, report.ties, report.skipped),
        None if report.ties is None else str(report.agreement()),
    )


def train(steps: Sequence[Gradients], exchange: str, **options: Any) -> list[Any]:
    tensors = ballots.parameters(*SHAPES)
    optimizer = wrap(tensors, exchange=exchange, **options)
    seen = [take(optimizer, tensors, gradients) for gradients in steps]
    assert set(optimizer.report.exchange) == {exchange}
    return seen


def assert_same(steps: Sequence[Gradients], **options: Any) -> list[Any]:
    """By all three exchanges: the same in everything, step by step. Returns what it was."""
    usual = train(steps, EXCHANGES[0], **options)
    for exchange in EXCHANGES[1:]:
        for step, (mine, its) in enumerate(zip(train(steps, exchange, **options), usual, strict=True)):
            assert mine == its, (exchange, step)
    return usual


def for_kinds(metafunc: pytest.Metafunc) -> None:
    """Make tests for the kinds of nodes that so many ranks can be on; ``few_kinds`` asks for some of them."""
    fitting = list(NODES)
    if metafunc.config.getoption("--with-mpi"):
        from mpi4py import MPI

        fitting = [kind for kind in NODES if NODES[kind](MPI.COMM_WORLD.size) is not None]
    for asked, kinds in (("kind", NODES), ("few_kinds", FEW)):
        if asked in metafunc.fixturenames:
            metafunc.parametrize(asked, [kind for kind in kinds if kind in fitting])
