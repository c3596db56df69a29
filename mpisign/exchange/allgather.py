"""All-gather: every rank gets every message and decides all coordinates itself.

Bytes sent per rank: (M - 1) * message. One latency. Nobody is trusted to count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mpisign.cuts import block_type, cut, free_with, together
from mpisign.exchange.decider import Deciding
from mpisign.exchange.staging import Buffer, Held
from mpisign.group import Channels, Group
from mpisign.session import Session
from mpisign.watchdog import Pending

__all__ = ["AllGather"]


class AllGather:
    """One bucket's buffers and its single collective. See :class:`mpisign.exchange.choose.Exchange`."""

    name = "allgather"
    shard = 0

    def __init__(
        self,
        length: int,
        dtype: torch.dtype,
        planes_up: int,
        planes_down: int,
        group: Group,
        device: torch.device,
    ) -> None:
        self._message = Buffer((planes_up, length), dtype, device)
        self._received = Buffer((group.size, planes_up, length), dtype, device)
        self.message = self._message.tensor
        messages = list(self._received.tensor)
        self._here = group.rank if self._received.mirrored else None
        if self._here is not None:  # this rank's own message is on the device already, and need not come back
            messages[self._here] = self.message
        self.received: Sequence[torch.Tensor] = messages
        self.decision = torch.zeros((planes_down, length), dtype=dtype, device=device)
        whole, item = planes_up * length, self._message.item
        self._operations: list[tuple[Any, Any]] = [(self._message.mpi, self._received.mpi)]
        if len(parts := list(cut(whole, item.itemsize))) > 1:
            types = [
                (block_type(item, 1, width, width, width), block_type(item, 1, width, width, whole))
                for _, width in parts
            ]
            free_with(self, [its for both in types for its in both])
            self._operations = [
                ([self._message.mpi[at:], 1, of_mine], [self._received.mpi[at:], 1, of_each])
                for (at, _), (of_mine, of_each) in zip(parts, types, strict=True)
            ]
        self.bytes_sent = (group.size - 1) * self._message.nbytes

    def owners(self, shard: int) -> tuple[int, ...]:
        return ()

    def held(self) -> list[Held]:
        return []

    def push(self) -> None:
        self._message.push()

    def post(self, session: Session, channels: Channels) -> Pending:
        self._message.ready()
        posted = [channels.first.Iallgather(message, received) for message, received in self._operations]
        return session.post(together(posted), self)

    def go_on(self, session: Session, channels: Channels, phase: int, deciding: Deciding) -> None:
        self._received.pull(self._here)
        deciding.decide(self.received, self.decision, 0, counts=session.rank == 0)  # of ties: all find the same
