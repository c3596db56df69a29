"""Those of a job whose ranks may die that live: processes that vote, and spares that wait; groups made of some of them.

All that is done with those who wait, too, goes over one communicator between all, which shrinks when some have died.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from mpisign.group import Group
from mpisign.trace import Tracer
from mpisign.watchdog import Watchdog

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Job", "Living"]

ORDER_TAG = 0x6D75
ORDER_NUMBERS = 4
LISTEN_SECONDS = 0.001  # between two looks of one who waits
DRAIN_SECONDS = 5.0
MAKING_SECONDS = 0.05  # until others have made the communicator that is to be revoked: see mpisign.group
WHAT = "the recovery from a failure"

Numbers = npt.NDArray[np.int64]


class Job(Protocol):
    """What a session must be able to do for it; see :class:`mpisign.session.Session`."""

    group: Group
    watchdog: Watchdog
    tracer: Tracer
    ended: bool
    stopping: bool
    there: tuple[int, ...]

    def meet(self, act: str, number: int = 0) -> Any: ...
    def gather_values(self, mine: Any, schema: Any, act: str) -> list[Any]: ...
    def spread_bytes(self, mine: bytes, root: int, act: str, limit: int = ...) -> bytes: ...
    def replace(self, group: Group, there: tuple[int, ...]) -> Group | None: ...
    def network_told(self) -> int: ...
    def regrouped(self, told: Sequence[int]) -> None: ...


class Living:
    """All processes of the job, those who wait too.

    Args:
        group: the job's first, of all of them.

    Attributes:
        identities: by their numbers on the communicator between all.
        places: by identity, the number of a node.
    """

    def __init__(self, group: Group, watchdog: Watchdog) -> None:
        self._comm: MPI.Comm = group.comm
        self._dog = watchdog
        self._unfinished: list[MPI.Comm] = []  # are to become a group's
        self.places = group.node_of
        self.identities = group.identities

    def shrink(self, group: Group) -> None:
        """Go on without those who have died, after this group, or one that was to be made, has failed. **Collective.**

        Raises what MPI does if others die meanwhile.
        """
        if self._unfinished:
            time.sleep(MAKING_SECONDS)
        mine = [*self._unfinished, *group.comms()]
        self.give_up([self._comm, *(its for its in mine if its is not self._comm)])
        with self._dog.guard(WHAT):
            self._comm = self._comm.Shrink()
        self._dog.comm = self._comm
        self._unfinished = [self._comm]

    def give_up(self, comms: Sequence[MPI.Comm]) -> None:
        """Revoke them, and wait until what is under way there is over, so that MPI writes nowhere any more."""
        for comm in comms:
            comm.Revoke()
        self._dog.drain(DRAIN_SECONDS)

    def tell_all(self, said: Numbers) -> Numbers:
        """All-gather: (fields,) to (processes, fields). **Collective.**"""
        heard = np.empty((self._comm.size, said.size), np.int64)
        with self._dog.guard(WHAT):
            self._comm.Allgather(said, heard)
        return heard

    def group_of(self, members: Sequence[int], identity: int, gpu: bool, generation: int) -> Group | None:
        """A group of those with these identities. **Collective** over all; None for those who are not in it.

        Args:
            identity, gpu: of this process.
        """
        comm = self._comm
        if len(members) < len(self.identities):
            comm = self._apart(identity in members)
        if identity not in members:
            self._unfinished = []
            return None
        at = [self.places[one] for one in members]
        group = Group.form(comm, self._dog, at, generation, identity, gpu)
        self._unfinished = []
        return group

    def _apart(self, member: bool) -> MPI.Comm:
        from mpi4py import MPI

        with self._dog.guard(WHAT):
            comm = self._comm.Split(0 if member else MPI.UNDEFINED, self._comm.rank)
            if member:
                self._unfinished = [self._comm, comm]
            self._comm.Barrier()  # whoever is past it can count on the others' having made it
        return comm

    # --------------------------------------------------------------------------------------------- orders

    def order(self, identity: int, numbers: Sequence[int]) -> None:
        """Tell a process that waits what to do."""
        with self._dog.guard(WHAT):
            self._comm.Send(np.array(numbers, np.int64), self.identities.index(identity), ORDER_TAG)

    def await_order(self, leader: int) -> list[int]:
        """What the process with this identity tells, however long that takes. Raises what MPI does if ranks die."""
        numbers = np.zeros(ORDER_NUMBERS, np.int64)
        request = self._comm.Irecv(numbers, self.identities.index(leader), ORDER_TAG)
        while not request.Test():
            time.sleep(LISTEN_SECONDS)
        told: list[int] = numbers.tolist()
        return told
