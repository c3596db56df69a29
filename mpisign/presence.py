"""Who waits where: what ranks tell each other in a long wait, so that only those who are missing are named.

What has arrived of a collective says little: MPI may send one rank's data through another. So a rank that has waited
for long sends a short notice to every other, and a rank that waits, wherever it is, answers. Whoever neither waits nor
answers is missing. In a step where nobody waits for long nothing is sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpisign.errors import ConsistencyError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Presence"]

TAG = 0x6D73
NOTICE = np.dtype([("number", "<i8"), ("where", "S80")])
MANY = 8  # ranks whose places are told one by one


class Presence:
    """Where this rank waits and where others have said that they do, on one communicator.

    All ranks must make the same waits in the same order: their number is what tells one from another.

    Args:
        comm: whose messages with :data:`TAG` between two ranks are notices.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm
        self._number = 0
        self._told: set[int] = set()  # ranks that know that this one waits here
        self._heard: dict[int, tuple[int, str]] = {}
        self._sent: list[tuple[MPI.Request, np.ndarray]] = []

    def begin(self) -> None:
        """This rank begins its next wait."""
        self._number += 1
        if self._told:
            self._told = set()
        if self._heard:  # who was seen in an earlier wait may be anywhere by now
            self._heard = {rank: seen for rank, seen in self._heard.items() if seen[0] >= self._number}

    def announce(self, where: str) -> None:
        """Tell every other rank that this one waits; once a wait."""
        for rank in range(self._comm.size):
            self._tell(rank, where)

    def listen(self, where: str) -> None:
        """Take in what others have told, and answer them that this rank waits.

        Raises:
            ConsistencyError: what a rank has sent is no notice.
        """
        from mpi4py import MPI

        status = MPI.Status()
        while self._comm.Iprobe(MPI.ANY_SOURCE, TAG, status):
            rank, notice = status.Get_source(), np.zeros(1, NOTICE)
            if status.Get_count(MPI.BYTE) != NOTICE.itemsize:
                raise ConsistencyError(
                    f"rank {rank} has sent {status.Get_count(MPI.BYTE)} bytes that are no notice of mpisign's (this is "
                    f"rank {self._comm.rank}): run the same version on every rank"
                )
            self._comm.Recv(notice.view(np.uint8), rank, TAG)
            self._heard[rank] = int(notice["number"][0]), _printable(notice["where"][0])
            self._tell(rank, where)
        self._sent = [sent for sent in self._sent if not sent[0].Test()]

    def missing(self) -> str:
        """Who has not come to this wait, for a message."""
        others = [rank for rank in range(self._comm.size) if rank != self._comm.rank]
        silent = [rank for rank in others if rank not in self._heard]
        earlier = [(rank, *self._heard[rank]) for rank in others if rank in self._heard]
        behind = [f"rank {rank} waits in {place}" for rank, number, place in earlier if number < self._number]
        told = [f"not heard from yet: ranks {silent}"] if silent else []
        told += [*behind[:MANY], *([f"{len(behind) - MANY} more wait elsewhere"] if len(behind) > MANY else [])]
        return "; ".join(told) or "all ranks wait here, so the network or MPI does not deliver"

    def _tell(self, rank: int, where: str) -> None:
        if rank == self._comm.rank or rank in self._told:
            return
        self._told.add(rank)
        notice: np.ndarray = np.array([(self._number, where.encode(errors="replace")[:80])], NOTICE).view(np.uint8)
        self._sent.append((self._comm.Isend(notice, rank, TAG), notice))


def _printable(text: Any) -> str:
    return "".join(c if c.isprintable() else "?" for c in bytes(text).decode(errors="replace"))
