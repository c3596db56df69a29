"""The cost model against exchanges that are acted out message by message, and numbers worked out by hand."""

from __future__ import annotations

import heapq
import subprocess
import sys
from math import ceil, inf, log2

import numpy as np
import pytest

from mpisign import cost
from mpisign.cost import Links, Message, Nodes

SHAPES = [(1,), (4,), (1, 1), (2, 2), (4, 4), (3, 1), (4, 2, 1), (1, 1, 1, 1, 1), (8,) * 5, (2,) * 16]
SHAPE = pytest.mark.parametrize("sizes", SHAPES, ids=str)


# --------------------------------------------------------------------------------------- what crosses, acted out


def sends(exchange: str, sizes: tuple[int, ...], plane: float, up: int, down: int):
    """Every (source, destination, bytes) of one message: ranks are (node, local rank)."""
    ranks = [(node, local) for node, size in enumerate(sizes) for local in range(size)]
    if exchange == "allgather":
        yield from ((a, b, up * plane) for a in ranks for b in ranks if a != b)
    elif exchange == "two_phase":
        shard = plane / len(ranks)
        for bits in (up, down):
            yield from ((a, b, bits * shard) for a in ranks for b in ranks if a != b)
    else:  # the lanes alone; inside of a node nothing goes through MPI
        lanes = min(sizes)
        planes = up * ceil(log2(max(sizes) + 1))
        shard = plane / lanes / len(sizes)
        for lane in range(lanes):
            its = [(node, lane) for node in range(len(sizes))]
            for bits in (planes, down):
                yield from ((a, b, bits * shard) for a in its for b in its if a != b)


def crossing(exchange: str, sizes: tuple[int, ...], message: Message) -> tuple[float, float]:
    """Most bytes out of a node, and most bytes inside one, by adding up every single message."""
    out, inside = np.zeros(len(sizes)), np.zeros(len(sizes))
    for (a, _), (b, _), size in sends(exchange, sizes, message.plane, message.up, message.down):
        (out if a != b else inside)[a] += size
    return out.max(), inside.max()


@SHAPE
@pytest.mark.parametrize("exchange", cost.EXCHANGES)
@pytest.mark.parametrize("planes", [(1, 1), (2, 1), (2, 2)], ids=str)
def test_bytes_are_those_of_all_messages(sizes: tuple[int, ...], exchange: str, planes: tuple[int, int]):
    message = Message(1e6, *planes)
    out, inside = crossing(exchange, sizes, message)
    assert cost.card_bytes(exchange, Nodes(sizes), message) == pytest.approx(out)
    if exchange != "hierarchical":
        assert cost.node_bytes(exchange, Nodes(sizes), message) == pytest.approx(inside)


@SHAPE
@pytest.mark.parametrize("exchange", cost.EXCHANGES)
def test_messages_across_are_those_of_one_rank(sizes: tuple[int, ...], exchange: str):
    counts: dict[tuple[int, int], int] = {}
    for source, (node, _), _ in sends(exchange, sizes, 1.0, 1, 1):
        counts[source] = counts.get(source, 0) + (source[0] != node)
    assert cost.messages(exchange, Nodes(sizes))[0] == max(counts.values(), default=0)


@pytest.mark.parametrize(
    ("nodes", "ranks", "exchange", "by_d"),
    [
        # d/8 bytes a plane. 2 hosts of 4 ranks: 4 ballots need 3 planes, (3 + 1)/8/2; flat ones as measured.
        (2, 4, "hierarchical", 0.25),
        (2, 4, "two_phase", 0.5),
        (2, 4, "allgather", 2.0),
        (2, 4, "ring fp32", 7.0),
        (2, 4, "ring bf16", 3.5),
        (4, 1, "two_phase", 0.1875),
        (4, 1, "hierarchical", 0.1875),
        (16, 8, "hierarchical", 15 / 16 * 5 / 8),
        (16, 8, "two_phase", 8 * 120 / 128 / 4),
        (10_000, 1, "hierarchical", 0.249975),
        (10_000, 4, "hierarchical", 0.49995),
        (10_000, 8, "hierarchical", 0.6249375),
        (10_000, 8, "ring fp32", 7.9999),
        (1, 8, "two_phase", 0.0),
    ],
)
def test_bytes_out_of_a_card_by_hand(nodes: int, ranks: int, exchange: str, by_d: float):
    d = 32 * 10**6
    step = cost.step(exchange, Links(), Nodes.even(nodes, ranks), d)
    assert step.card_bytes / d == pytest.approx(by_d, rel=1e-6)


def test_a_count_needs_the_bits_of_the_largest_one():
    assert [cost.tally_planes(ranks) for ranks in range(1, 18)] == [ceil(log2(n + 1)) for n in range(1, 18)]
    assert [cost.tally_planes(ranks) for ranks in (1, 2, 3, 4, 7, 8, 64)] == [1, 2, 2, 3, 3, 4, 7]


# ------------------------------------------------------------------------------------------------- nodes


def test_nodes_are_those_of_a_map_of_ranks():
    assert Nodes.of([0, 0, 0, 1]).sizes == (3, 1)
    assert Nodes.of([7, 3, 7]).sizes == (2, 1)
    assert Nodes.even(2, 4) == Nodes.of([0] * 4 + [1] * 4)
    nodes = Nodes((4, 2, 1))
    assert (nodes.number, nodes.ranks, nodes.fullest, nodes.lanes, nodes.busiest) == (3, 7, 4, 1, 4)
    assert Nodes((9, 5)).busiest in (9, 5)  # 9 * 5 both ways


# ------------------------------------------------------------------------------------------------- seconds


def test_seconds_by_hand():
    links = Links(1e-6, 10e9, 50e-6, 125e6, 0.0, 2e-6)
    nodes, message = Nodes.even(2, 4), Message(1e6)
    # two phases of 50 us, 2 * 4 messages across of 2 us; 4 ranks * 4 others * 1 MB / 8 * 2 planes out of the card;
    # 4 * 3 * 1 MB / 8 * 2 inside.
    assert cost.seconds("two_phase", links, nodes, message) == pytest.approx(100e-6 + 16e-6 + 4e6 / 125e6 + 3e6 / 10e9)
    assert cost.seconds("allgather", links, nodes, message) == pytest.approx(50e-6 + 8e-6 + 16e6 / 125e6 + 12e6 / 10e9)
    # 2 barriers of 4 ranks are 2 * 2 latencies; 2 * 1 messages across; (3 + 1)/2 MB out; 8 + 5 MB inside
    assert cost.seconds("hierarchical", links, nodes, message) == pytest.approx(
        4e-6 + 100e-6 + 4e-6 + 2e6 / 125e6 + 13e6 / 10e9
    )


def test_one_rank_sends_nothing_and_waits_for_nobody():
    links = Links(1e-3, 1e6, 1e-3, 1e6, 1e-3, 1e-3)
    for exchange in cost.EXCHANGES:
        assert cost.card_bytes(exchange, Nodes((1,)), Message(1e6)) == 0
        assert cost.seconds(exchange, links, Nodes((1,)), Message(1e6)) == 0
    for way in cost.REDUCTIONS:
        assert cost.step(way, links, Nodes((1,)), 1e6).network == 0


def test_what_is_not_there_costs_nothing():
    for exchange in cost.EXCHANGES:
        assert cost.seconds(exchange, Links(), Nodes((4, 2, 1)), Message(1e6)) == 0


def test_a_name_that_is_no_exchange():
    with pytest.raises(ValueError, match="allgather, two_phase, hierarchical"):
        cost.card_bytes("ring", Nodes((1, 1)), Message(1.0))


# ----------------------------------------------------------------------------------------------- with overlap


def act_out(ready: list[float], seconds: list[float]) -> float:
    """A network that carries one message at a time, in order, by an agenda of events."""
    agenda = [(moment, "ready", place) for place, moment in enumerate(ready)]
    heapq.heapify(agenda)
    waiting: set[int] = set()
    upcoming, free, now = 0, True, 0.0
    while agenda:
        now, what, place = heapq.heappop(agenda)
        if what == "ready":
            waiting.add(place)
        else:
            free = True
        if free and upcoming in waiting:
            free = False
            heapq.heappush(agenda, (now + seconds[upcoming], "sent", upcoming))
            upcoming += 1
    return now


def test_a_pipeline_ends_when_its_events_do():
    random = np.random.default_rng(0)
    for _ in range(50):
        count = random.integers(1, 9)
        ready, seconds = np.sort(random.random(count)).tolist(), (random.random(count) / 3).tolist()
        assert cost.finish(ready, seconds) == pytest.approx(act_out(ready, seconds))
    assert cost.finish([], []) == 0


@pytest.mark.parametrize("bandwidth", [1e6, 12.5e6, 1.25e9, 1e12])
@pytest.mark.parametrize("exchange", cost.EXCHANGES)
def test_what_backward_does_not_hide(bandwidth: float, exchange: str):
    links = Links(network_latency=1e-4, network_bandwidth=bandwidth)
    nodes, d, backward, size = Nodes((1, 1, 1, 1)), 8e6, 0.25, 2.5e5
    out, _ = crossing(exchange, nodes.sizes, Message(d / 8))
    ready = [backward * part / 4 for part in (1, 2, 3, 4)]
    end = act_out(ready, [out / bandwidth / 4] * 4) + (1e-4 if exchange == "allgather" else 2e-4)
    seen = cost.step(exchange, links, nodes, d, backward, message_bytes=size)
    assert seen.exposed == pytest.approx(end - backward + seen.computing)
    assert seen.total == pytest.approx(out / bandwidth + (1e-4 if exchange == "allgather" else 2e-4) + seen.computing)
    assert seen.exposed <= seen.total + 1e-12


def test_without_backward_nothing_hides():
    links = Links(1e-6, 1e10, 1e-4, 1e8, 0, 1e-6)
    for way in (*cost.EXCHANGES, *cost.REDUCTIONS):
        seen = cost.step(way, links, Nodes.even(4, 2), 25e6)
        assert seen.exposed == pytest.approx(seen.total)
        assert seen.computing > 0


def test_an_all_reduce_adds_while_it_sends_and_then_sgd_steps():
    nodes, rates = Nodes.even(4, 1), cost.Rates(reduce=1e9, sgd=1e8)
    adding = 3 / 4 * 4e6 / 1e9
    seen = cost.step("ring fp32", Links(), nodes, 1e6, rates=rates)
    assert (seen.network, seen.computing) == pytest.approx((adding, 0.01))
    slow = Links(network_bandwidth=1e8)
    assert cost.step("ring fp32", slow, nodes, 1e6, rates=rates).network == pytest.approx(2 * 3 / 4 * 4e6 / 1e8)


def test_an_all_reduce_of_many_ranks_does_not_wait_for_each_of_them():
    """10,000 latencies of a ring in a row would make ours look better than it is."""
    links = Links(network_latency=1e-3)
    # 2 * 2 latencies of doubling; 2 * 2 of the ring; 2 * 14 of doubling
    for nodes, latencies in ((4, 4), (3, 4), (10_000, 28)):
        assert cost.step("ring fp32", links, Nodes.even(nodes, 1), 1).network == pytest.approx(latencies * 1e-3)


def test_a_ring_on_one_node_goes_through_its_memory():
    links = Links(node_bandwidth=1e9)
    assert cost.step("ring fp32", links, Nodes((4,)), 1e6).network == pytest.approx(4 * 2 * 3 / 4 * 4e6 / 1e9)
    assert cost.step("ring fp32", links, Nodes((4, 4)), 1e6).network == pytest.approx(3 * 2 * 7 / 8 * 4e6 / 1e9)


def test_a_ring_keeps_all_its_links_busy_at_a_time():
    both = Links(node_bandwidth=1e9, network_bandwidth=1e8)
    assert cost.step("ring fp32", both, Nodes((4, 4)), 1e6).network == pytest.approx(2 * 7 / 8 * 4e6 / 1e8)


# -------------------------------------------------------------------------------------------------- a choice


def test_the_choice_is_the_soonest_and_says_why():
    slow = Links(1e-6, 10e9, 50e-6, 12.5e6, 0, 1e-6)
    assert cost.choose(slow, Nodes.even(2, 4), Message(1 << 20))[0] == "hierarchical"
    name, why = cost.choose(slow, Nodes.even(2, 4), Message(1 << 20), among=("allgather", "two_phase"))
    assert name == "two_phase"
    assert why.startswith("two_phase: a message of 1024 KiB on 8 ranks on 2 nodes takes allgather ")
    # Few bytes: one latency is less than two.
    assert cost.choose(slow, Nodes.even(4, 1), Message(64))[0] == "allgather"
    # Two ranks: both exchanges send as much, and one waits once, but counts all. 1 MiB more of that takes 175 us.
    assert cost.choose(slow, Nodes.even(2, 1), Message(1 << 16))[0] == "allgather"
    assert cost.choose(slow, Nodes.even(2, 1), Message(1 << 20))[0] == "two_phase"


def test_of_equals_the_first_is_taken():
    assert cost.choose(Links(), Nodes((1,)), Message(8), among=("two_phase", "allgather"))[0] == "two_phase"


def test_messages_are_as_large_as_ten_latencies():
    def transfer(links: Links, nodes: Nodes, size: float) -> float:
        return crossing("two_phase", nodes.sizes, Message(size))[0] / links.network_bandwidth

    nodes = Nodes.even(4, 2)
    for wait, bandwidth in ((1e-3, 125e6), (2e-4, 1.25e9), (5e-6, 1e9)):
        links = Links(network_latency=wait, network_bandwidth=bandwidth)
        size = cost.cap(links, nodes, "two_phase")
        assert size == 128 << 10 or transfer(links, nodes, size / 2) < 20 * wait
        assert size == 16 << 20 or transfer(links, nodes, size) >= 20 * wait
        assert 128 << 10 <= size <= 16 << 20
        # Ternary votes: the same time for both planes together.
        assert cost.cap(links, nodes, "two_phase", Message(7.0, 2, 2)) == size
    assert cost.cap(Links(network_latency=1e-9, network_bandwidth=1e3), nodes, "two_phase") == 128 << 10
    assert cost.cap(Links(network_latency=1.0, network_bandwidth=1e12), nodes, "two_phase") == 16 << 20


def test_it_needs_neither_torch_nor_numpy_nor_mpi():
    program = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('cost', sys.argv[1]);"
        "module = importlib.util.module_from_spec(spec); sys.modules['cost'] = module; spec.loader.exec_module(module);"
        "print([m for m in ('torch', 'numpy', 'mpi4py') if m in sys.modules])"
    )
    seen = subprocess.run([sys.executable, "-c", program, cost.__file__], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"
    assert Links().network_bandwidth == inf
