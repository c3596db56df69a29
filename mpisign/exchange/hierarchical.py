"""Hierarchical: ballots are counted inside each node first, so that what crosses the network does not grow with it.

The ballots of a node meet in its shared memory. The rank with local number g counts slice g of them into a tally,
ceil(log2(G + 1)) planes for G ranks. The ranks with one local number on all nodes, a lane, exchange tallies in two
phases: all-to-all, the owner of a shard adds them up and decides, all-gather. The decision lands in the shared memory,
where the whole node reads it. Where nodes differ, there are as many lanes as the smallest has ranks.

The same bits as the flat exchanges decide, always. Bytes out of a node's card, N nodes, d coordinates, messages of one
plane: (N - 1)/N * (ceil(log2(G + 1)) + 1) * d/8. Four phases: a barrier of the node ("ballots are written"), tallies
up, decisions down, and a barrier again. Who is trusted: the owner of a shard, and of a node each rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mpisign.cuts import free_with, shard_operations, together
from mpisign.exchange.decider import Deciding
from mpisign.exchange.staging import Buffer, Held
from mpisign.group import Channels, Group
from mpisign.rules import TallyRule
from mpisign.session import Session
from mpisign.watchdog import Pending

__all__ = ["Hierarchical"]

HOST = torch.device("cpu")  # where a node's memory is


class Hierarchical:
    """One bucket's buffers and its four phases. See :class:`mpisign.exchange.choose.Exchange`.

    It works once it has been given its part of the node's memory: see :meth:`attach`.

    Args:
        rule: who counts, and how wide its tallies are.

    Attributes:
        node_bytes: how much of the node's memory it needs.
    """

    name = "hierarchical"

    def __init__(
        self,
        length: int,
        dtype: torch.dtype,
        planes_up: int,
        planes_down: int,
        group: Group,
        device: torch.device,
        rule: TallyRule,
    ) -> None:
        nodes, lanes = group.nodes.number, group.nodes.lanes
        self.shard = shard = -(-length // (lanes * nodes))  # the last ones may hold padding
        self._lanes = list(zip(*group.ranks_by_node, strict=False))
        self._ranks, self._place, self._nodes = group.neighbours, group.local_rank, nodes
        self._message = Buffer((planes_up, length), dtype, device, staged=True)
        self._decision = Buffer((planes_down, length), dtype, device, staged=True)
        self.message, self.decision = self._message.tensor, self._decision.tensor
        self.received: Sequence[torch.Tensor] = ()
        self._up_shape, self._down_shape = (len(self._ranks), planes_up, length), (lanes, planes_down, shard * nodes)
        self._spans = [
            slice(min(lane * shard * nodes, length), min((lane + 1) * shard * nodes, length)) for lane in range(lanes)
        ]
        self._item = self._message.item
        self._up_items, self._down_items = math.prod(self._up_shape), math.prod(self._down_shape)
        self.node_bytes = (self._up_items + self._down_items) * self._item.itemsize
        self.bytes_sent = 0
        self._has_slice = self._place < lanes  # else this rank only waits for what the others decide
        if not self._has_slice:
            return
        self._span = self._spans[self._place]
        if nodes == 1:  # all ballots are here
            return
        counts, planes = rule.tally_shape(planes_up, group.nodes.fullest)
        outgoing = torch.zeros((counts * planes, shard * nodes), dtype=dtype, device=HOST)
        incoming = torch.zeros((nodes, counts * planes, shard), dtype=dtype, device=HOST)
        self._verdict = torch.zeros((planes_down, shard), dtype=dtype, device=HOST)
        self._tally = outgoing.view(counts, planes, -1)[:, :, : self._span.stop - self._span.start]
        self._at = min(self._span.start + group.cross_rank * shard, self._span.stop)  # where this rank's shard begins
        mine = min(shard, self._span.stop - self._at)
        self._tallies = [tally.view(counts, planes, -1)[:, :, :mine] for tally in incoming]
        whole = rule.tally_shape(planes_up, group.size)[1]
        self._total = torch.zeros((counts, whole, mine), dtype=dtype, device=HOST)
        self._decided = self._verdict[:, :mine]
        self._up = shard_operations(flat(outgoing), flat(incoming), self._item, counts * planes, shard, nodes)
        free_with(self, [its for _, _, types in self._up for its in types])
        self.bytes_sent = (nodes - 1) * shard * dtype.itemsize * (counts * planes + planes_down)

    def attach(self, memory: npt.NDArray[np.uint8]) -> None:
        """Take ``node_bytes`` of memory that all ranks of the node share, each at the same place in it."""
        items = memory.view(self._item)
        self._ballots = items[: self._up_items].reshape(self._up_shape)
        self._verdicts = items[self._up_items :].reshape(self._down_shape)
        if not self._has_slice:
            return
        self._slices = [torch.from_numpy(ballot[:, self._span]) for ballot in self._ballots]
        mine = self._verdicts[self._place]
        self._decided_here = torch.from_numpy(mine[:, : self._span.stop - self._span.start])
        if self._nodes > 1:
            planes, shard = self._verdict.shape
            self._down = shard_operations(mine.reshape(-1), flat(self._verdict), self._item, planes, shard, self._nodes)
            free_with(self, [its for _, _, types in self._down for its in types])

    def detach(self) -> None:
        """Let go of the node's memory. No message can cross any more."""
        for name in ("_ballots", "_verdicts", "_slices", "_decided_here", "_down"):
            vars(self).pop(name, None)

    def owners(self, shard: int) -> tuple[int, ...]:
        """Who decides, and who count for it on the other nodes."""
        lane = self._lanes[shard // self._nodes]
        decides = lane[shard % self._nodes]
        return (decides, *(rank for rank in lane if rank != decides))

    def held(self) -> list[Held]:
        if not self._has_slice:
            return []
        return [
            (rank, self._span.start, ballot)
            for rank, ballot in zip(self._ranks, self._ballots[:, :, self._span], strict=True)
        ]

    def push(self) -> None:
        self._message.push()

    def post(self, session: Session, channels: Channels) -> Pending:
        self._message.ready()
        self._ballots[self._place] = self._message.mpi.reshape(self._up_shape[1:])
        return session.post(channels.ballots.Ibarrier(), self)

    def go_on(self, session: Session, channels: Channels, phase: int, deciding: Deciding) -> Pending | None:
        from mpi4py import MPI

        request: Any = MPI.REQUEST_NULL  # which is over
        if phase == 0 and self._has_slice:
            if self._nodes == 1:
                deciding.decide(self._slices, self._decided_here, self._span.start)
            else:
                deciding.tally(self._ranks, self._slices, self._tally, self._span.start)
                request = together([channels.tallies.Ialltoall(of_all, of_one) for of_all, of_one, _ in self._up])
        elif phase == 1 and self._has_slice and self._nodes > 1:
            deciding.settle(self._tallies, self._total, self._decided, self._at)
            request = together([channels.verdicts.Iallgather(of_one, of_all) for of_all, of_one, _ in self._down])
        elif phase == 2:
            request = channels.decisions.Ibarrier()
        elif phase == 3:
            decision = self._decision.mpi.reshape(self._decision.tensor.shape)
            for span, verdict in zip(self._spans, self._verdicts, strict=True):
                decision[:, span] = verdict[:, : span.stop - span.start]
            self._decision.pull()
            return None
        return session.post(request, self)


def flat(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """What MPI is given of memory of the host."""
    its: npt.NDArray[np.generic] = tensor.view(-1).numpy()
    return its
