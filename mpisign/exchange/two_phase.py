"""Two-phase: all-to-all, decide a shard, all-gather the decisions.

Rank r gets everybody's slice r, decides it, and sends the decision to all. Bytes sent per rank:
(M - 1)/M * (message + decision), which stays flat as M grows. Two latencies. Each rank owns one
shard: a *malicious* rank can falsify a decision there, a merely broken one cannot (its ballot is one of M).

A message of several planes is cut across all of them, by an MPI datatype, so that nothing is copied.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpisign.exchange.staging import Buffer
from mpisign.group import Group
from mpisign.session import Session
from mpisign.watchdog import Pending

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["TwoPhase"]


class TwoPhase:
    """One bucket's buffers and its two collectives. See :class:`mpisign.exchange.choose.Exchange`."""

    name = "two_phase"

    def __init__(
        self,
        length: int,
        dtype: torch.dtype,
        planes_up: int,
        planes_down: int,
        group: Group,
        device: torch.device,
    ) -> None:
        ranks = group.size
        shard = -(-length // ranks)  # the last shards may hold padding: less than M items a bucket
        self._outgoing = Buffer((planes_up, shard * ranks), dtype, device)
        self._incoming = Buffer((ranks, planes_up, shard), dtype, device)
        self._verdict = Buffer((planes_down, shard), dtype, device)
        self._spread = Buffer((planes_down, shard * ranks), dtype, device)
        self.message = self._outgoing.tensor[:, :length]
        self.received = self._incoming.tensor
        self.decision = self._spread.tensor[:, :length]
        self._at = min(group.rank * shard, length)  # where this rank's shard begins
        mine = min(shard, length - self._at)
        self._messages = [message[:, :mine] for message in self.received]
        self._decided = self._verdict.tensor[:, :mine]
        item = torch.empty(0, dtype=dtype, device="cpu").numpy().dtype
        self._slice_up = _slice_type(item, planes_up, shard, ranks)
        self._slice_down = _slice_type(item, planes_down, shard, ranks)
        self.bytes_sent = (ranks - 1) * shard * dtype.itemsize * (planes_up + planes_down)

    def push(self) -> None:
        self._outgoing.push()

    def post(self, session: Session) -> Pending:
        self._outgoing.ready()
        request = session.group.phases[1].Ialltoall([self._outgoing.mpi, 1, self._slice_up], self._incoming.mpi)
        return session.post(request, self)

    def heard(self) -> tuple[Sequence[torch.Tensor], torch.Tensor, int]:
        self._incoming.pull()
        return self._messages, self._decided, self._at

    def spread(self, session: Session) -> Pending:
        self._verdict.push()
        self._verdict.ready()
        request = session.group.phases[2].Iallgather(self._verdict.mpi, [self._spread.mpi, 1, self._slice_down])
        return session.post(request, self)

    def landed(self) -> None:
        self._spread.pull()

    def counts_ties_for(self, rank: int) -> bool:
        """Whether ``rank``'s count of ties enters the job's: each counts those of its own shard."""
        return True


@functools.cache  # kept until MPI ends: freeing at interpreter exit would come too late
def _slice_type(dtype: np.dtype[Any], planes: int, shard: int, ranks: int) -> MPI.Datatype:
    """Slice r of a (planes, shard * ranks) array, for r = 0, 1, ...: each starts ``shard`` items after the last."""
    from mpi4py.util.dtlib import from_numpy_dtype

    item = from_numpy_dtype(dtype)
    rows = item.Create_vector(planes, shard, shard * ranks)
    slices: MPI.Datatype = rows.Create_resized(0, shard * dtype.itemsize).Commit()
    rows.Free()
    return slices
