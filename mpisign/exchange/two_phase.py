"""Two-phase: all-to-all, decide a shard, all-gather the decisions.

Rank r gets everybody's slice r, decides it, and sends the decision to all. Bytes sent per rank:
(M - 1)/M * (message + decision), which stays flat as M grows. Two latencies. Each rank is the counting officer
of its shard: a *malicious* rank can falsify a decision there, a merely broken one cannot (its ballot is one of M).

A message of several planes is cut across all of them, by an MPI datatype, so that nothing is copied.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mpisign.exchange.runs import Decide
from mpisign.world import World

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["TwoPhase"]


class TwoPhase:
    """One bucket's buffers and its two collectives. See :class:`mpisign.exchange.choose.Exchange`."""

    name = "two_phase"

    def __init__(
        self, length: int, dtype: np.dtype[np.generic], planes_up: int, planes_down: int, world: World
    ) -> None:
        ranks = world.size
        shard = -(-length // ranks)  # the last shards may hold padding: less than M items a bucket
        self._shard, self._length = shard, length
        self._outgoing: npt.NDArray[Any] = np.zeros((planes_up, shard * ranks), dtype)
        self.message = self._outgoing[:, :length]
        self._received: npt.NDArray[Any] = np.zeros((ranks, planes_up, shard), dtype)
        self._verdict: npt.NDArray[Any] = np.zeros((planes_down, shard), dtype)
        self._decision: npt.NDArray[Any] = np.zeros((planes_down, shard * ranks), dtype)
        self._slice_up = _slice_type(dtype, planes_up, shard, ranks)
        self._slice_down = _slice_type(dtype, planes_down, shard, ranks)
        self.bytes_sent = (ranks - 1) * (self._verdict.nbytes + self._verdict.nbytes // planes_down * planes_up)

    def start(self, world: World) -> None:
        self._request = world.comm.Ialltoall([self._outgoing, 1, self._slice_up], self._received)

    def settle(self, decide: Decide, world: World, what: str) -> None:
        world.wait(self._request, f"{what}, phase 1")
        at = min(world.rank * self._shard, self._length)
        stop = min(at + self._shard, self._length)
        decide([message[:, : stop - at] for message in self._received], self._verdict[:, : stop - at], at)
        self._request = world.comm.Iallgather(self._verdict, [self._decision, 1, self._slice_down])

    def finish(self, world: World, what: str) -> npt.NDArray[Any]:
        world.wait(self._request, f"{what}, phase 2")
        return self._decision[:, : self._length]

    def counts_ties_for(self, rank: int) -> bool:
        """Whether ``rank``'s count of ties enters the job's: each counts those of its own shard."""
        return True


@functools.cache  # kept until MPI ends: freeing at interpreter exit would come too late
def _slice_type(dtype: np.dtype[np.generic], planes: int, shard: int, ranks: int) -> MPI.Datatype:
    """Slice r of a (planes, shard * ranks) array, for r = 0, 1, ...: each starts ``shard`` items after the last."""
    from mpi4py.util.dtlib import from_numpy_dtype

    item = from_numpy_dtype(dtype)
    rows = item.Create_vector(planes, shard, shard * ranks)
    slices: MPI.Datatype = rows.Create_resized(0, shard * dtype.itemsize).Commit()
    rows.Free()
    return slices
