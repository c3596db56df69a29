"""Counting votes on whole words: bit-sliced counters and comparisons, nothing expanded to a number per vote."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["BLOCK", "Counter", "Planes", "above", "above_constant"]

Words = npt.NDArray[np.uint32]

BLOCK = 8192  # words: ten planes of scratch make 320 KiB, which stays in a core's L2 cache


class Planes:
    """Scratch of block size, lent and taken back, so that counting allocates nothing once it has run."""

    def __init__(self) -> None:
        self._free: list[Words] = []

    def take(self, size: int) -> Words:
        whole = self._free.pop() if self._free else np.empty(BLOCK, np.uint32)
        return whole[:size]

    def give(self, *planes: Words) -> None:
        for plane in planes:
            assert plane.base is not None  # take() lends slices
            self._free.append(plane.base)


class Counter:
    """Bit-sliced counter: plane i of :meth:`total` holds bit i of how many added bitmaps have a 1, everywhere.

    Carry-save: a column keeps at most two pending planes; a third turns into a sum and a carry by a full
    adder (5 word operations). Counting M bitmaps costs about M full adders and 2 log2(M) planes of scratch.
    """

    def __init__(self, scratch: Planes, size: int) -> None:
        self._scratch, self._size = scratch, size
        self._columns: list[list[Words]] = []
        self._borrowed: set[int] = set()  # ids of pending planes that are the caller's, not scratch

    def add(self, bitmap: Words) -> None:
        """Count a bitmap of the caller's; it must not change before :meth:`total`."""
        self._borrowed.add(id(bitmap))
        self._push(bitmap, 0)

    def add_scratch(self, bitmap: Words) -> None:
        """Count a bitmap in scratch, which goes back to it."""
        self._push(bitmap, 0)

    def add_count(self, planes: Words) -> None:
        """Add a count, bit i of it in row i of ``planes``; they must not change before :meth:`total`."""
        for column, plane in enumerate(planes):
            self._borrowed.add(id(plane))
            self._push(plane, column)

    def total(self) -> list[Words]:
        """Settle the pending carries; least significant plane first. Valid until :meth:`release`."""
        column = 0
        while column < len(self._columns):  # a carry may add a column
            if len(self._columns[column]) == 2:
                a, b = self._columns[column]
                one, carry = self._scratch.take(self._size), self._scratch.take(self._size)
                np.bitwise_xor(a, b, out=one)
                np.bitwise_and(a, b, out=carry)
                self._replace(column, one, carry)
            column += 1
        return [pending[0] for pending in self._columns]

    def release(self) -> None:
        """Give the scratch back."""
        for column in self._columns:
            self._drop(column)
        self._columns = []

    def _push(self, plane: Words, column: int) -> None:
        if column == len(self._columns):
            self._columns.append([])
        pending = self._columns[column]
        pending.append(plane)
        if len(pending) < 3:
            return
        a, b, c = pending
        t, one, carry = (self._scratch.take(self._size) for _ in range(3))
        np.bitwise_xor(a, b, out=t)
        np.bitwise_xor(t, c, out=one)
        np.bitwise_and(t, c, out=carry)
        np.bitwise_and(a, b, out=t)
        carry |= t
        self._scratch.give(t)
        self._replace(column, one, carry)

    def _replace(self, column: int, one: Words, carry: Words) -> None:
        self._drop(self._columns[column])
        self._columns[column] = [one]
        self._push(carry, column + 1)

    def _drop(self, pending: list[Words]) -> None:
        for plane in pending:
            if id(plane) in self._borrowed:
                self._borrowed.remove(id(plane))
            else:
                self._scratch.give(plane)


def above_constant(count: list[Words], limit: int, out: Words, equal: Words, t: Words) -> None:
    """``out``: count > limit; ``equal``: count == limit; position by position, from the top bit down.

    ``limit`` must not need more bits than ``count`` has planes.
    """
    out[:] = 0
    equal[:] = 0xFFFFFFFF
    for bit in reversed(range(len(count))):
        if limit >> bit & 1:
            equal &= count[bit]
        else:
            np.bitwise_and(equal, count[bit], out=t)
            out |= t
            equal ^= t


def above(yes: list[Words], no: list[Words], out: Words, equal: Words, t: Words) -> None:
    """``out``: yes > no; ``equal``: yes == no; both of as many planes."""
    out[:] = 0
    equal[:] = 0xFFFFFFFF
    for for_it, against in zip(reversed(yes), reversed(no), strict=True):
        np.bitwise_xor(for_it, against, out=t)
        t &= equal  # undecided so far, and the two counts differ in this bit
        equal ^= t
        t &= for_it
        out |= t
