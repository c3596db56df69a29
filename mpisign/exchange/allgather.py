"""All-gather: every rank gets every message and decides all coordinates itself.

Bytes sent per rank: (M - 1) * message. One latency. Nobody is trusted to count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mpisign.exchange.runs import Decide
from mpisign.world import World

__all__ = ["AllGather"]


class AllGather:
    """One bucket's buffers and its single collective. See :class:`mpisign.exchange.choose.Exchange`."""

    name = "allgather"

    def __init__(
        self, length: int, dtype: np.dtype[np.generic], planes_up: int, planes_down: int, world: World
    ) -> None:
        self.message: npt.NDArray[Any] = np.zeros((planes_up, length), dtype)
        self._received: npt.NDArray[Any] = np.zeros((world.size, planes_up, length), dtype)
        self._decision: npt.NDArray[Any] = np.zeros((planes_down, length), dtype)
        self.bytes_sent = (world.size - 1) * self.message.nbytes

    def start(self, world: World) -> None:
        self._request = world.comm.Iallgather(self.message, self._received)

    def settle(self, decide: Decide, world: World, what: str) -> None:
        world.wait(self._request, what)
        decide(list(self._received), self._decision, 0)

    def finish(self, world: World, what: str) -> npt.NDArray[Any]:
        return self._decision

    def counts_ties_for(self, rank: int) -> bool:
        """Whether ``rank``'s count of ties enters the job's: here all count the same ones, so one is enough."""
        return rank == 0
