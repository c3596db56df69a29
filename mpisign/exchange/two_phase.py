"""Two-phase: all-to-all, decide a shard, all-gather the decisions.

Rank r gets everybody's slice r, decides it, and sends the decision to all. Bytes sent per rank:
(M - 1)/M * (message + decision), which stays flat as M grows. Two latencies. Each rank owns one
shard: a *malicious* rank can falsify a decision there, a merely broken one cannot (its ballot is one of M).

A message of several planes is cut across all of them, by an MPI datatype, so that nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpisign.cuts import block_type, cut, free_with, together
from mpisign.exchange.staging import Buffer
from mpisign.group import Group
from mpisign.session import Session
from mpisign.watchdog import Pending

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
        item = self._outgoing.item
        self._up = [  # where each part begins in a shard, and what it is of all shards, and of one by itself
            (
                at,
                block_type(item, planes_up, width, shard * ranks, shard),
                block_type(item, planes_up, width, shard, planes_up * shard),
            )
            for at, width in cut(shard, planes_up * ranks * item.itemsize)
        ]
        self._down = [
            (
                at,
                block_type(item, planes_down, width, shard, planes_down * shard),
                block_type(item, planes_down, width, shard * ranks, shard),
            )
            for at, width in cut(shard, planes_down * ranks * item.itemsize)
        ]
        self._one_plane = planes_up == 1, planes_down == 1
        free_with(self, [its for _, *types in (*self._up, *self._down) for its in types])
        self.bytes_sent = (ranks - 1) * shard * dtype.itemsize * (planes_up + planes_down)

    def push(self) -> None:
        self._outgoing.push()

    def post(self, session: Session) -> Pending:
        self._outgoing.ready()
        comm, outgoing, incoming = session.group.phases[1], self._outgoing.mpi, self._incoming.mpi
        if len(self._up) == 1:  # nothing is cut, and MPI is quicker where it need not know of gaps
            posted = [comm.Ialltoall(outgoing if self._one_plane[0] else [outgoing, 1, self._up[0][1]], incoming)]
        else:
            posted = [
                comm.Ialltoall([outgoing[start:], 1, of_all], [incoming[start:], 1, of_one])
                for start, of_all, of_one in self._up
            ]
        return session.post(together(posted), self)

    def heard(self) -> tuple[Sequence[torch.Tensor], torch.Tensor, int]:
        self._incoming.pull()
        return self._messages, self._decided, self._at

    def spread(self, session: Session) -> Pending:
        self._verdict.push()
        self._verdict.ready()
        comm, verdict, everyones = session.group.phases[2], self._verdict.mpi, self._spread.mpi
        if len(self._down) == 1:
            posted = [comm.Iallgather(verdict, everyones if self._one_plane[1] else [everyones, 1, self._down[0][2]])]
        else:
            posted = [
                comm.Iallgather([verdict[start:], 1, of_one], [everyones[start:], 1, of_all])
                for start, of_one, of_all in self._down
            ]
        return session.post(together(posted), self)

    def landed(self) -> None:
        self._spread.pull()

    def counts_ties_for(self, rank: int) -> bool:
        """Whether ``rank``'s count of ties enters the job's: each counts those of its own shard."""
        return True
