"""All-gather: every rank gets every message and decides all coordinates itself.

Bytes sent per rank: (M - 1) * message. One latency. Nobody is trusted to count.
"""

from __future__ import annotations

import torch

from mpisign.exchange.runs import Decide
from mpisign.exchange.staging import Buffer
from mpisign.world import World

__all__ = ["AllGather"]


class AllGather:
    """One bucket's buffers and its single collective. See :class:`mpisign.exchange.choose.Exchange`."""

    name = "allgather"

    def __init__(
        self,
        length: int,
        dtype: torch.dtype,
        planes_up: int,
        planes_down: int,
        world: World,
        device: torch.device,
    ) -> None:
        self._message = Buffer((planes_up, length), dtype, device)
        self._received = Buffer((world.size, planes_up, length), dtype, device)
        self.message = self._message.tensor
        self.received = self._received.tensor
        self._messages = list(self.received)
        self.decision = torch.zeros((planes_down, length), dtype=dtype, device=device)
        self.bytes_sent = (world.size - 1) * self._message.nbytes

    def push(self) -> None:
        self._message.push()

    def start(self, world: World) -> None:
        self._message.ready()
        self._request = world.comm.Iallgather(self._message.mpi, self._received.mpi)

    def settle(self, decide: Decide, world: World, what: str) -> None:
        world.wait(self._request, what)
        self._received.pull()
        decide(self._messages, self.decision, 0)

    def finish(self, world: World, what: str) -> None:
        """The decision was made here."""

    def counts_ties_for(self, rank: int) -> bool:
        """Whether ``rank``'s count of ties enters the job's: here all count the same ones, so one is enough."""
        return rank == 0
