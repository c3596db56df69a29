"""Who waits where: what ranks tell each other in a long wait, so that only those who are missing are named.

What has arrived of a collective says little: MPI may send one rank's data through another. So a rank that has waited
for long sends a short notice to every other, and a rank that waits, wherever it is, answers. Whoever neither waits nor
answers is missing. In a step where nobody waits for long nothing is sent.

A rank that was late finds notices of waits that are long over, and whoever sent them may be anywhere by now. So a
notice says which one of the other's it answers, and only an answer tells where a rank is that has not come here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpisign.errors import ConsistencyError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Presence"]

TAG = 0x6D73
NOTICE = np.dtype([("number", "<i8"), ("answered", "<i8"), ("where", "S80")])
LIMIT = 1 << 20  # notices, of which a rank sends a few in a long wait
MANY = 8  # ranks whose places are told one by one


class _Heard(NamedTuple):
    """The latest notice of a rank: the number of its wait, that of ours which it answers (0: none), and its place."""

    number: int
    answered: int
    where: str


class Presence:
    """Where this rank waits and where others have said that they do, on one communicator.

    All ranks must make the same waits in the same order: their number is what tells one from another.

    Args:
        comm: whose messages with :data:`TAG` between two ranks are notices.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm
        self._number = 0
        self._told: dict[int, int] = {}  # ranks that know that this one waits here: the number that was answered
        self._heard: dict[int, _Heard] = {}
        self._sent: list[tuple[MPI.Request, np.ndarray]] = []
        self._counts: dict[int, list[int]] = {}  # by rank, the notices sent to it and received from it

    def begin(self) -> None:
        """This rank begins its next wait."""
        self._number += 1
        if self._told:
            self._told = {}

    def announce(self, where: str) -> None:
        """Tell every other rank that this one waits; once a wait."""
        for rank in range(self._comm.size):
            if rank != self._comm.rank and rank not in self._told:
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
            self._counts.setdefault(rank, [0, 0])[1] += 1
            heard = _Heard(int(notice["number"][0]), int(notice["answered"][0]), _printable(notice["where"][0]))
            self._heard[rank] = heard
            if self._told.get(rank, -1) < heard.number:
                self._tell(rank, where)
        self._sent = [sent for sent in self._sent if not sent[0].Test()]

    def drain(self) -> None:
        """Receive all that others have sent, before the communicator is freed. **Collective.**

        What is left would be taken for a message on the next communicator that gets its number, and the real one that
        stands in its place in the order would be lost.

        Raises:
            ConsistencyError: a rank says that it has sent so many notices as none can have.
        """
        from mpi4py import MPI

        size = self._comm.size
        sent, expected = np.zeros(size, np.int64), np.zeros(size, np.int64)
        for rank, (told, _) in self._counts.items():
            sent[rank] = told
        self._comm.Alltoall(sent, expected)
        wrong = [rank for rank, count in enumerate(expected.tolist()) if not 0 <= count < LIMIT]
        if wrong:
            raise ConsistencyError(
                f"ranks {wrong} say that they have sent {expected[wrong[0]]} notices, which cannot be (this is rank "
                f"{self._comm.rank}): run the same version on every rank"
            )
        unused = np.zeros(1, NOTICE)
        for rank, count in enumerate(expected.tolist()):
            for _ in range(count - self._counts.get(rank, [0, 0])[1]):
                self._comm.Recv(unused.view(np.uint8), rank, TAG)
        MPI.Request.Waitall([request for request, _ in self._sent])
        self._sent, self._counts = [], {}

    def missing(self) -> str:
        """Who has not come to this wait, for a message."""
        heard = {rank: self._heard.get(rank, _Heard(-1, 0, "")) for rank in range(self._comm.size)}
        absent = {rank: it for rank, it in heard.items() if rank != self._comm.rank and it.number < self._number}
        silent = [rank for rank, it in absent.items() if it.answered < self._number]
        behind = [f"rank {rank} waits in {it.where}" for rank, it in absent.items() if it.answered >= self._number]
        told = [f"not heard from yet: ranks {silent}"] if silent else []
        told += [*behind[:MANY], *([f"{len(behind) - MANY} more wait elsewhere"] if len(behind) > MANY else [])]
        return "; ".join(told) or "all ranks wait here, so the network or MPI does not deliver"

    def _tell(self, rank: int, where: str) -> None:
        answered = self._told[rank] = self._heard[rank].number if rank in self._heard else 0
        fields = self._number, answered, where.encode(errors="replace")[:80]
        notice: np.ndarray = np.array([fields], NOTICE).view(np.uint8)
        self._counts.setdefault(rank, [0, 0])[0] += 1
        self._sent.append((self._comm.Isend(notice, rank, TAG), notice))


def _printable(text: Any) -> str:
    return "".join(c if c.isprintable() else "?" for c in bytes(text).decode(errors="replace"))
