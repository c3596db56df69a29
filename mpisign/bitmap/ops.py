"""The bit arithmetic on torch tensors, wherever they lie: NumPy on the host, CUDA kernels on a GPU, the same bits.

Words are int32 tensors here (torch computes little on uint32); their bits are those of :mod:`mpisign.bitmap.host`.
A :data:`Flag` or :data:`Count` of a GPU is a tensor that is still being computed: ``bool()`` or ``int()`` waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from mpisign.bitmap import host
from mpisign.bitmap.tensors import flat, format_of, raw_bits

__all__ = [
    "WORD",
    "Count",
    "Flag",
    "agreement",
    "all_finite",
    "all_finite_many",
    "as_words",
    "count",
    "kernels_for",
    "majority",
    "pack",
    "unpack",
]

Flag = bool | torch.Tensor
Count = int | torch.Tensor

WORD = torch.int32
"""The torch type of a word."""


def kernels_for(device: torch.device) -> ModuleType | None:
    """The module that computes on this kind of device, or None for the host."""
    if device.type == "cpu":
        return None
    from mpisign.bitmap import cuda

    return cuda


def as_words(tensor: torch.Tensor) -> npt.NDArray[np.uint32]:
    """A word tensor on the host as NumPy's uint32, sharing its memory."""
    words: npt.NDArray[np.uint32] = tensor.numpy().view(np.uint32)
    return words


def all_finite(values: torch.Tensor) -> Flag:
    """Whether no element of flat ``values`` (n,) is NaN or Inf."""
    kernels = kernels_for(values.device)
    if kernels is not None:
        flag: Flag = kernels.all_finite(values)
        return flag
    return host.all_finite(raw_bits(values), format_of(values.dtype))


def all_finite_many(values: Sequence[torch.Tensor]) -> Flag:
    """Whether no element of any of ``values`` (dense, of any shape) is NaN or Inf; on a GPU in few launches."""
    kernels = kernels_for(values[0].device) if values else None
    if kernels is not None:
        flag: Flag = kernels.all_finite_many(values)
        return flag
    return all([bool(all_finite(flat(value))) for value in values])


def pack(
    values: torch.Tensor,
    words: torch.Tensor,
    *,
    zeros: str = "coin",
    key: int = 0,
    first_word: int = 0,
    nonzero: torch.Tensor | None = None,
) -> Flag:
    """:func:`mpisign.bitmap.host.pack` of flat ``values`` (n,) into ``words`` (ceil(n/32),)."""
    kernels = kernels_for(values.device)
    if kernels is not None:
        flag: Flag = kernels.pack(values, words, zeros=zeros, key=key, first_word=first_word, nonzero=nonzero)
        return flag
    return host.pack(
        raw_bits(values),
        format_of(values.dtype),
        as_words(words),
        zeros=zeros,
        key=key,
        first_word=first_word,
        nonzero=None if nonzero is None else as_words(nonzero),
    )


def unpack(words: torch.Tensor, out: torch.Tensor, *, nonzero: torch.Tensor | None = None) -> None:
    """:func:`mpisign.bitmap.host.unpack` of ``words`` into flat ``out`` (n,): +1, -1, or 0 where ``nonzero`` is 0."""
    kernels = kernels_for(out.device)
    if kernels is not None:
        kernels.unpack(words, out, nonzero=nonzero)
        return
    host.unpack(
        as_words(words), format_of(out.dtype), raw_bits(out), nonzero=None if nonzero is None else as_words(nonzero)
    )


def majority(
    ballots: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    ties: str = "coin",
    key: int = 0,
    first_word: int = 0,
    nonzeros: Sequence[torch.Tensor] | None = None,
    out_nonzero: torch.Tensor | None = None,
    tied: torch.Tensor | None = None,
) -> Count:
    """:func:`mpisign.bitmap.host.majority`; the number of ties, or 0 if they were added to ``tied``, on a GPU only."""
    kernels = kernels_for(out.device)
    if kernels is not None:
        found: Count = kernels.majority(
            ballots,
            out,
            ties=ties,
            key=key,
            first_word=first_word,
            nonzeros=nonzeros,
            out_nonzero=out_nonzero,
            tied=tied,
        )
        return found if tied is None else 0
    return host.majority(
        [as_words(ballot) for ballot in ballots],
        as_words(out),
        ties=ties,
        key=key,
        first_word=first_word,
        nonzeros=None if nonzeros is None else [as_words(plane) for plane in nonzeros],
        out_nonzero=None if out_nonzero is None else as_words(out_nonzero),
    )


def count(ballots: Sequence[torch.Tensor], planes: torch.Tensor) -> None:
    """:func:`mpisign.bitmap.host.count`: how many of ``ballots`` have a 1, bit-sliced, into ``planes`` (p, k)."""
    kernels = kernels_for(planes.device)
    if kernels is not None:
        kernels.count(ballots, planes)
        return
    host.count([as_words(ballot) for ballot in ballots], as_words(planes))


def agreement(
    ballot: torch.Tensor,
    decision: torch.Tensor,
    elements: int,
    nonzero: torch.Tensor | None = None,
    moved: torch.Tensor | None = None,
) -> tuple[Count, Count]:
    """:func:`mpisign.bitmap.host.agreement`: on how many elements both agree, and on how many both spoke."""
    kernels = kernels_for(ballot.device)
    if kernels is not None:
        agree, both = kernels.agreement(ballot, decision, elements, nonzero, moved)
        return agree, both
    planes = [None if plane is None else as_words(plane) for plane in (nonzero, moved)]
    return host.agreement(as_words(ballot), as_words(decision), elements, *planes)
