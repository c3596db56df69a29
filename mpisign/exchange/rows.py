"""Rows of zeros: an embedding that was not looked up, a dead unit, an expert that got nothing. They abstain.

A row is what has one index in a parameter's first dimension; a parameter of less than 64 elements a row is one row.
Packing leaves a bitmap of what is not zero, from which this finds rows that are zero throughout. Since 64 elements in
a row hold a whole word of 32, only parameters with a word of zeros need a closer look.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpisign.backends import WORD, Backend
from mpisign.bitmap.host import words_for

__all__ = ["LEAST", "count_rows", "is_scattered", "silence", "speakers", "spoken_words", "zero_rows"]

LEAST = 64  # elements

Bools = npt.NDArray[np.bool_]


def count_rows(shape: tuple[int, ...]) -> int:
    """How many rows a parameter of this shape has."""
    elements = int(np.prod(shape))
    return shape[0] if len(shape) > 1 and shape[0] and elements // shape[0] >= LEAST else 1


def is_scattered(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a row's elements lie apart on the wire, so that a row of zeros need not hold a word of zeros."""
    return count_rows(shape) > 1 and strides[0] * shape[0] != int(np.prod(shape))


def zero_rows(spoken: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], backend: Backend) -> Bools | None:
    """Which rows are zero throughout: (R,), or None if none is.

    Args:
        spoken: (ceil(n/32),) words, 1 where an element is not zero, 0 past the last.
        strides: of the parameter on the wire.
    """
    elements = int(np.prod(shape))
    if not elements:
        return None
    if is_scattered(shape, strides):
        bits = torch.empty(elements, dtype=torch.float32, device=spoken.device)
        backend.unpack(spoken, bits)
        some = torch.as_strided(bits > 0, shape, strides).reshape(count_rows(shape), -1).any(1)
    else:
        some = _some(spoken, count_rows(shape), elements)
    zero: Bools = (~some).cpu().numpy()
    return zero if zero.any() else None


def _some(spoken: Tensor, rows: int, elements: int) -> Tensor:
    """Which rows (R,), one after the other on the wire, hold a 1."""
    each = elements // rows
    if rows == 1 or each % 32 == 0:
        return (spoken.view(rows, -1) != 0).any(1)
    start = torch.arange(0, elements, each, device=spoken.device)
    last = start + each - 1
    first_word, last_word = start // 32, last // 32  # never the same, as a row has 64 elements at least
    before = torch.zeros(len(spoken) + 1, dtype=torch.int64, device=spoken.device)
    torch.cumsum(spoken != 0, 0, out=before[1:])  # words with a 1
    between = before[last_word] > before[first_word + 1]
    at_start = spoken[first_word].long() >> start % 32  # the sign goes along, so that all upper bits count
    at_end = spoken[last_word].long() & ((2 << last % 32) - 1)
    return between | (at_start != 0) | (at_end != 0)


def spoken_words(
    rows: Bools, shape: tuple[int, ...], strides: tuple[int, ...], backend: Backend, device: torch.device
) -> Tensor:
    """Bitmaps (..., ceil(n/32)) that are 1 on the elements of the rows (..., R) that speak."""
    elements = int(np.prod(shape))
    k = words_for(elements)
    if is_scattered(shape, strides):
        words = torch.empty((*rows.shape[:-1], k), dtype=WORD, device=device)
        for its, out in zip(rows.reshape(-1, rows.shape[-1]), words.view(-1, k), strict=True):
            backend.pack(_spread(torch.from_numpy(its * 2.0 - 1.0), shape, strides, device), out, zeros="positive")
        return words
    count = rows.shape[-1]
    each = elements // count
    full = -torch.from_numpy(rows).to(device, WORD)  # all bits, or none
    if count == 1 or each % 32 == 0:
        words = full.repeat_interleave(k // count, -1)
    else:  # a row has 64 elements at least, so that a word has two at most
        start = torch.arange(0, 32 * k, 32, device=device)
        row = start // each
        left = (row + 1) * each - start  # elements from the word's first to the end of its row
        low = torch.where(left < 32, (1 << left.clamp(max=31)) - 1, -1).to(WORD)
        row.clamp_(max=count - 1)
        words = (full[..., row] & low) | (full[..., (row + 1).clamp_(max=count - 1)] & ~low)
    if elements % 32:
        words[..., -1] &= (1 << elements % 32) - 1
    return words


def silence(values: Tensor, rows: Bools, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Make ``values``, flat in the wire's order: (n,), 0 on the rows (R,)."""
    if len(rows) == 1:
        if rows[0]:
            values.zero_()
        return
    torch.as_strided(values, shape, strides)[torch.from_numpy(rows).to(values.device)] = 0


def speakers(spoken: Bools, shape: tuple[int, ...], strides: tuple[int, ...], device: torch.device) -> Tensor:
    """How many ranks have voted on each element, flat in the wire's order: (n,) fp32, of ``spoken`` (V, R)."""
    return _spread(torch.from_numpy(spoken.sum(0)), shape, strides, device)


def _spread(by_row: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], device: torch.device) -> Tensor:
    flat = torch.empty(int(np.prod(shape)), dtype=torch.float32, device=device)
    ones = (1,) * (len(shape) - 1)
    torch.as_strided(flat, shape, strides).copy_(
        by_row.to(device, torch.float32).view((-1, *ones)) if shape else by_row[0]
    )
    return flat
