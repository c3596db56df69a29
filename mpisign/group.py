"""The ranks that train together, as they are until the next of them comes or goes. A group never changes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from mpisign.cost import Nodes
from mpisign.errors import ConsistencyError, OptionError
from mpisign.presence import Presence

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpisign.watchdog import Watchdog

__all__ = ["Channels", "Group", "check_node_map"]


class Channels(NamedTuple):
    """Communicators for the phases of messages, one each: each phase begins strictly in the order of the messages.

    So a rank may be in one phase of a message while another is in another.

    Attributes:
        headers: between all, as are ``first`` and ``second``, for the phases of flat exchanges.
        ballots, decisions: between the ranks of a node: the former and the latter are in its shared memory.
        tallies, verdicts: between the ranks of a lane: counts go up, and what they decide comes down.
    """

    headers: MPI.Comm
    first: MPI.Comm
    second: MPI.Comm
    ballots: MPI.Comm
    tallies: MPI.Comm
    verdicts: MPI.Comm
    decisions: MPI.Comm

    @classmethod
    def open(cls, comm: MPI.Comm, node: MPI.Comm, lane: MPI.Comm, watchdog: Watchdog) -> Channels:
        """New ones. **Collective** over ``comm``."""
        with watchdog.guard("MPI's duplicates of communicators"):
            return cls(*(one.Dup() for one in (comm, comm, comm, node, lane, lane, node)))


@dataclass(frozen=True)
class Group:
    """Some ranks, their numbers and places, and the communicators between them.

    Attributes:
        comm: between all, private to the library.
        node: between those on this rank's node.
        lane: between those with the same local rank, one a node, in the order of the nodes.
        channels: for messages, of all optimizers that send nothing before their step.
        rank, size: this rank's number, and how many there are.
        node_of: (size,) the number of each rank's node; nodes are numbered by their lowest rank.
        generation: how many groups this job has had before.
        identities: (size,) what each rank is called for good: its number in the job's first group. Coins and noise
            are keyed by it, so that they stay when others leave.
        gpus: every rank has one that torch can use.
        presence: who waits where, on ``comm``.
        lines: channels of optimizers that send before their step, by their numbers: their messages may leave in
            another order on each rank than those of other optimizers.
        users: by the same numbers, what is there as long as this rank may use such channels.
    """

    comm: MPI.Comm
    node: MPI.Comm
    lane: MPI.Comm
    channels: Channels
    rank: int
    size: int
    node_of: tuple[int, ...]
    generation: int
    identities: tuple[int, ...]
    gpus: bool = False
    presence: Presence = field(init=False, repr=False, compare=False)
    lines: dict[int, Channels] = field(default_factory=dict, init=False, repr=False, compare=False)
    users: WeakValueDictionary[int, Any] = field(
        default_factory=WeakValueDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "presence", Presence(self.comm))

    @classmethod
    def form(
        cls,
        comm: MPI.Comm,
        watchdog: Watchdog,
        node_of: Sequence[int] | None,
        generation: int,
        identity: int,
        gpu: bool,
    ) -> Group:
        """Learn who is where. **Collective** over ``comm``, which the group then owns.

        Args:
            node_of: (size,) which rank is on which node, by any numbers; None for where they share memory.
            identity: this rank's; below 0 if it cannot be in a group.
            gpu: whether this rank has one.

        Raises:
            ConsistencyError: on every rank, if they have been told different maps, or some of them none, or if one
                cannot be in a group.
        """
        with watchdog.guard("MPI's all-gather of maps"):
            mine = np.array([identity, gpu, *([-1] * comm.size if node_of is None else node_of)], np.int64)
            heard = np.empty((comm.size, mine.size), np.int64)
            comm.Allgather(mine, heard)
        rank = comm.rank
        unfit = np.flatnonzero(heard[:, 0] < 0).tolist()
        if unfit:
            with watchdog.guard("MPI_Comm_free"):
                comm.Free()
            raise ConsistencyError(
                f"ranks {unfit} were given options that cannot be, and say which (this is rank {rank})"
            )
        if not (heard[:, 2:] == heard[0, 2:]).all():
            with watchdog.guard("MPI_Comm_free"):
                comm.Free()
            raise ConsistencyError(
                f"ranks were given different maps of ranks to nodes (this is rank {rank}): pass the same node_of= on "
                f"every rank"
            )
        labels = _labels(comm, watchdog) if node_of is None else list(node_of)
        order = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        places = tuple(order[label] for label in labels)
        local = places[:rank].count(places[rank])
        with watchdog.guard("MPI's split into nodes and lanes"):
            node, lane = comm.Split(places[rank], rank), comm.Split(local, places[rank])
        channels = Channels.open(comm, node, lane, watchdog)
        _confirm(comm, watchdog)
        return cls(
            comm=comm,
            node=node,
            lane=lane,
            channels=channels,
            rank=rank,
            size=comm.size,
            node_of=places,
            generation=generation,
            identities=tuple(heard[:, 0].tolist()),
            gpus=bool(heard[:, 1].all()),
        )

    @classmethod
    def alone(cls, comm: Any, *, gpus: bool = False) -> Group:
        """A group of this process, over anything that has the calls of a communicator."""
        return cls(comm, comm, comm, Channels(*(comm,) * 7), 0, 1, (0,), 0, (0,), gpus)

    @property
    def identity(self) -> int:
        """What this rank is called for good."""
        return self.identities[self.rank]

    @property
    def node_rank(self) -> int:
        """The number of this rank's node."""
        return self.node_of[self.rank]

    @property
    def num_nodes(self) -> int:
        """On how many nodes the ranks are."""
        return self.nodes.number

    @property
    def local_rank(self) -> int:
        """This rank's number among those on its node."""
        return self.node_of[: self.rank].count(self.node_rank)

    @property
    def local_size(self) -> int:
        """How many ranks are on this rank's node."""
        return self.node_of.count(self.node_rank)

    @property
    def cross_rank(self) -> int:
        """This rank's number among those with its local rank, one a node."""
        return self._lane.index(self.rank)

    @property
    def cross_size(self) -> int:
        """On how many nodes there is a rank with this one's local rank."""
        return len(self._lane)

    @property
    def _lane(self) -> list[int]:
        """The ranks with this one's local rank, in the order of their nodes."""
        mine = self.local_rank
        return [ranks[mine] for ranks in self.ranks_by_node if len(ranks) > mine]

    @functools.cached_property
    def ranks_by_node(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each node."""
        ranks: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for rank, node in enumerate(self.node_of):
            ranks[node].append(rank)
        return tuple(map(tuple, ranks))

    @functools.cached_property
    def nodes(self) -> Nodes:
        """How many ranks each node has."""
        return Nodes.of(self.node_of)

    @property
    def neighbours(self) -> tuple[int, ...]:
        """The ranks of this rank's node, itself included."""
        return self.ranks_by_node[self.node_rank]

    def line(self, number: int, watchdog: Watchdog) -> Channels:
        """An optimizer's own channels. **Collective**, at least the first time."""
        if number not in self.lines:
            opened = Channels.open(self.comm, self.node, self.lane, watchdog)
            _confirm(self.comm, watchdog)
            self.lines[number] = opened
        return self.lines[number]

    def comms(self) -> list[MPI.Comm]:
        """All communicators, that between all ranks last."""
        channels = (comm for its in (*self.lines.values(), self.channels) for comm in its)
        return [*channels, self.lane, self.node, self.comm]

    def free(self, watchdog: Watchdog) -> None:
        """Give the communicators back. **Collective.**"""
        with watchdog.guard("MPI_Comm_free"):
            self.presence.drain()
            for comm in self.comms():
                comm.Free()


def _confirm(comm: MPI.Comm, watchdog: Watchdog) -> None:
    """Where ranks may be lost: wait until all have made their communicators.

    Open MPI crashes where one is revoked that this rank is just about to make; it may be by others from here on.
    """
    if watchdog.survives:
        with watchdog.guard("MPI's duplicates of communicators"):
            comm.Barrier()


def _labels(comm: MPI.Comm, watchdog: Watchdog) -> list[int]:
    """By rank, the lowest rank with which it shares memory. **Collective.**"""
    from mpi4py import MPI

    with watchdog.guard("MPI's split into nodes"):
        shared = comm.Split_type(MPI.COMM_TYPE_SHARED)
        lowest, labels = np.array([comm.rank], np.int64), np.empty(comm.size, np.int64)
        shared.Bcast(lowest, root=0)
        shared.Free()
        comm.Allgather(lowest, labels)
    return [int(label) for label in labels]


def check_node_map(node_of: Sequence[int] | None, size: int) -> tuple[int, ...] | None:
    """A map of ranks to nodes as plain numbers. Raises :class:`OptionError` unless it has ``size`` of them."""
    if node_of is None:
        return None
    try:
        places = tuple(index(place) for place in node_of)
    except TypeError:
        places = ()
    if len(places) != size or any(not 0 <= place < 2**31 for place in places):
        raise OptionError(
            f"node_of={node_of!r} must have one number of a node (0 or more) for each of the {size} ranks, e.g. "
            f"[0, 0, 0, 1]"
        )
    return places
