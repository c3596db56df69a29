"""Bit arithmetic on CUDA tensors: the functions of :mod:`mpisign.bitmap.host`, bit for bit.

A bitmap is a contiguous tensor (k,) of int32 or uint32, whose bits count, and may be a slice of a larger one. Values
are dense tensors of any shape, whose n elements count in the order of their memory. The kernels run on torch's current
stream of the tensors' device. Nothing here waits for them, so what :mod:`~mpisign.bitmap.host` returns as a number is
a 0-d tensor here.

Those tensors accumulate: pass your own (``finite=``, ``tied=``, ``counts=``, ``found=``) to add up over several calls
without an allocation; left out, a fresh one is made. All tensors of a call must be on one device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from mpisign.bitmap import kernels
from mpisign.bitmap.host import check_counts, check_moved, check_voters, words_for
from mpisign.bitmap.kernels import NONE, address, cell, first, flag
from mpisign.bitmap.tensors import is_dense

__all__ = [
    "add_counts",
    "agreement",
    "all_finite",
    "any_zero",
    "count",
    "decide_counts",
    "first_bad",
    "majority",
    "pack",
    "unpack",
]

Tensor = torch.Tensor
_WORDS_PER_BLOCK = 4 * kernels.THREADS  # of the kernels that count


# ------------------------------------------------------------------------------------------ packing, unpacking


def pack(
    values: Tensor,
    words: Tensor,
    *,
    zeros: str = "coin",
    key: int = 0,
    first_word: int = 0,
    nonzero: Tensor | None = None,
    finite: Tensor | None = None,
) -> Tensor:
    """Write the signs of ``values`` into ``words``; see :func:`mpisign.bitmap.host.pack`.

    Args:
        values: n elements of float32, float64, float16 or bfloat16.
        words, nonzero: (ceil(n/32),) bitmaps.
        finite: 0-d bool that becomes False if an element is NaN or Inf, and is left alone otherwise.

    Returns:
        ``finite``.
    """
    n = values.numel()
    finite = flag(values.device) if finite is None else finite
    arguments = [
        _elements(values),
        np.uint32(kernels.FORMATS[values.dtype]),
        np.uint64(n),
        address(words, words_for(n), values.device),
        address(nonzero, words_for(n), values.device),
        np.uint64(first_word),
        np.uint64(key),
        np.uint32(kernels.ZEROS[zeros]),
        cell(finite, torch.bool, values.device),
    ]
    if n:
        kernels.launch("pack_one", _blocks(n, kernels.JOB_ELEMENTS), arguments, values.device)
    return finite


def unpack(words: Tensor, out: Tensor, *, nonzero: Tensor | None = None) -> None:
    """Write +1 or -1 (or 0 where ``nonzero`` has a 0) into ``out``; see :func:`mpisign.bitmap.host.unpack`.

    Args:
        words, nonzero: (ceil(n/32),) bitmaps.
        out: n elements, as for :func:`pack`.
    """
    n = out.numel()
    arguments = [
        _elements(out),
        np.uint32(kernels.FORMATS[out.dtype]),
        np.uint64(n),
        address(words, words_for(n), out.device),
        address(nonzero, words_for(n), out.device),
    ]
    if n:
        kernels.launch("unpack_one", _blocks(n, kernels.JOB_ELEMENTS), arguments, out.device)


# ------------------------------------------------------------------------------------------------- finite or not


def all_finite(values: Tensor) -> Tensor:
    """Whether no element of ``values`` is NaN or Inf."""
    _elements(values)
    return first_bad([values]) == NONE


def first_bad(values: Sequence[Tensor | None]) -> Tensor:
    """The place of the first of ``values`` that has a NaN or Inf, or :data:`~mpisign.bitmap.kernels.NONE`.

    One launch for every 192 tensors, which may be of any sizes and types. That they are dense is not checked.
    """
    device = next((tensor.device for tensor in values if tensor is not None), torch.device("cpu"))
    found = first(device)
    sizes = tuple([0 if tensor is None else tensor.numel() for tensor in values])  # whose blocks are none
    formats = tuple([0 if tensor is None else kernels.FORMATS[tensor.dtype] for tensor in values])
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in values]
    for lo, vectors, blocks in _vectors(sizes, formats):
        by_value = vectors.copy()
        some = addresses[lo : lo + kernels.VECTOR_CAPACITY]
        by_value["at"][0, : len(some)] = some
        arguments = [kernels.opaque(by_value), np.uint32(len(some)), np.uint32(lo), np.uint64(found.data_ptr())]
        if blocks:
            kernels.launch("first_bad", blocks, arguments, device)
    return found


@functools.lru_cache(maxsize=16)
def _vectors(sizes: tuple[int, ...], formats: tuple[int, ...]) -> list[tuple[int, npt.NDArray[np.void], int]]:
    """The launches that look at vectors of these sizes: the first, all but the addresses, the number of blocks."""
    launches = []
    for lo in range(0, len(sizes), kernels.VECTOR_CAPACITY):
        some = slice(lo, lo + kernels.VECTOR_CAPACITY)
        vectors = np.zeros(1, kernels.VECTORS)
        ends = np.cumsum([_blocks(n, kernels.JOB_ELEMENTS) for n in sizes[some]])  # the empty have no block
        vectors["elements"][0, : len(ends)] = sizes[some]
        vectors["first_block"][0, 1 : len(ends)] = ends[:-1]
        vectors["format"][0, : len(ends)] = formats[some]
        launches.append((lo, vectors, int(ends[-1])))
    return launches


# ------------------------------------------------------------------------------------------------------ deciding


def majority(
    ballots: Sequence[Tensor],
    out: Tensor,
    *,
    ties: str = "coin",
    key: int = 0,
    first_word: int = 0,
    nonzeros: Sequence[Tensor] | None = None,
    out_nonzero: Tensor | None = None,
    tied: Tensor | None = None,
) -> Tensor:
    """Decide every bit by the majority of ``ballots``; see :func:`mpisign.bitmap.host.majority`.

    It is fastest where every bitmap starts at a multiple of 16 bytes.

    Args:
        ballots, nonzeros: V >= 1 bitmaps each, (k,).
        out, out_nonzero: (k,), written.
        tied: 0-d int64 to which the number of tied positions is added.

    Returns:
        ``tied``.
    """
    check_moved(out_nonzero, ties, abstentions=nonzeros is not None)
    k = out.numel()
    tied = torch.zeros((), dtype=torch.int64, device=out.device) if tied is None else tied
    if nonzeros is None:
        bitmaps, kind = list(ballots), "majority"
    else:
        bitmaps, kind = [plane for pair in zip(ballots, nonzeros, strict=True) for plane in pair], "majority_abstain"
    addresses = [address(bitmap, k, out.device) for bitmap in bitmaps]
    outs = [address(out, k, out.device), address(out_nonzero, k, out.device)]
    table = _on_device(addresses, out.device)
    arguments = [
        _by_value(addresses),
        np.uint64(0 if table is None else table.data_ptr()),
        np.uint32(len(ballots)),
        np.uint64(k),
        *outs,
        np.uint64(key),
        np.uint64(first_word),
        np.uint32(kernels.TIES[ties]),
        _wide([*addresses, *outs]),
        cell(tied, torch.int64, out.device),
    ]
    if k:
        kernels.launch(f"{kind}_{_planes(len(bitmaps))}", _blocks(k, _WORDS_PER_BLOCK), arguments, out.device)
    return tied


def count(ballots: Sequence[Tensor], planes: Tensor) -> None:
    """Write how many of ``ballots`` have a 1, bit-sliced; see :func:`mpisign.bitmap.host.count`.

    Args:
        ballots: V >= 1 bitmaps, (k,) each.
        planes: (p, k) words with contiguous rows and p >= V.bit_length(), written.
    """
    if len(planes) < len(ballots).bit_length():
        raise ValueError(f"{len(planes)} planes cannot count {len(ballots)} ballots")
    k, stride = planes.shape[1], planes.stride(0)
    addresses = [address(ballot, k, planes.device) for ballot in ballots]
    rows = [address(plane, k, planes.device) for plane in planes]
    table = _on_device(addresses, planes.device)
    arguments = [
        _by_value(addresses),
        np.uint64(0 if table is None else table.data_ptr()),
        np.uint32(len(ballots)),
        np.uint64(k),
        rows[0],
        np.uint64(stride),
        np.uint32(len(planes)),
        _wide([*addresses, *rows]),
    ]
    if k:
        name = f"count_{_planes(len(ballots), len(planes))}"
        kernels.launch(name, _blocks(k, _WORDS_PER_BLOCK), arguments, planes.device)


def add_counts(counts: Sequence[Tensor], planes: Tensor) -> None:
    """Write the sum of ``counts``, bit-sliced; see :func:`mpisign.bitmap.host.add_counts`.

    Args:
        counts: C >= 1 of (p, k) words, with contiguous rows.
        planes: (q, k) words with contiguous rows and q >= p, written.
    """
    check_counts([len(count) for count in counts], len(planes))
    k = planes.shape[1]
    addresses = [address(plane, k, planes.device) for count in counts for plane in count]
    rows = [address(plane, k, planes.device) for plane in planes]
    table = _on_device(addresses, planes.device)
    arguments = [
        _by_value(addresses),
        np.uint64(0 if table is None else table.data_ptr()),
        np.uint32(len(counts)),
        np.uint32(len(counts[0])),
        np.uint64(k),
        rows[0],
        np.uint64(planes.stride(0)),
        np.uint32(len(planes)),
        _wide([*addresses, *rows]),
    ]
    if k:
        kernels.launch(f"add_counts_{_planes(0, len(planes))}", _blocks(k, _WORDS_PER_BLOCK), arguments, planes.device)


def decide_counts(
    yes: Tensor,
    voted: int | Tensor,
    out: Tensor,
    *,
    ties: str = "coin",
    key: int = 0,
    first_word: int = 0,
    out_nonzero: Tensor | None = None,
    tied: Tensor | None = None,
) -> Tensor:
    """Decide as :func:`majority`, from counts; see :func:`mpisign.bitmap.host.decide_counts`.

    Args:
        yes: (p, k) words with contiguous rows, as ``voted``, if it is not a number: (q, k).
        out, out_nonzero: (k,), written.
        tied: 0-d int64 to which the number of tied positions is added.

    Returns:
        ``tied``.
    """
    check_moved(out_nonzero, ties, abstentions=not isinstance(voted, int))
    check_voters(len(yes), voted)
    k = out.numel()
    tied = torch.zeros((), dtype=torch.int64, device=out.device) if tied is None else tied
    everywhere, counted = (voted, ()) if isinstance(voted, int) else (0, tuple(voted))
    addresses = [address(plane, k, out.device) for plane in (*yes, *counted)]
    outs = [address(out, k, out.device), address(out_nonzero, k, out.device)]
    arguments = [
        _by_value(addresses),
        np.uint32(len(yes)),
        np.uint32(len(counted)),
        np.uint32(everywhere),
        np.uint64(k),
        *outs,
        np.uint64(key),
        np.uint64(first_word),
        np.uint32(kernels.TIES[ties]),
        _wide([*addresses, *outs]),
        cell(tied, torch.int64, out.device),
    ]
    if k:
        kernels.launch("decide_counts", _blocks(k, _WORDS_PER_BLOCK), arguments, out.device)
    return tied


def agreement(
    ballot: Tensor,
    decision: Tensor,
    elements: int,
    nonzero: Tensor | None = None,
    moved: Tensor | None = None,
    *,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How many elements a rank and the decision agree on, and on how many both spoke.

    See :func:`mpisign.bitmap.host.agreement`.

    Args:
        counts: (2,) int64 to which the two are added.

    Returns:
        The two elements of ``counts``.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=ballot.device) if counts is None else counts
    k = words_for(elements)
    arguments = [
        address(ballot, k, ballot.device),
        address(decision, k, ballot.device),
        np.uint64(elements),
        address(nonzero, k, ballot.device),
        address(moved, k, ballot.device),
        cell(counts, torch.int64, ballot.device, 2),
    ]
    if k:
        kernels.launch("agreement", _blocks(k, _WORDS_PER_BLOCK), arguments, ballot.device)
    return counts[0], counts[1]


def any_zero(words: Tensor, *, found: Tensor | None = None) -> Tensor:
    """Whether one of ``words`` (k,) has no 1.

    Args:
        found: 0-d bool that becomes True if so, and is left alone otherwise.

    Returns:
        ``found``.
    """
    k = words.numel()
    found = torch.zeros((), dtype=torch.bool, device=words.device) if found is None else found
    bitmap = address(words, k, words.device)
    if k:
        arguments = [bitmap, np.uint64(k), _wide([bitmap]), cell(found, torch.bool, words.device)]
        kernels.launch("any_zero", _blocks(k, _WORDS_PER_BLOCK), arguments, words.device)
    return found


# ----------------------------------------------------------------------------------------------------- arguments


def _blocks(items: int, per_block: int) -> int:
    return -(-items // per_block)


def _elements(values: Tensor) -> np.uint64:
    """Where a dense tensor's elements lie."""
    if not (values.is_contiguous() or is_dense(values)):
        raise ValueError(f"a tensor of shape {tuple(values.shape)} and strides {values.stride()} has gaps in memory")
    first: np.uint64 = np.uint64(values.data_ptr())
    return first


def _by_value(addresses: Sequence[np.uint64]) -> npt.NDArray[np.void]:
    return _by_value_of(tuple(addresses))


@functools.lru_cache(maxsize=64)  # buffers stay where they are from step to step
def _by_value_of(addresses: tuple[np.uint64, ...]) -> npt.NDArray[np.void]:
    by_value = np.zeros(1, kernels.BITMAPS)
    some = addresses[: kernels.BITMAP_CAPACITY]
    by_value["at"][0, : len(some)] = some
    return kernels.opaque(by_value)


def _on_device(addresses: Sequence[np.uint64], device: torch.device) -> Tensor | None:
    """The list in device memory, if it is too long to be passed by value. Keep it until the launch."""
    too_long = len(addresses) > kernels.BITMAP_CAPACITY
    return torch.from_numpy(np.array(addresses)).to(device) if too_long else None


def _wide(addresses: Iterable[np.uint64]) -> np.uint32:
    wide: np.uint32 = np.uint32(not any(int(address) % 16 for address in addresses))
    return wide


def _planes(inputs: int, at_least: int = 0) -> int:
    """The smallest counter there is a kernel for that holds ``inputs``."""
    needed = max(inputs.bit_length(), at_least)
    if needed > kernels.PLANES[-1]:
        raise ValueError(f"there are no counters of {needed} planes: at most {kernels.PLANES[-1]}")
    return next(planes for planes in kernels.PLANES if planes >= needed)
