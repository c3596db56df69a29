"""Bit arithmetic on the host: pack signs, count votes, unpack decisions. NumPy, at memory speed.

This file is the oracle of the wire format. A word is a little-endian uint32; bit *i* (0 = least significant)
of word *w* is element ``32 w + i`` of its segment; 1 means +1, 0 means -1; bits past the last element are 0.

Values come as raw bits (an unsigned array of the float's width) with their :class:`FloatFormat`, because
NumPy has no bfloat16 and because a sign, a zero and a NaN are questions about bits.
Everything runs in blocks that stay in a cache, so that memory is read once.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mpisign.bitmap.coin import coin_words
from mpisign.bitmap.counter import BLOCK, Counter, Planes, above, above_constant

__all__ = [
    "FORMATS",
    "FloatFormat",
    "add_counts",
    "agreement",
    "all_finite",
    "check_counts",
    "check_moved",
    "check_voters",
    "count",
    "decide_counts",
    "majority",
    "pack",
    "unpack",
    "words_for",
]

Words = npt.NDArray[np.uint32]
Bits = npt.NDArray[np.unsignedinteger]

PACK_BLOCK = 262144  # elements; smaller blocks would sit better in the cache but pay more for the calls
UNPACK_BLOCK = 262144  # elements; smaller blocks would sit better in the cache but pay more for the calls


@dataclass(frozen=True)
class FloatFormat:
    """How a float type lies in memory.

    ``bits``: its unsigned integer type; ``one`` and ``infinity``: the bit patterns of +1 and +Inf;
    ``native``: the NumPy float type to compute with, or None where integers are faster (16-bit types).
    """

    name: str
    bits: np.dtype[np.unsignedinteger]
    one: int
    infinity: int
    native: np.dtype[np.floating] | None

    @property
    def sign(self) -> int:
        """The sign bit alone."""
        return 1 << (8 * self.bits.itemsize - 1)


FORMATS = {
    "float32": FloatFormat("float32", np.dtype(np.uint32), 0x3F800000, 0x7F800000, np.dtype(np.float32)),
    "float64": FloatFormat("float64", np.dtype(np.uint64), 0x3FF << 52, 0x7FF << 52, np.dtype(np.float64)),
    "float16": FloatFormat("float16", np.dtype(np.uint16), 0x3C00, 0x7C00, None),
    "bfloat16": FloatFormat("bfloat16", np.dtype(np.uint16), 0x3F80, 0x7F80, None),
}


class _Scratch(threading.local):
    """Block-sized buffers, one set a thread, so that no call allocates them."""

    def __init__(self) -> None:
        self.flags = np.empty(PACK_BLOCK, np.bool_)
        self.magnitude = np.empty(PACK_BLOCK, np.uint16)
        self.mask = np.empty(UNPACK_BLOCK, np.uint64)
        self.planes = Planes()


_scratch = _Scratch()


def words_for(elements: int) -> int:
    """How many uint32 words hold one bit for each of ``elements``."""
    return (elements + 31) // 32


# ------------------------------------------------------------------------------------------------ packing


def all_finite(values: Bits, fmt: FloatFormat) -> bool:
    """Whether no element of ``values`` (n,) is NaN or Inf."""
    with np.errstate(all="ignore"):
        return all(_block_finite(values[lo : lo + PACK_BLOCK], fmt) for lo in range(0, values.size, PACK_BLOCK))


def _block_finite(block: Bits, fmt: FloatFormat) -> bool:
    if fmt.native is None:
        magnitude = np.bitwise_and(block, fmt.sign - 1, out=_scratch.magnitude[: block.size])
        return int(magnitude.max(initial=0)) < fmt.infinity
    x = block.view(fmt.native)
    # The sum of squares is finite only if every element is; one pass at the speed of a dot product.
    # It may overflow on large finite values: then ask each element.
    return math.isfinite(np.dot(x, x)) or bool(np.isfinite(x).all())


def pack(
    values: Bits,
    fmt: FloatFormat,
    words: Words,
    *,
    zeros: str = "coin",
    key: int = 0,
    first_word: int = 0,
    nonzero: Words | None = None,
) -> bool:
    """Write the signs of ``values`` into ``words`` and say whether all of them were finite.

    Args:
        values: (n,) raw bits of ``fmt``, contiguous.
        words: (ceil(n/32),) uint32, written; bits past element n - 1 become 0.
        zeros: what +0 and -0 vote: ``"coin"`` (the coin of ``key`` at their position), ``"positive"`` (+1),
            ``"abstain"`` (sign bit 0, and 0 in ``nonzero``), ``"rows"`` (the coin, and 0 in ``nonzero``).
        key: key of the zeros' coin, see :mod:`mpisign.bitmap.coin`.
        first_word: global number of ``words[0]``, the position of the coin.
        nonzero: (ceil(n/32),) uint32, written if ``zeros`` is ``"abstain"`` or ``"rows"``: 1 where the element is
            not zero. Bits past element n - 1 become 0.

    Returns:
        False if an element is NaN or Inf; the words are then worth nothing.
    """
    finite = True
    if zeros not in ("abstain", "rows"):
        nonzero = None
    with np.errstate(all="ignore"):
        for lo in range(0, values.size, PACK_BLOCK):
            block = values[lo : lo + PACK_BLOCK]
            at = lo // 32
            span = slice(at, at + words_for(block.size))
            # First of all, because a dot product is also the fastest way to bring the block into the cache.
            finite &= _block_finite(block, fmt)
            _pack_block(
                block, fmt, words[span], zeros, key, first_word + at, None if nonzero is None else nonzero[span]
            )
    return finite


def _pack_block(
    block: Bits, fmt: FloatFormat, words: Words, zeros: str, key: int, first_word: int, nonzero: Words | None
) -> None:
    flags = _scratch.flags[: block.size]
    if fmt.native is None:
        np.less_equal(block, fmt.sign, out=flags)  # the sign bit is clear, or it is -0
    else:
        np.greater_equal(block.view(fmt.native), 0, out=flags)
    _pack_flags(flags, words)
    if zeros == "positive":
        return
    if fmt.native is None:
        np.equal(np.bitwise_and(block, fmt.sign - 1, out=_scratch.magnitude[: block.size]), 0, out=flags)
    else:
        np.equal(block.view(fmt.native), 0, out=flags)
    if flags[flags.argmax()]:  # any(), stopping at the first
        is_zero = np.empty_like(words)
        _pack_flags(flags, is_zero)
        words &= ~is_zero
        if nonzero is not None:
            _ones(nonzero, block.size)
            nonzero ^= is_zero
        if zeros != "abstain":
            is_zero &= coin_words(key, first_word, words.size)
            words |= is_zero
    elif nonzero is not None:
        _ones(nonzero, block.size)


def _ones(words: Words, elements: int) -> None:
    """A 1 for each element."""
    words.fill(0xFFFFFFFF)
    if elements % 32:
        words[-1] = (1 << elements % 32) - 1


def _pack_flags(flags: npt.NDArray[np.bool_], words: Words) -> None:
    packed = np.packbits(flags, bitorder="little")
    as_bytes = words.view(np.uint8)
    as_bytes[: packed.size] = packed
    as_bytes[packed.size :] = 0


# ---------------------------------------------------------------------------------------------- unpacking


@functools.cache
def _signs_table(fmt: FloatFormat) -> Bits:
    """(256, 8): the eight floats +-1 that a byte of signs stands for."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits == 1, fmt.one, fmt.one | fmt.sign).astype(fmt.bits)


@functools.cache
def _mask_table(bits: np.dtype[np.unsignedinteger]) -> Bits:
    """(256, 8): all ones where the byte has a 1, else all zeros (which is +0.0 in every format)."""
    ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(ones == 1, np.iinfo(bits).max, 0).astype(bits)


def unpack(words: Words, fmt: FloatFormat, out: Bits, *, nonzero: Words | None = None) -> None:
    """Write +1 or -1 (or 0 where ``nonzero`` has a 0) for each bit.

    Args:
        words: (ceil(n/32),) uint32.
        out: (n,) raw bits of ``fmt``, contiguous, written.
        nonzero: (ceil(n/32),) uint32 or None (no zeros).
    """
    for lo in range(0, out.size, UNPACK_BLOCK):
        block = out[lo : lo + UNPACK_BLOCK]
        span = slice(lo // 32, lo // 32 + words_for(block.size))
        _look_up(_signs_table(fmt), words[span], block)
        if nonzero is not None:
            mask = _scratch.mask.view(fmt.bits)[: block.size]
            _look_up(_mask_table(fmt.bits), nonzero[span], mask)
            block &= mask


def _look_up(table: Bits, words: Words, out: Bits) -> None:
    whole = out.size // 8
    as_bytes = words.view(np.uint8)
    # mode="clip" is what makes np.take write straight into `out`; no index can be out of range.
    np.take(table, as_bytes[:whole], axis=0, out=out[: 8 * whole].reshape(whole, 8), mode="clip")
    if out.size % 8:
        out[8 * whole :] = table[as_bytes[whole], : out.size % 8]


# ----------------------------------------------------------------------------------------------- deciding


def majority(
    ballots: Sequence[Words],
    out: Words,
    *,
    ties: str = "coin",
    key: int = 0,
    first_word: int = 0,
    nonzeros: Sequence[Words] | None = None,
    out_nonzero: Words | None = None,
) -> int:
    """Decide every bit by the majority of ``ballots`` and return how many bits were tied.

    Args:
        ballots: V >= 1 bitmaps of signs, each (k,) uint32.
        out: (k,) uint32, written: the signs decided.
        ties: ``"coin"`` (the coin of ``key``, the same wherever it is counted), ``"positive"``, ``"zero"``.
        key: key of the ties' coin.
        first_word: global number of word 0.
        nonzeros: V bitmaps that say who votes where, or None if everybody votes everywhere.
            A sign bit must be 0 where its rank abstains, as :func:`pack` leaves it.
        out_nonzero: (k,) uint32, written: 0 where the decision is "do not move": a tie under ``ties="zero"``,
            or a position on which nobody voted. Required in these two cases. Padding bits are unspecified.

    Returns:
        The number of positions with as many votes for as against. No votes at all is not a tie.
    """
    check_moved(out_nonzero, ties, abstentions=nonzeros is not None)
    scratch = _scratch.planes
    tied = 0
    for lo in range(0, out.size, BLOCK):
        span = slice(lo, min(lo + BLOCK, out.size))
        decided = out[span]
        equal, t, voted = (scratch.take(decided.size) for _ in range(3))
        yes, no = Counter(scratch, decided.size), Counter(scratch, decided.size)
        for ballot in ballots:
            yes.add(ballot[span])
        if nonzeros is None:
            voted[:] = 0xFFFFFFFF
            above_constant(yes.total(), len(ballots) // 2, decided, equal, t)
            can_tie = len(ballots) % 2 == 0
        else:
            voted[:] = 0
            for ballot, nonzero in zip(ballots, nonzeros, strict=True):
                voted |= nonzero[span]
                against = scratch.take(decided.size)
                np.bitwise_xor(ballot[span], nonzero[span], out=against)
                no.add_scratch(against)
            above(yes.total(), no.total(), decided, equal, t)
            equal &= voted
            can_tie = True
        yes.release()
        no.release()
        moved = None if out_nonzero is None else out_nonzero[span]
        if moved is not None:
            moved[:] = voted
        if can_tie:
            tied += _break_ties(decided, equal, moved, ties, key, first_word + lo)
        scratch.give(equal, t, voted)
    return tied


def count(ballots: Sequence[Words], planes: Words) -> None:
    """Write how many of ``ballots`` have a 1, bit-sliced: plane i gets bit i of the count, everywhere.

    Args:
        ballots: V >= 1 bitmaps, each (k,) uint32.
        planes: (p, k) uint32, written; p >= V.bit_length().
    """
    if len(planes) < len(ballots).bit_length():
        raise ValueError(f"{len(planes)} planes cannot count {len(ballots)} ballots")
    for lo in range(0, planes.shape[1], BLOCK):
        block = planes[:, lo : lo + BLOCK]
        counter = Counter(_scratch.planes, block.shape[1])
        for ballot in ballots:
            counter.add(ballot[lo : lo + BLOCK])
        total = counter.total()
        block[: len(total)] = total
        block[len(total) :] = 0
        counter.release()


def add_counts(counts: Sequence[Words], planes: Words) -> None:
    """Write the sum of ``counts``, bit-sliced as :func:`count` writes them.

    Args:
        counts: C >= 1 of them, each (p, k) uint32.
        planes: (q, k) uint32, written; q >= p. A sum that needs more planes loses its upper bits.
    """
    check_counts([len(count) for count in counts], len(planes))
    for lo in range(0, planes.shape[1], BLOCK):
        block = planes[:, lo : lo + BLOCK]
        counter = Counter(_scratch.planes, block.shape[1])
        for count in counts:
            counter.add_count(count[:, lo : lo + BLOCK])
        total = counter.total()[: len(block)]
        block[: len(total)] = total
        block[len(total) :] = 0
        counter.release()


def check_moved(out_nonzero: object, ties: str, *, abstentions: bool) -> None:
    """Raise ValueError if a decision that may be "do not move" has no plane to say so."""
    if out_nonzero is None and (ties == "zero" or abstentions):
        raise ValueError("ties='zero' and abstentions need an out_nonzero plane")


def check_voters(planes: int, voted: object) -> None:
    """Raise ValueError if a count of so many planes is not one of ``voted`` voters."""
    if isinstance(voted, int) and voted >= 2 ** (planes + 1):
        raise ValueError(f"{planes} planes cannot count {voted} voters")


def check_counts(lengths: Sequence[int], planes: int) -> None:
    """Raise ValueError unless counts of so many planes can be added up in ``planes``."""
    if len(set(lengths)) != 1 or lengths[0] > planes:
        raise ValueError(f"{planes} planes cannot hold the sum of counts of {', '.join(map(str, lengths))} planes")


def decide_counts(
    yes: Words,
    voted: int | Words,
    out: Words,
    *,
    ties: str = "coin",
    key: int = 0,
    first_word: int = 0,
    out_nonzero: Words | None = None,
) -> int:
    """Decide as :func:`majority`, from how many have voted +1 and how many have voted at all.

    Args:
        yes: (p, k) uint32, bit-sliced.
        voted: as many everywhere, or (q, k) uint32, bit-sliced; nowhere fewer than ``yes``.
        out, ties, key, first_word, out_nonzero: as in :func:`majority`. Without votes there is nothing to decide, which
            needs ``out_nonzero`` where ``voted`` is not one number.

    Returns:
        The number of positions with as many votes for as against. No votes at all is not a tie.
    """
    check_moved(out_nonzero, ties, abstentions=not isinstance(voted, int))
    check_voters(len(yes), voted)
    scratch = _scratch.planes
    tied = 0
    for lo in range(0, out.size, BLOCK):
        span = slice(lo, min(lo + BLOCK, out.size))
        decided = out[span]
        equal, t, spoken, nothing = (scratch.take(decided.size) for _ in range(4))
        if isinstance(voted, int):
            spoken[:] = 0xFFFFFFFF
            above_constant(list(yes[:, span]), voted // 2, decided, equal, t)
            can_tie = voted % 2 == 0
        else:
            nothing[:] = 0
            twice, all_votes = [nothing, *yes[:, span]], list(voted[:, span])
            planes = max(len(twice), len(all_votes))
            above(
                twice + [nothing] * (planes - len(twice)),
                all_votes + [nothing] * (planes - len(all_votes)),
                decided,
                equal,
                t,
            )
            spoken[:] = 0
            for plane in all_votes:
                spoken |= plane
            equal &= spoken
            can_tie = True
        moved = None if out_nonzero is None else out_nonzero[span]
        if moved is not None:
            moved[:] = spoken
        if can_tie:
            tied += _break_ties(decided, equal, moved, ties, key, first_word + lo)
        scratch.give(equal, t, spoken, nothing)
    return tied


def _break_ties(decided: Words, equal: Words, moved: Words | None, ties: str, key: int, first_word: int) -> int:
    """Decide where ``equal`` has a 1, which becomes scratch. Returns the number of those."""
    tied = int(np.bitwise_count(equal).sum(dtype=np.int64))
    if ties == "coin":
        equal &= coin_words(key, first_word, decided.size)
        decided |= equal
    elif ties == "positive":
        decided |= equal
    elif moved is not None:
        moved &= ~equal
    return tied


def agreement(
    ballot: Words, decision: Words, elements: int, nonzero: Words | None = None, moved: Words | None = None
) -> tuple[int, int]:
    """How many elements of one segment a rank and the decision agree on, and on how many both spoke.

    Args:
        ballot, decision: (ceil(elements/32),) uint32 signs.
        nonzero, moved: who voted and what moved, or None for everything.
    """
    both = np.full(words_for(elements), 0xFFFFFFFF, np.uint32)
    if elements % 32:
        both[-1] = (1 << (elements % 32)) - 1
    for plane in (nonzero, moved):
        if plane is not None:
            both &= plane
    agree = ~(ballot ^ decision) & both
    return int(np.bitwise_count(agree).sum(dtype=np.int64)), int(np.bitwise_count(both).sum(dtype=np.int64))
