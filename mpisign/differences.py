"""Where ranks, which should say the same, do not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TypeVar

__all__ = ["first_difference", "minority"]

T = TypeVar("T")


def minority(values: Sequence[T]) -> tuple[list[int], T]:
    """The ranks whose value is not the most common one (of equals, rank 0's is), and that common value."""
    usual = max(values, key=lambda value: (values.count(value), value == values[0]))
    return [rank for rank, value in enumerate(values) if value != usual], usual


def first_difference(mine: Sequence[str], theirs: Sequence[str]) -> tuple[str, str]:
    """The first pair of lines that differ: "none" of a side that lacks the other's, "nothing more" if it has ended."""
    for place, (here, there) in enumerate(zip_longest(mine, theirs, fillvalue="nothing more")):
        if here != there:
            lacks_here, lacks_there = here in theirs[place:], there in mine[place:]
            if lacks_here == lacks_there:
                return here, there
            return ("none", there) if lacks_here else (here, "none")
    return "nothing more", "nothing more"
