"""MPI counts in 31 bits: what is larger is cut into several operations, here.

MPI 4 has larger counts, but Open MPI 5 is none. Every message is cut by this module, whatever it is for.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["LIMIT_BYTES", "Together", "block_type", "cut", "free_with", "shard_operations", "together"]

LIMIT_BYTES = 1 << 30
"""What one operation takes from a rank at most; an all-gather receives so much from each. Lowered by tests."""


def cut(length: int, item_bytes: int = 1) -> Iterator[tuple[int, int]]:
    """``length`` items of so many bytes as parts of at most :data:`LIMIT_BYTES`: where each begins, and its length."""
    most = max(1, LIMIT_BYTES // item_bytes)
    for start in range(0, length, most):
        yield start, min(most, length - start)


class Together:
    """Some requests as one: it is over when all are."""

    def __init__(self, requests: Sequence[MPI.Request]) -> None:
        self._left = list(requests)

    def Test(self) -> bool:  # noqa: N802 - mpi4py's name
        """Whether all are over; lets MPI go on with each."""
        self._left = [request for request in self._left if not request.Test()]
        return not self._left


def together(requests: Sequence[MPI.Request]) -> Any:
    """The request, or what has its ``Test``."""
    return requests[0] if len(requests) == 1 else Together(requests)


def block_type(dtype: np.dtype[Any], rows: int, width: int, stride: int, extent: int) -> MPI.Datatype:
    """``rows`` rows of ``width`` items, each ``stride`` items on; the next such block ``extent`` items on.

    Its owner frees it, see :func:`free_with`.
    """
    from mpi4py.util.dtlib import from_numpy_dtype

    block = from_numpy_dtype(dtype).Create_hvector(rows, width, stride * dtype.itemsize)
    resized: MPI.Datatype = block.Create_resized(0, extent * dtype.itemsize).Commit()
    block.Free()
    return resized


def shard_operations(
    everyones: Any, owners: Any, item: np.dtype[Any], planes: int, shard: int, ranks: int
) -> list[tuple[Any, Any, list[MPI.Datatype]]]:
    """The operations between (planes, shard * ranks) of all shards and what shard owners have, (planes, shard) each.

    Usually one. All are flat.

    Returns:
        What MPI is given of ``everyones`` and of ``owners`` for each, and the datatypes in them.
    """
    parts = list(cut(shard, planes * ranks * item.itemsize))
    if len(parts) == 1 and planes == 1:  # MPI is quicker where it need not know of gaps
        return [(everyones, owners, [])]
    operations: list[tuple[Any, Any, list[MPI.Datatype]]] = []
    for at, width in parts:
        types = [block_type(item, planes, width, shard * ranks, shard)]
        of_one = owners
        if len(parts) > 1:
            types.append(block_type(item, planes, width, shard, planes * shard))
            of_one = [owners[at:], 1, types[1]]
        operations.append(([everyones[at:], 1, types[0]], of_one, types))
    return operations


def free_with(owner: object, types: Sequence[MPI.Datatype]) -> None:
    """Free ``types`` when ``owner`` is no more; what is on its way with them is not disturbed."""
    # Not when the interpreter ends: MPI may have ended then, and frees them itself.
    weakref.finalize(owner, _free, types).atexit = False


def _free(types: Sequence[MPI.Datatype]) -> None:
    MPI = sys.modules.get("mpi4py.MPI")  # noqa: N806 - what has made them; a clean-up imports nothing
    if MPI is None or MPI.Is_finalized():
        return
    if MPI.Query_thread() == MPI.THREAD_MULTIPLE or MPI.Is_thread_main():  # Python may clean up in any thread
        for its in types:
            its.Free()
