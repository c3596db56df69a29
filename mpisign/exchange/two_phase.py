"""Two-phase: all-to-all, decide a shard, all-gather the decisions.

Rank r gets everybody's slice r, decides it, and sends the decision to all. Bytes sent per rank:
(M - 1)/M * (message + decision), which stays flat as M grows. Two latencies. Each rank owns one
shard: a *malicious* rank can falsify a decision there, a merely broken one cannot (its ballot is one of M).

A message of several planes is cut across all of them, by an MPI datatype, so that nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpisign.cuts import free_with, shard_operations, together
from mpisign.exchange.decider import Deciding
from mpisign.exchange.staging import Buffer, Held
from mpisign.group import Channels, Group
from mpisign.session import Session
from mpisign.watchdog import Pending

__all__ = ["TwoPhase"]


class TwoPhase:
    """One bucket's buffers and its two collectives. See :class:`mpisign.exchange.choose.Exchange`.

    Attributes:
        types: MPI's datatypes that it has made, and frees.
    """

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
        self.shard = shard = -(-length // ranks)  # the last shards may hold padding: less than M items a bucket
        self._outgoing = Buffer((planes_up, shard * ranks), dtype, device)
        self._incoming = Buffer((ranks, planes_up, shard), dtype, device)
        self._verdict = Buffer((planes_down, shard), dtype, device)
        self._spread = Buffer((planes_down, shard * ranks), dtype, device)
        self.message = self._outgoing.tensor[:, :length]
        self.received: Sequence[torch.Tensor] = list(self._incoming.tensor)
        self.decision = self._spread.tensor[:, :length]
        self._at = min(group.rank * shard, length)  # where this rank's shard begins
        mine = min(shard, length - self._at)
        self._messages = [message[:, :mine] for message in self.received]
        self._decided = self._verdict.tensor[:, :mine]
        item = self._outgoing.item
        self._up = shard_operations(self._outgoing.mpi, self._incoming.mpi, item, planes_up, shard, ranks)
        self._down = shard_operations(self._spread.mpi, self._verdict.mpi, item, planes_down, shard, ranks)
        self.types = [its for _, _, types in (*self._up, *self._down) for its in types]
        free_with(self, self.types)
        self.bytes_sent = (ranks - 1) * shard * dtype.itemsize * (planes_up + planes_down)

    def owners(self, shard: int) -> tuple[int, ...]:
        return (shard,)

    def held(self) -> list[Held]:
        mine = self._decided.shape[1]
        return [(voter, self._at, ballot[:, :mine]) for voter, ballot in enumerate(self._incoming.arrived())]

    def push(self) -> None:
        self._outgoing.push()

    def post(self, session: Session, channels: Channels) -> Pending:
        self._outgoing.ready()
        posted = [channels.first.Ialltoall(of_all, of_one) for of_all, of_one, _ in self._up]
        return session.post(together(posted), self)

    def go_on(self, session: Session, channels: Channels, phase: int, deciding: Deciding) -> Pending | None:
        if phase == 1:
            self._spread.pull()
            return None
        self._incoming.pull()
        deciding.decide(self._messages, self._decided, self._at)
        self._verdict.push()
        self._verdict.ready()
        posted = [channels.second.Iallgather(of_one, of_all) for of_all, of_one, _ in self._down]
        return session.post(together(posted), self)
