"""Whole vectors as points: distances between them, and their weighted sums.

Distances are computed in fp64 from differences, never from inner products, which cancel. Sums are folded in an order of
our own, as that of ``torch.sum`` depends on the processor. So all ranks of a job on CPUs get the same bits, and so do
all of one on GPUs. Scratch is about 4 MiB (128 MiB on a GPU), however long the vectors are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mpisign.backends import backend_for
from mpisign.rules.coordinatewise import Rows

__all__ = ["combine", "distances_to", "mean_of", "squared_distances"]


def _blocks(rows: Rows, width: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows side by side in fp64, ``width`` coordinates at a time: (V, b), in memory that is used again."""
    length = rows[0].numel()
    stacked = torch.empty(len(rows), min(width, length), dtype=torch.float64, device=rows[0].device)
    for lo in range(0, length, width):
        span = slice(lo, min(lo + width, length))
        block = stacked[:, : span.stop - lo]
        for mine, row in zip(block, rows, strict=True):
            mine.copy_(row[span])
        yield span, block


def _width(rows: Rows, count: int) -> int:
    """How many coordinates of ``count`` vectors make a block on the rows' device."""
    return max(1, backend_for(rows[0].device).work // count)


def _fold(terms: Tensor) -> Tensor:
    """Sum over the last dimension, (..., b) to (...), by adding halves in place."""
    while (b := terms.shape[-1]) > 1:
        half = (b + 1) // 2
        terms[..., : b - half].add_(terms[..., half:])
        terms = terms[..., :half]
    return terms[..., 0]


def _sum_of(block: Tensor, weights: Sequence[float], divisor: float) -> Tensor:
    """``sum_i weights[i] block[i] / divisor``: (V, b) to (b,). A weight of 0 takes no part, whatever the row."""
    total = torch.zeros_like(block[0])
    for weight, row in zip(weights, block, strict=True):
        if weight:
            total += row * weight
    return total.div_(divisor)


def combine(rows: Rows, weights: Sequence[float], divisor: float = 1.0, out: Tensor | None = None) -> Tensor:
    """``sum_i weights[i] rows[i] / divisor``, in fp64 and in the order of the rows.

    Args:
        rows: V vectors (n,).
        weights: V numbers; rows whose weight is 0 are not read.
        out: (n,), written and returned; must not overlap with ``rows``.
    """
    result = torch.empty_like(rows[0]) if out is None else out
    taking_part = [i for i, weight in enumerate(weights) if weight]
    if not taking_part:
        return result.zero_()
    own_weights = [weights[i] for i in taking_part]
    for span, block in _blocks([rows[i] for i in taking_part], _width(rows, len(rows))):
        result[span] = _sum_of(block, own_weights, divisor)
    return result


def squared_distances(rows: Rows) -> Tensor:
    """``||rows[i] - rows[j]||^2`` of all pairs: V vectors (n,) to (V, V) fp64 on the CPU. O(V^2 n).

    Inf where it is beyond fp64, which fp32 rows cannot reach.
    """
    count, device = len(rows), rows[0].device
    pairs = count * (count - 1) // 2
    total = torch.zeros(pairs, dtype=torch.float64, device=device)
    width = _width(rows, count + pairs)
    scratch = torch.empty(pairs, min(width, rows[0].numel()), dtype=torch.float64, device=device)
    for _, block in _blocks(rows, width):
        differences = scratch[:, : block.shape[1]]
        for i, to_the_next in enumerate(differences.split(list(range(count - 1, 0, -1)))):
            torch.sub(block[i + 1 :], block[i], out=to_the_next)
        total += _fold(differences.square_())
    result = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    result[torch.triu_indices(count, count, 1, device="cpu").unbind()] = total.cpu()
    return result + result.T


def distances_to(rows: Rows, weights: Sequence[float], divisor: float) -> Tensor:
    """The distance of each row to ``sum_i weights[i] rows[i] / divisor``: (V,) fp64 on the CPU. O(V n)."""
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows[0].device)
    for _, block in _blocks(rows, _width(rows, len(rows))):
        total += _fold(block.sub_(_sum_of(block, weights, divisor)).square_())
    return total.sqrt_().cpu()


def mean_of(rows: Rows, chosen: Sequence[int], out: Tensor | None = None) -> Tensor:
    """The mean of the rows that are ``chosen``: (n,)."""
    return combine(rows, [float(i in chosen) for i in range(len(rows))], len(chosen), out)
