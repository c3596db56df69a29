"""Ballots over whole models: what every rank sends, and what the oracle makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import oracle
import torch

if TYPE_CHECKING:
    from mpi4py import MPI

Floats = npt.NDArray[np.floating]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def parameters(*shapes: tuple[int, ...], dtypes: Sequence[torch.dtype] = DTYPES) -> list[torch.nn.Parameter]:
    """Zeros, the dtypes in context."""
    return [torch.nn.Parameter(torch.zeros(shape, dtype=dtypes[i % len(dtypes)])) for i, shape in enumerate(shapes)]


def named(tensors: Sequence[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """``p0``, ``p1``, ..."""
    return [(f"p{i}", tensor) for i, tensor in enumerate(tensors)]


def draw(tensors: Sequence[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    """Small integers, of which a fifth are zero: ties and zeros abound, and sums of them are exact."""
    return [torch.randint(-2, 3, t.shape, generator=generator).to(t.dtype) for t in tensors]


def generator(*seeds: int) -> torch.Generator:
    """Random numbers that depend on all of ``seeds``."""
    return torch.Generator().manual_seed(hash(seeds) % 2**63)


def flat(tensor: torch.Tensor) -> Floats:
    """A contiguous tensor's elements in fp64, which holds every dtype's exactly."""
    return tensor.detach().double().flatten().numpy()


def gathered(comm: MPI.Comm, tensors: Sequence[torch.Tensor | None]) -> list[list[Floats | None]]:
    """``[rank][i]``: tensor i of each rank."""
    return comm.allgather([None if t is None else flat(t) for t in tensors])


def vote(
    updates: Sequence[Sequence[Floats | None]],
    sizes: Sequence[int],
    step: int,
    *,
    zeros: str = "coin",
    ties: str = "coin",
    seed: int = 0,
    identities: Sequence[int] | None = None,
) -> tuple[list[oracle.Ballot | None], int]:
    """The decision on each parameter, None where nobody votes, and the ties on all of them.

    Args:
        updates: ``[rank][i]``: what a rank sends for parameter i, or None if it does not vote on it.
        sizes: how many elements each parameter has.
        identities: by whose coins the ranks toss; default: their numbers.
    """
    decisions: list[oracle.Ballot | None] = []
    tied = 0
    for i, start in enumerate(oracle.first_words(sizes)):
        ballots = [
            oracle.ballot(mine[i], zeros, coins(seed, step, oracle.zeros_stream(who), start, sizes[i]))
            for who, mine in zip(identities or range(len(updates)), updates, strict=True)
            if mine[i] is not None
        ]
        if not ballots:
            decisions.append(None)
            continue
        decision, here = oracle.majority(ballots, ties, coins(seed, step, oracle.TIES, start, sizes[i]))
        decisions.append(decision)
        tied += here
    return decisions, tied


def coins(seed: int, step: int, stream: int, first_word: int, n: int) -> oracle.Ballot:
    return oracle.coins(oracle.coin_key(seed, step, stream), first_word, n)
