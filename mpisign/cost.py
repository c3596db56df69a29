"""What an exchange costs: bytes out of a network card, messages, and seconds, by formulas.

d coordinates, M ranks on N nodes, G of them on the fullest node, whose card decides. A *plane* is one bit a coordinate,
d/8 bytes; u planes go up from each rank (one for signs, two for trits) and v come down. Times are a latency that is
paid once a phase, an overhead that a rank's processor pays for each message, and bytes by bandwidth (LogGP: Alexandrov
et al., 1995). Nothing here asks MPI.

============== ========================================== ======================= ==============================
exchange       bytes out of the card of G ranks           messages across a rank  latencies
============== ========================================== ======================= ==============================
allgather      G (M - G) u d/8                            M - G                   1 across
two_phase      G (M - G)/M (u + v) d/8                    2 (M - G)               2 across
hierarchical   (N - 1)/N (k u + v) d/8                    2 (N - 1)               2 across, 2 barriers of the node
ring           2 (M - 1)/M b d, of b bytes a coordinate   2 (M - 1)               2 (M - 1) across
============== ========================================== ======================= ==============================

k = ceil(log2(G + 1)) planes hold a count of G ballots. The hierarchical lanes have a rank on every node, so there are
as many as the smallest node has ranks. An all-reduce of many ranks takes as few latencies as halving and doubling does
(Thakur et al., 2005), 2 ceil(log2 M), where that is quicker: it sends as many bytes as the ring.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, inf

__all__ = [
    "EXCHANGES",
    "REDUCTIONS",
    "Links",
    "Message",
    "Nodes",
    "Rates",
    "Step",
    "cap",
    "card_bytes",
    "choose",
    "finish",
    "latency",
    "messages",
    "node_bytes",
    "seconds",
    "step",
    "tally_planes",
]

EXCHANGES = ("allgather", "two_phase", "hierarchical")
REDUCTIONS = {"ring fp32": 4, "ring bf16": 2}
"""The all-reduces to compare with, and their bytes a coordinate."""

SMALLEST_CAP, LARGEST_CAP = 128 << 10, 16 << 20  # bytes of a message
LATENCIES_WORTH = 10.0  # how many latencies a message's transfer is to take
REDUCTION_CAP = 25 << 20  # bytes; torch DDP's bucket


@dataclass(frozen=True)
class Links:
    """What connects ranks. The defaults cost nothing: they stand for what there is not, such as a second node.

    Attributes:
        node_latency, network_latency: seconds until a small message between two ranks of a node, or of two nodes, is
            there.
        node_bandwidth: bytes a second that all ranks of a node together can send each other.
        network_bandwidth: bytes a second out of (and, at once, into) a node's card, which its ranks share.
        node_overhead, network_overhead: seconds that a rank is busy with each message, however small.
    """

    node_latency: float = 0.0
    node_bandwidth: float = inf
    network_latency: float = 0.0
    network_bandwidth: float = inf
    node_overhead: float = 0.0
    network_overhead: float = 0.0


@dataclass(frozen=True)
class Nodes:
    """How many ranks each node has: ``sizes``, by node."""

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, node_of: Iterable[int]) -> Nodes:
        """From the node of each rank, by any numbers."""
        counts: dict[int, int] = {}
        for node in node_of:
            counts[node] = counts.get(node, 0) + 1
        return cls(tuple(counts.values()))

    @classmethod
    def even(cls, nodes: int, ranks: int) -> Nodes:
        """``nodes`` nodes of ``ranks`` ranks each."""
        return cls((ranks,) * nodes)

    @property
    def number(self) -> int:
        """N, how many nodes there are."""
        return len(self.sizes)

    @cached_property
    def ranks(self) -> int:
        """M, how many ranks there are."""
        return sum(self.sizes)

    @cached_property
    def fullest(self) -> int:
        """G, the ranks of the node that has most."""
        return max(self.sizes)

    @cached_property
    def lanes(self) -> int:
        """The ranks of the node that has fewest: so many lanes have a rank on every node."""
        return min(self.sizes)

    @cached_property
    def busiest(self) -> int:
        """The ranks of the node out of which most bytes go if every rank sends as much to every other: n (M - n)."""
        return max(self.sizes, key=lambda size: size * (self.ranks - size))


@dataclass(frozen=True)
class Message:
    """What one rank has to tell all others: ``plane`` bytes of each of ``up`` planes, and ``down`` planes come back."""

    plane: float
    up: int = 1
    down: int = 1


@dataclass(frozen=True)
class Rates:
    """How fast a rank computes what an exchange needs. The defaults are those of one core with the C library.

    Attributes:
        pack: coordinates a second, through momentum into bits.
        unpack: coordinates a second, from bits into parameters.
        count: bytes of ballots or tallies a second that are counted.
        reduce: bytes of floats a second that an all-reduce adds up.
        sgd: coordinates a second through SGD with momentum, which an all-reduce leaves to the optimizer.
        message: seconds that the library itself spends on a message, once a step.
    """

    pack: float = 2.4e9
    unpack: float = 4.7e9
    count: float = 6e9
    reduce: float = 4e9
    sgd: float = 1e9
    message: float = 2e-4


@dataclass(frozen=True)
class Step:
    """What a step costs, in seconds.

    Attributes:
        network: of the exchange, begun after backward.
        computing: of packing, counting and unpacking, with momentum and parameters, which nothing hides. An all-reduce
            adds while it sends, and then SGD steps.
        exposed: what a step adds to backward if messages leave while it runs: the network that backward does not hide,
            and the computing.
        card_bytes: bytes out of the busiest card.
    """

    network: float
    computing: float
    exposed: float
    card_bytes: float

    @property
    def total(self) -> float:
        """Seconds after backward without overlap."""
        return self.network + self.computing


def tally_planes(ranks: int) -> int:
    """k = ceil(log2(ranks + 1)): how many bits hold a count of so many ballots."""
    return ranks.bit_length()


# ------------------------------------------------------------------------------------------------ one message


def card_bytes(exchange: str, nodes: Nodes, message: Message) -> float:
    """Bytes that leave the busiest card for one message of every rank. Headers are not in it."""
    if nodes.number == 1:
        return 0.0
    sent = nodes.busiest * (nodes.ranks - nodes.busiest) * message.plane
    if exchange == "allgather":
        return sent * message.up
    if exchange == "two_phase":
        return sent * (message.up + message.down) / nodes.ranks
    _check(exchange)
    crossing = (nodes.number - 1) / nodes.number * message.plane
    return crossing * (tally_planes(nodes.fullest) * message.up + message.down)


def node_bytes(exchange: str, nodes: Nodes, message: Message) -> float:
    """Bytes that the ranks of the fullest node give each other for one message.

    Hierarchical: ballots are written into shared memory, read, and the decision is written once and read by each.
    """
    here = nodes.fullest
    if here == 1:
        return 0.0
    sent = here * (here - 1) * message.plane
    if exchange == "allgather":
        return sent * message.up
    if exchange == "two_phase":
        return sent * (message.up + message.down) / nodes.ranks
    _check(exchange)
    return (2 * here * message.up + (here + 1) * message.down) * message.plane


def messages(exchange: str, nodes: Nodes) -> tuple[int, int]:
    """How many messages MPI sends for one of ours and a rank: across nodes, and inside (busiest rank, linear)."""
    across, inside = nodes.ranks - nodes.lanes, nodes.fullest - 1
    if exchange == "allgather":
        return across, inside
    if exchange == "two_phase":
        return 2 * across, 2 * inside
    _check(exchange)
    return 2 * (nodes.number - 1), 2 * inside.bit_length()  # barriers go by doubling


def latency(exchange: str, links: Links, nodes: Nodes) -> float:
    """Seconds that one message takes however small it is: of its phases, and of MPI's messages in them."""
    across, inside = messages(exchange, nodes)
    overhead = across * links.network_overhead + inside * links.node_overhead
    if exchange == "hierarchical":
        barrier = (nodes.fullest - 1).bit_length() * links.node_latency
        return 2 * barrier + (2 * links.network_latency if nodes.number > 1 else 0.0) + overhead
    wait = links.network_latency if nodes.number > 1 else links.node_latency if nodes.ranks > 1 else 0.0
    return (1 if exchange == "allgather" else 2) * wait + overhead


def seconds(exchange: str, links: Links, nodes: Nodes, message: Message) -> float:
    """Seconds that one message takes by itself, counting not included."""
    return latency(exchange, links, nodes) + _transfer(exchange, links, nodes, message)


def _transfer(exchange: str, links: Links, nodes: Nodes, message: Message) -> float:
    return (
        card_bytes(exchange, nodes, message) / links.network_bandwidth
        + node_bytes(exchange, nodes, message) / links.node_bandwidth
    )


def _busy(exchange: str, links: Links, nodes: Nodes, message: Message) -> float:
    """Seconds by which a message delays the next one: all but the latencies, which pass while others are sent."""
    across, inside = messages(exchange, nodes)
    overhead = across * links.network_overhead + inside * links.node_overhead
    return overhead + _transfer(exchange, links, nodes, message)


def _counted(exchange: str, nodes: Nodes, message: Message) -> float:
    """Bytes of ballots and tallies that a rank counts of one message."""
    up = message.up * message.plane
    if exchange == "allgather":
        return nodes.ranks * up
    if exchange == "two_phase":
        return up
    tallies = tally_planes(nodes.fullest) * up / nodes.lanes
    return nodes.fullest / nodes.lanes * up + tallies


# --------------------------------------------------------------------------------------------------- a choice


def choose(
    links: Links, nodes: Nodes, message: Message, among: Sequence[str] = EXCHANGES, rates: Rates | None = None
) -> tuple[str, str]:
    """The exchange that brings one message across soonest, counting included, and why in words.

    Args:
        among: those that are possible; of equally quick ones the first is taken.
    """
    rates = Rates() if rates is None else rates
    times = {
        name: seconds(name, links, nodes, message) + _counted(name, nodes, message) / rates.count for name in among
    }
    best = min(among, key=lambda name: times[name])
    told = ", ".join(f"{name} {1e3 * times[name]:.3g} ms" for name in among)
    where = f"{nodes.ranks} ranks on {nodes.number} node{'s' if nodes.number > 1 else ''}"
    size = message.plane * message.up
    return best, f"{best}: a message of {size / 1024:.4g} KiB on {where} takes {told}"


def cap(links: Links, nodes: Nodes, exchange: str, message: Message | None = None) -> int:
    """To how many bytes a message may grow, so that its transfer takes about ten of its latencies.

    Smaller messages waste time on latencies; larger ones leave more to be sent when backward is over, as the last
    message cannot hide. It is a power of two from 128 KiB to 16 MiB.

    Args:
        message: of any size; only its planes count.
    """
    planes = Message(1.0) if message is None else message
    unit = Message(1.0 / planes.up, planes.up, planes.down)  # one byte up
    a_byte = _transfer(exchange, links, nodes, unit)
    worth = LATENCIES_WORTH * latency(exchange, links, nodes)
    size = SMALLEST_CAP
    while size < LARGEST_CAP and size * a_byte < worth:
        size *= 2
    return size


# ----------------------------------------------------------------------------------------------------- a step


def finish(ready: Sequence[float], seconds: Sequence[float]) -> float:
    """When the last of some messages is across that go one after the other: e_i = max(ready_i, e_(i-1)) + seconds_i."""
    end = 0.0
    for begin, duration in zip(ready, seconds, strict=True):
        end = max(begin, end) + duration
    return end


def step(
    way: str,
    links: Links,
    nodes: Nodes,
    parameters: float,
    backward: float = 0.0,
    *,
    up: int = 1,
    down: int = 1,
    message_bytes: float | None = None,
    rates: Rates | None = None,
) -> Step:
    """What a whole step costs.

    Messages of equal size become ready evenly over ``backward``, from the first to its end, and cross one after the
    other; so the last one begins when backward ends, and cannot hide.

    Args:
        way: one of :data:`EXCHANGES` or :data:`REDUCTIONS`.
        parameters: d, how many coordinates there are.
        backward: seconds in which messages can hide.
        up, down: planes of a vote.
        message_bytes: of a message; default: :func:`cap`'s, for an all-reduce 25 MiB in fp32, as torch DDP's.
    """
    rates = Rates() if rates is None else rates
    if way in REDUCTIONS:
        return _reduction(REDUCTIONS[way], links, nodes, parameters, backward, message_bytes, rates)
    whole = Message(parameters / 8, up, down)
    size = cap(links, nodes, way, whole) if message_bytes is None else message_bytes
    count = max(1, ceil(whole.plane * up / size))
    one = Message(whole.plane / count, up, down)
    computing = parameters / rates.pack + parameters / rates.unpack + count * rates.message
    computing += _counted(way, nodes, whole) / rates.count
    busy = _busy(way, links, nodes, one)
    across, inside = messages(way, nodes)
    once = latency(way, links, nodes) - across * links.network_overhead - inside * links.node_overhead
    return _whole(count, busy, once, backward, computing, card_bytes(way, nodes, whole))


def _reduction(
    item: int, links: Links, nodes: Nodes, parameters: float, backward: float, bucket: float | None, rates: Rates
) -> Step:
    """Of an all-reduce as a ring through all ranks, those of a node one after the other: one of them sends across."""
    size, ranks = item * parameters, nodes.ranks
    count = max(1, ceil(4 * parameters / (REDUCTION_CAP if bucket is None else bucket)))  # buckets are cut in fp32
    each = 2 * (ranks - 1) / ranks * size
    out = each if nodes.number > 1 else 0.0
    # Inside a node all but the rank that sends across (or, on one node, all) send to their neighbours.
    inside = each * (nodes.fullest - (nodes.number > 1)) if nodes.fullest > 1 else 0.0
    rounds = min(2 * (ranks - 1), 2 * (ranks - 1).bit_length())
    wait, overhead = (
        (links.network_latency, links.network_overhead)
        if nodes.number > 1
        else (links.node_latency, links.node_overhead)
    )
    transfer = max(out / links.network_bandwidth, inside / links.node_bandwidth)  # all links are busy at a time
    adding = each / 2 / rates.reduce  # of what has arrived, while the rest does
    busy = max(transfer, adding) / count + rounds * (wait + overhead)
    return _whole(count, busy, 0.0, backward, parameters / rates.sgd, out)


def _whole(count: int, busy: float, once: float, backward: float, computing: float, out: float) -> Step:
    ready = [backward * (place + 1) / count for place in range(count)]
    end = finish(ready, [busy] * count) + once
    return Step(count * busy + once, computing, end - backward + computing, out)


def _check(exchange: str) -> None:
    if exchange not in EXCHANGES:
        raise ValueError(f"{exchange!r} is no exchange: {', '.join(EXCHANGES)}")
