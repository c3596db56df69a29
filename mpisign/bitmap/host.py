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

__all__ = ["FORMATS", "FloatFormat", "agreement", "all_finite", "majority", "pack", "unpack", "words_for"]

Words = npt.NDArray[np.uint32]
Bits = npt.NDArray[np.unsignedinteger]

PACK_BLOCK = 262144  # elements; smaller blocks would sit better in the cache but pay more for the calls
UNPACK_BLOCK = 262144  # elements; smaller blocks would sit better in the cache but pay more for the calls
VOTE_BLOCK = 8192  # words: ten planes of scratch make 320 KiB


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
        self.planes: list[Words] = []


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
            ``"abstain"`` (sign bit 0, and 0 in ``nonzero``).
        key: key of the zeros' coin, see :mod:`mpisign.bitmap.coin`.
        first_word: global number of ``words[0]``, the position of the coin.
        nonzero: (ceil(n/32),) uint32, written if ``zeros="abstain"``: 1 where the element votes.

    Returns:
        False if an element is NaN or Inf; the words are then worth nothing.
    """
    finite = True
    for lo in range(0, values.size, PACK_BLOCK):
        block = values[lo : lo + PACK_BLOCK]
        at = lo // 32
        span = slice(at, at + words_for(block.size))
        plane = None if nonzero is None else nonzero[span]
        with np.errstate(all="ignore"):
            finite &= _pack_block(block, fmt, words[span], zeros, key, first_word + at, plane)
    return finite


def _pack_block(
    block: Bits, fmt: FloatFormat, words: Words, zeros: str, key: int, first_word: int, nonzero: Words | None
) -> bool:
    flags = _scratch.flags[: block.size]
    if fmt.native is None:
        zero = 0
        x: npt.NDArray[np.generic] = np.bitwise_and(block, fmt.sign - 1, out=_scratch.magnitude[: block.size])
        np.less_equal(block, fmt.sign, out=flags)  # the sign bit is clear, or it is -0
    else:
        x = block.view(fmt.native)
        np.greater_equal(x, 0, out=flags)
    _pack_flags(flags, words)
    if zeros != "positive":
        zero = np.equal(x, 0, out=flags).any()
        if zero:
            is_zero = np.empty_like(words)
            _pack_flags(flags, is_zero)
            words &= ~is_zero
            if zeros == "coin":
                is_zero &= coin_words(key, first_word, words.size)
                words |= is_zero
        if nonzero is not None:
            np.logical_not(flags, out=flags)
            _pack_flags(flags, nonzero)
    if fmt.native is None:
        return int(x.max(initial=0)) < fmt.infinity
    return _block_finite(block, fmt)


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


class _Counter:
    """Bit-sliced counter: ``planes[i]`` holds bit i of how many added bitmaps have a 1, for every position.

    Carry-save: a column keeps at most two pending planes; a third turns into a sum and a carry by a full
    adder (5 word operations). Counting M bitmaps costs about M full adders and 2 log2(M) planes of scratch.
    """

    def __init__(self, size: int, pool: list[Words]) -> None:
        self._size, self._pool = size, pool
        self._columns: list[list[tuple[Words, bool]]] = []

    def _take(self) -> Words:
        return self._pool.pop()[: self._size] if self._pool else np.empty(VOTE_BLOCK, np.uint32)[: self._size]

    def _give(self, plane: Words, owned: bool) -> None:
        if owned:
            self._pool.append(plane if plane.base is None else plane.base)

    def add(self, plane: Words, column: int = 0, owned: bool = False) -> None:
        if column == len(self._columns):
            self._columns.append([])
        pending = self._columns[column]
        pending.append((plane, owned))
        if len(pending) < 3:
            return
        (a, own_a), (b, own_b), (c, own_c) = pending
        t, total, carry = self._take(), self._take(), self._take()
        np.bitwise_xor(a, b, out=t)
        np.bitwise_xor(t, c, out=total)
        np.bitwise_and(t, c, out=carry)
        np.bitwise_and(a, b, out=t)
        carry |= t
        for spent, own in ((a, own_a), (b, own_b), (c, own_c), (t, True)):
            self._give(spent, own)
        pending[:] = [(total, True)]
        self.add(carry, column + 1, True)

    def planes(self) -> list[Words]:
        """Settle the pending carries; least significant plane first."""
        column = 0
        while column < len(self._columns):
            pending = self._columns[column]
            if len(pending) == 2:
                (a, own_a), (b, own_b) = pending
                total, carry = self._take(), self._take()
                np.bitwise_xor(a, b, out=total)
                np.bitwise_and(a, b, out=carry)
                self._give(a, own_a)
                self._give(b, own_b)
                pending[:] = [(total, True)]
                self.add(carry, column + 1, True)
            column += 1
        return [pending[0][0] for pending in self._columns]

    def release(self) -> None:
        for pending in self._columns:
            for plane, owned in pending:
                self._give(plane, owned)


def _above_constant(planes: list[Words], limit: int, above: Words, equal: Words, t: Words) -> None:
    """``above``: count > limit; ``equal``: count == limit; position by position, from the top bit down."""
    above[:] = 0
    equal[:] = 0xFFFFFFFF
    for bit in reversed(range(max(len(planes), limit.bit_length()))):
        if bit >= len(planes):  # the limit is larger than any count
            equal[:] = 0
        elif limit >> bit & 1:
            equal &= planes[bit]
        else:
            np.bitwise_and(equal, planes[bit], out=t)
            above |= t
            equal ^= t


def _above(yes: list[Words], no: list[Words], above: Words, equal: Words, t: Words) -> None:
    """``above``: count of yes > count of no; ``equal``: the same count."""
    above[:] = 0
    equal[:] = 0xFFFFFFFF
    for bit in reversed(range(max(len(yes), len(no)))):
        if bit < len(yes) and bit < len(no):
            np.bitwise_xor(yes[bit], no[bit], out=t)
            t &= equal  # undecided so far, and the two counts differ in this bit
            equal ^= t
            t &= yes[bit]
            above |= t
        elif bit < len(yes):
            np.bitwise_and(equal, yes[bit], out=t)
            above |= t
            equal ^= t
        else:
            equal &= ~no[bit]


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
    if out_nonzero is None and (ties == "zero" or nonzeros is not None):
        raise ValueError("ties='zero' and abstentions need an out_nonzero plane")
    pool = _scratch.planes
    tied = 0
    for lo in range(0, out.size, VOTE_BLOCK):
        span = slice(lo, min(lo + VOTE_BLOCK, out.size))
        size = span.stop - span.start
        decided = out[span]
        yes = _Counter(size, pool)
        equal, t = yes._take(), yes._take()
        voted = None
        if nonzeros is None:
            for ballot in ballots:
                yes.add(ballot[span])
            _above_constant(yes.planes(), len(ballots) // 2, decided, equal, t)
            if len(ballots) % 2:
                equal[:] = 0
        else:
            no = _Counter(size, pool)
            voted = yes._take()
            voted[:] = 0
            for ballot, nonzero in zip(ballots, nonzeros, strict=True):
                voted |= nonzero[span]
                yes.add(ballot[span])
                against = no._take()
                np.bitwise_xor(ballot[span], nonzero[span], out=against)
                no.add(against, owned=True)
            _above(yes.planes(), no.planes(), decided, equal, t)
            equal &= voted
            no.release()
        yes.release()
        tied_here = 0
        if len(ballots) % 2 == 0 or nonzeros is not None:
            tied_here = int(np.bitwise_count(equal).sum(dtype=np.int64))
            tied += tied_here
        if out_nonzero is not None:
            out_nonzero[span] = 0xFFFFFFFF if voted is None else voted
        if ties == "zero":
            assert out_nonzero is not None
            out_nonzero[span] &= ~equal
        elif ties == "positive":
            decided |= equal
        elif tied_here:
            equal &= coin_words(key, first_word + lo, size)
            decided |= equal
        for plane in (equal, t) if voted is None else (equal, t, voted):
            yes._give(plane, True)
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
