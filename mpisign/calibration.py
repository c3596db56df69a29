"""How quick this job's links are: latencies and bandwidths inside a node and across nodes, measured in 0.3 s at most.

What is measured is what a step does: small and large all-to-alls of the node's ranks, and of the lanes across nodes,
all lanes at once, since the ranks of a node share its card.
"""

from __future__ import annotations

import functools
import logging
import os
import statistics
from collections.abc import Callable
from dataclasses import astuple, dataclass
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from mpisign.cost import Links
from mpisign.group import Group
from mpisign.session import Session

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["ACT", "VARIABLE", "calibrate", "links_of", "wanted"]

logger = logging.getLogger(__name__)

ACT = "calibration"
VARIABLE = "MPISIGN_CALIBRATE"

BUDGET_SECONDS = 0.3
TRIES = 15  # of small messages
BURST = 8  # small collectives at once, which tell the overhead from the latency
REPETITIONS, LEAST = 3, 2  # of a transfer; at least, however little time is left


@dataclass(frozen=True)
class _Kind:
    """How one of the two kinds of links is tried.

    ``latency`` and ``bandwidth``: the shares of the budget after which no further trial begins. ``first`` and ``last``:
    bytes of a rank's part in the smallest and the largest transfer. ``long``: seconds after which a longer transfer
    tells no more.
    """

    latency: float
    bandwidth: float
    first: int
    last: int
    long: float


# A switch lets some hundred KiB through at once, and a slow network needs a second for the next MiB.
NETWORK, NODE = _Kind(0.1, 0.6, 64 << 10, 16 << 20, 0.04), _Kind(0.7, 1.0, 1 << 20, 4 << 20, 0.01)


def wanted() -> bool:
    """Whether this rank's environment allows it: ``MPISIGN_CALIBRATE=0`` does not. Rank 0's counts for all."""
    return os.environ.get(VARIABLE, "1").strip().lower() not in ("0", "no", "off", "false")


_known: WeakKeyDictionary[Session, dict[int, tuple[int, Links]]] = WeakKeyDictionary()
"""By session and a rank's identity: on which node it was, and the links that were measured then."""


def links_of(session: Session) -> Links | None:
    """The links of this job, measured when first asked for. **Collective.**

    A later group gets what was measured for an earlier one, if it has the same ranks on the same nodes, or fewer.

    Returns:
        The same on all ranks; None if rank 0's ``MPISIGN_CALIBRATE`` turns it off, or there is one rank.

    Raises:
        ConsistencyError: on every rank, if they do different things.
    """
    group = session.group
    if group.size == 1:
        return None
    if (links := _remembered(_known.get(session, {}), group)) is not None:
        return links
    if not session.meet(ACT, int(wanted()))[0]:
        return None
    links = calibrate(session)
    _known[session] = {identity: (node, links) for identity, node in zip(group.identities, group.node_of, strict=True)}
    return links


def _remembered(known: dict[int, tuple[int, Links]], group: Group) -> Links | None:
    """Those of an earlier group in which the ranks of this one were on nodes as they are now."""
    if not set(group.identities) <= known.keys():
        return None
    before = [known[identity][0] for identity in group.identities]
    pairs = set(zip(before, group.node_of, strict=True))
    alike = len(pairs) == len(set(before)) == group.num_nodes
    return known[group.identities[0]][1] if alike else None


def calibrate(session: Session, budget: float = BUDGET_SECONDS) -> Links:
    """Measure. **Collective.**

    It ends when ``budget`` seconds are over, but each link is tried at least twice. Where there is one
    node, or one rank a node, the links that are not there have the defaults of :class:`Links`.

    Returns:
        What rank 0 has found, the same on all ranks.

    Raises:
        ConsistencyError: on every rank, if they do different things.
    """
    session.meet(ACT)
    with session.tracer.span(ACT), session.watchdog.unbroken(ACT):
        links = _Trial(session, budget).links()
    session.meet(ACT)
    logger.debug("calibration: %s", links)
    return links


class _Trial:
    """One calibration. All ranks make the same calls; how many, they read from times that all have heard."""

    def __init__(self, session: Session, budget: float) -> None:
        self._session, self._group, self._budget = session, session.group, budget
        self._began = perf_counter()
        sizes = self._group.nodes.sizes
        self._lanes = [sum(size > local for size in sizes) for local in range(max(sizes))]  # ranks of each
        self._sizes = sizes

    def links(self) -> Links:
        """Of the node with most ranks, and of the card with most to do."""
        group = self._group
        node = network = (0.0, 0.0)
        node_bandwidth = network_bandwidth = inf
        if group.num_nodes > 1:
            self._small(group.lane)  # connections are made by the first message
            network = self._latency(group.lane, self._lanes[0], NETWORK)
            of_a_node = [sum((lane - 1) / lane for lane in self._lanes[:size]) for size in self._sizes]
            network_bandwidth = self._bandwidth(group.lane, max(of_a_node), NETWORK)
        if max(self._sizes) > 1:
            self._small(group.node)
            node = self._latency(group.node, max(self._sizes), NODE)
            node_bandwidth = self._bandwidth(group.node, max(self._sizes) - 1, NODE)
        found = np.array(
            astuple(Links(node[0], node_bandwidth, network[0], network_bandwidth, node[1], network[1])), np.float64
        )
        self._wait(group.comm.Ibcast(found, root=0), found)
        return Links(*found.tolist())

    def _wait(self, request: MPI.Request, *buffers: object) -> None:
        self._session.wait(self._session.post(request, *buffers))

    def _slowest(self, *mine: float) -> npt.NDArray[np.float64]:
        """The greatest of each number over all ranks. It lets all ranks begin what follows together."""
        said, heard = np.array(mine, np.float64), np.empty((self._group.size, len(mine)), np.float64)
        self._wait(self._group.comm.Iallgather(said, heard), said, heard)
        greatest: npt.NDArray[np.float64] = heard.max(axis=0)
        return greatest

    def _timed(self, run: Callable[[], object]) -> tuple[float, float]:
        """Seconds that the slowest rank takes for it, and seconds since the beginning."""
        began = perf_counter()
        run()
        ended = perf_counter()
        seconds, since = self._slowest(ended - began, ended - self._began).tolist()
        return seconds, since

    def _small(self, comm: MPI.Comm, times: int = 1) -> None:
        """So many all-to-alls of a number at once."""
        posted = []
        for _ in range(times):
            sent, received = np.zeros(comm.size, np.int64), np.empty(comm.size, np.int64)
            posted.append(self._session.post(comm.Ialltoall(sent, received), sent, received))
        for pending in posted:
            self._session.wait(pending)

    def _latency(self, comm: MPI.Comm, ranks: int, kind: _Kind) -> tuple[float, float]:
        """Latency, and overhead a message, of all-to-alls among so many ranks: one, and several at once."""
        self._slowest(0.0)
        ones: list[float] = []
        bursts: list[float] = []
        since = 0.0
        while not ones or (len(ones) < TRIES and since < kind.latency * self._budget):
            one, _ = self._timed(lambda: self._small(comm))
            burst, since = self._timed(lambda: self._small(comm, BURST))
            ones.append(one)
            bursts.append(burst)
        one, burst = statistics.median(ones), statistics.median(bursts)
        overhead = max(0.0, burst - one) / (BURST - 1) / (ranks - 1)
        overhead = min(overhead, one / (ranks - 1))
        return one - (ranks - 1) * overhead, overhead

    def _bandwidth(self, comm: MPI.Comm, share: float, kind: _Kind) -> float:
        """Bytes a second of the node with most to send, of which a rank's part of one byte makes ``share``.

        Parts are doubled until a transfer takes long enough, the best of a few, as others may have had a hiccup. The
        last size counts: what comes before it uses up what a switch lets through at once. Where time is over before it
        could be repeated, the one before it counts too.
        """
        size, until, before = kind.first, kind.bandwidth * self._budget, 0.0
        while True:
            block = max(1, size // comm.size)
            sent, received = np.zeros(block * comm.size, np.uint8), np.zeros(block * comm.size, np.uint8)
            self._slowest(0.0)
            times: list[float] = []
            since = 0.0
            while len(times) < LEAST or (len(times) < REPETITIONS and since + min(times) < until):
                seconds, since = self._timed(functools.partial(self._transfer, comm, sent, received))
                times.append(seconds)
            best = min(times)
            found = float(share * size / best)
            if len(times) < REPETITIONS:
                return max(found, before)
            if best >= kind.long or size >= kind.last or since + 2 * best > until:
                return found
            size, before = 2 * size, found

    def _transfer(self, comm: MPI.Comm, sent: Any, received: Any) -> None:
        self._wait(comm.Ialltoall(sent, received), sent, received)
