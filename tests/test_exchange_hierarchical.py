"""The hierarchical exchange without other ranks: its arithmetic on up to 16 nodes of 64, who takes it, its price."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import oracle
import parts
import pytest
import torch
from mpirun import mpirun
from parts import Side, Voters, heard_of

import mpisign
from mpisign import OptionError
from mpisign.exchange.choose import CHOICES, check_exchange, choose, named
from mpisign.exchange.header import Bools, Heard
from mpisign.group import Group
from mpisign.network import Network
from mpisign.policy import Policy
from mpisign.rules import TallyRule

SHAPES = ((100,), (33,), (0,), (6, 70), (1,), (64,))
ROWS = 3  # the parameter that has rows
ALIKE = {"1x1": [1], "1x4": [4], "2x1": [1] * 2, "2x2": [2] * 2, "2x4": [4] * 2, "3x3": [3] * 3, "8x7": [7] * 8}
UNEVEN = {
    "3+1": [3, 1],
    "1+3": [1, 3],
    "4+2+1": [4, 2, 1],
    "8+7+8": [8, 7, 8],
    "15+16": [15, 16],
    "64+1+17": [64, 1, 17],
}
LARGE = {"16x64": [64] * 16, "16x1": [1] * 16}
NODES = {**ALIKE, **UNEVEN, **LARGE}
METHODS = {
    "signs": (mpisign.signsgd(), "coin"),
    "two planes": (mpisign.signsgd(), "abstain"),
    "trits": (mpisign.ternary_vote(4.0, 5.0), "coin"),
    "mean of signs": (mpisign.lion(vote=False), "coin"),
    "mean of signs, two planes": (mpisign.lion(vote=False), "abstain"),
}

Words = npt.NDArray[np.uint32]


def a_side(method: mpisign.Method, policy: Policy, size: int) -> Side:
    return parts.side(parts.parameters(*SHAPES), method, policy=policy, size=size)


def flags(words: Words, n: int) -> npt.NDArray[np.bool_]:
    """Element by element (..., n), of words (..., k)."""
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little", count=n)
    return bits.astype(np.bool_)


def as_bits(bits: npt.NDArray[np.bool_]) -> Words:
    """The reverse, with zeros behind the end."""
    width = -(-bits.shape[-1] // 32) * 32
    padded = np.zeros((*bits.shape[:-1], width), np.bool_)
    padded[..., : bits.shape[-1]] = bits
    return np.packbits(padded, axis=-1, bitorder="little").view(np.uint32)


def drawn(side: Side, size: int, random: np.random.Generator) -> list[torch.Tensor]:
    """A message of each rank: bits of which those behind a parameter's end are 0, as is a sign that is not voted."""
    (exchange,) = side.exchanges
    messages = np.zeros((size, *exchange.message.shape), np.uint32)
    for _, segment in side.segments():
        bits = random.integers(0, 2, (size, len(exchange.message), segment.numel)).astype(np.bool_)
        bits[:, 0] &= bits[:, -1]
        messages[:, :, segment.start : segment.stop] = as_bits(bits)
    return [torch.from_numpy(message) for message in messages.view(np.int32)]


def hierarchically(
    side: Side, heard: Heard, messages: Sequence[torch.Tensor], sizes: Sequence[int], step: int
) -> tuple[torch.Tensor, int]:
    """What all owners decide together, and the ties. Buffers hold old bits before they are written."""
    rule, (decider,), (exchange,) = side.method.rule, side.plan.deciders, side.exchanges
    assert isinstance(rule, TallyRule)
    (planes, length), lanes = messages[0].shape, min(sizes)
    ends = np.cumsum([0, *sizes]).tolist()
    ranks = [range(lo, hi) for lo, hi in itertools.pairwise(ends)]
    shard = math.ceil(length / (lanes * len(sizes)))
    counts, bits = rule.tally_shape(planes, max(sizes))
    whole = rule.tally_shape(planes, sum(sizes))[1]
    out, ties = torch.full_like(exchange.decision, 0x5A5A5A5A), 0
    for lane in range(min(lanes, 16)):  # in so small a message the others have nothing
        lo, hi = (min(at * shard * len(sizes), length) for at in (lane, lane + 1))
        tallies = [torch.full((counts, bits, hi - lo), -1, dtype=torch.int32) for _ in sizes]
        for its, tally in zip(ranks, tallies, strict=True):
            decider.tally(heard, its, [messages[rank][:, lo:hi] for rank in its], tally, lo)
        for node in range(len(sizes)):
            at, end = (min(lo + number * shard, hi) for number in (node, node + 1))
            mine = [tally[:, :, at - lo : end - lo] for tally in tallies]
            total = mine[0] if len(mine) == 1 else torch.full((counts, whole, end - at), -1, dtype=torch.int32)
            ties += int(decider.settle(heard, side.context(step), mine, total, out[:, at:end], at))
    return out, ties


def flatly(side: Side, heard: Heard, messages: Sequence[torch.Tensor], step: int) -> tuple[torch.Tensor, int]:
    (decider,), (exchange,) = side.plan.deciders, side.exchanges
    out = torch.full_like(exchange.decision, 0x5A5A5A5A)
    return out, int(decider.decide(heard, side.context(step), list(messages), out, 0, None))


def assert_oracles(
    side: Side, out: torch.Tensor, ties: int, messages: Sequence[torch.Tensor], voters: Voters, spoken: Bools | None
) -> None:
    """Every parameter's decision, by ballots of integers; ``spoken`` (M, R) of the one with rows."""
    expected_ties = 0
    words = out.numpy().view(np.uint32)
    for place, (_, segment) in enumerate(side.segments()):
        n, span = segment.numel, slice(segment.start, segment.stop)
        if not voters[place] or not n:
            continue
        planes = flags(np.stack([messages[rank].numpy().view(np.uint32)[:, span] for rank in voters[place]]), n)
        cast = np.where(planes[:, 0], 1, -1)
        if planes.shape[1] > 1:
            cast[~planes[:, 1]] = 0
        if spoken is not None and place == ROWS:
            cast[~np.repeat(spoken[list(voters[place])], n // spoken.shape[1], axis=1)] = 0
        if not side.method.rule.elects:  # type: ignore[attr-defined]
            marks = ((cast + 1) // (3 - planes.shape[1])).sum(axis=0)
            count = sum(flags(row[span], n).astype(np.int64) << bit for bit, row in enumerate(words))
            assert (count == marks).all(), place
            continue
        coin = parts.tie_coins(n, segment.first_word, step=7, seed=side.policy.seed)
        decision, tied = oracle.majority([*cast.astype(np.int8)], side.policy.ties, coin)
        expected_ties += tied
        voted = (cast != 0).any(axis=0)
        assert ((flags(words[0, span], n) == (decision > 0)) | ~voted).all(), place
        if len(words) > 1:
            assert (flags(words[1, span], n) == (decision != 0)).all(), place
    assert ties == expected_ties


def by_place(size: int, random: np.random.Generator) -> Voters:
    """Half of the ranks, or one, or nobody, or all."""
    half = tuple(np.flatnonzero(random.integers(0, 2, size)).tolist())
    return [half, (size - 1,), tuple(range(size)), tuple(range(0, size, 2)), (), tuple(range(size))]


@pytest.mark.parametrize("ties", ["coin", "zero", "positive"])
@pytest.mark.parametrize("sizes", NODES.values(), ids=NODES)
@pytest.mark.parametrize(("method", "zeros"), METHODS.values(), ids=METHODS)
def test_counting_in_nodes_is_counting_at_once(method: mpisign.Method, zeros: str, sizes: list[int], ties: str) -> None:
    if ties != "coin" and (not method.rule.elects or len(sizes) > 10):  # type: ignore[attr-defined]
        pytest.skip("the same again")
    size, random = sum(sizes), np.random.default_rng(len(sizes))
    side = a_side(method, Policy(zeros, ties, seed=3), size)
    messages = drawn(side, size, random)
    for voters in ([tuple(range(size))] * len(SHAPES), by_place(size, random)):
        heard = heard_of(side.layout.buckets[0], voters, size)
        flat, tied = flatly(side, heard, messages, 7)
        out, ties_found = hierarchically(side, heard, messages, sizes, 7)
        assert torch.equal(out, flat)
        assert ties_found == tied
        assert_oracles(side, out, ties_found, messages, voters, None)


@pytest.mark.parametrize("ties", ["coin", "zero", "positive"])
@pytest.mark.parametrize("sizes", NODES.values(), ids=NODES)
@pytest.mark.parametrize("mean", [False, True], ids=["vote", "mean of signs"])
def test_rows_that_abstain_are_counted_in_nodes_too(mean: bool, sizes: list[int], ties: str) -> None:
    """Nobody speaks on some row, and on others everybody, or some of a node."""
    if ties != "coin" and (mean or len(sizes) > 10):
        pytest.skip("the same again")
    size, random = sum(sizes), np.random.default_rng(len(sizes))
    side = a_side(mpisign.lion(vote=False) if mean else mpisign.signsgd(), Policy("rows", ties, seed=3), size)
    messages = drawn(side, size, random)
    spoken = random.integers(0, 2, (size, SHAPES[ROWS][0])).astype(np.bool_)
    spoken[:, 0], spoken[:, 1] = False, True
    segment = side.segments()[ROWS][1]
    by_element = np.repeat(spoken, segment.numel // spoken.shape[1], axis=1)
    for message, mine in zip(messages, as_bits(by_element), strict=True):  # the bits of an abstention are 0
        message[:, segment.start : segment.stop] &= torch.from_numpy(mine.view(np.int32))
    for voters in ([tuple(range(size))] * len(SHAPES), by_place(size, random)):
        heard = heard_of(side.layout.buckets[0], voters, size, {ROWS: spoken})
        flat, tied = flatly(side, heard, messages, 7)
        out, ties_found = hierarchically(side, heard, messages, sizes, 7)
        assert torch.equal(out, flat)
        assert ties_found == tied
        if not mean:
            assert_oracles(side, out, ties_found, messages, voters, spoken)


# ------------------------------------------------------------------------------------------------ when it is taken


def group_on(sizes: Sequence[int], rank: int = 0) -> Group:
    places = tuple(node for node, its in enumerate(sizes) for _ in range(its))
    return dataclasses.replace(parts.group_of(len(places), rank), node_of=places)


def taken(
    option: str,
    sizes: Sequence[int],
    plane: int = 1 << 20,
    method: mpisign.Method | None = None,
    *,
    shares: bool = True,
) -> str:
    method, group = method or mpisign.signsgd(), group_on(sizes)
    down = method.rule.down(method.codec, Policy("coin"), group.size)
    planes = 0 if down is None else down.planes(Policy("coin"))
    return named(option, method, plane, method.codec.planes(Policy("coin")), planes, group, Network(shares=shares))[0]


@pytest.mark.parametrize("sizes", NODES.values(), ids=NODES)
def test_who_asks_for_it_gets_it_wherever_votes_are_counted(sizes: list[int]) -> None:
    assert taken("hierarchical", sizes) == "hierarchical"
    assert taken("hierarchical", sizes, plane=4) == "hierarchical"
    assert taken("hierarchical", sizes, method=mpisign.lion(vote=False)) == "hierarchical"


def test_other_rules_take_another() -> None:
    for method, name in (
        (mpisign.mean(), "two_phase"),
        (mpisign.double_squeeze(), "two_phase"),
        (mpisign.median(), "two_phase"),
        (mpisign.geometric_median(), "allgather"),
        (mpisign.ef_signsgd(), "allgather"),
    ):
        assert taken("hierarchical", [4, 4], method=method) == name
        with pytest.warns(UserWarning, match=rf"{method.rule.name!r} of {method.name} does not count: it takes {name}"):
            check_exchange("hierarchical", method)
        assert taken("auto", [4, 4], method=method) == name


@pytest.mark.filterwarnings("error")
def test_rules_that_count_take_it_without_a_word() -> None:
    for method in (mpisign.signum(), mpisign.lion(vote=False), mpisign.sparsign(1.0), mpisign.sto_sign()):
        check_exchange("hierarchical", method)


@pytest.mark.usefixtures("world")
def test_an_optimizer_says_so_at_the_users_own_line() -> None:
    sgd = torch.optim.SGD(parts.parameters((3,)), lr=1.0)
    with pytest.warns(UserWarning, match="does not count: it takes two_phase") as said:
        mpisign.DistributedSignOptimizer(sgd, method=mpisign.mean(), exchange="hierarchical")
    assert [warning.filename for warning in said] == [__file__]


def test_without_shared_memory_nothing_takes_it() -> None:
    assert taken("hierarchical", [4, 4], shares=False) == "two_phase"
    assert taken("auto", [4, 4], shares=False) == "two_phase"


def test_auto_takes_it_where_ranks_share_a_card_and_much_is_saved() -> None:
    assert taken("auto", [4, 4]) == "hierarchical"
    assert taken("auto", [64] * 16) == "hierarchical"
    assert taken("auto", [8]) == "two_phase", "one node has no card"
    assert taken("auto", [1] * 8) == "two_phase", "nobody shares a card"
    assert taken("auto", [4, 1]) == "two_phase", "one lane would carry everything"
    # 2 x 4: two phases bring 4 planes out of a card, and this (3 + 1)/2; two planes must be worth 65536 bytes.
    assert [taken("auto", [4, 4], plane) for plane in (32_764, 32_768)] == ["two_phase", "hierarchical"]
    assert taken("auto", [4, 4], 64) == "allgather"


def test_an_unknown_one() -> None:
    assert "hierarchical" in CHOICES
    with pytest.raises(OptionError, match="'hierarchical'"):
        check_exchange("hierarchic", mpisign.signsgd())


# ---------------------------------------------------------------------------------------------------------- its price


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("sizes", NODES.values(), ids=NODES)
@pytest.mark.parametrize(("method", "zeros"), METHODS.values(), ids=METHODS)
def test_bytes_out_of_a_card_are_the_formula(method: mpisign.Method, zeros: str, sizes: list[int]) -> None:
    policy, ranks, nodes, lanes = Policy(zeros), sum(sizes), len(sizes), min(sizes)
    length = 3 * nodes * lanes  # words, which divide evenly
    up, down = method.codec.planes(policy), method.rule.down(method.codec, policy, ranks)
    assert down is not None
    planes_down, network = down.planes(policy), Network()
    by_node = [0] * nodes
    for rank in range(ranks) if ranks < 100 else (0, min(sizes) - 1, ranks - 1):
        group = group_on(sizes, rank)
        its = choose("hierarchical", method, length, torch.int32, up, planes_down, group, network, torch.device("cpu"))
        by_node[group.node_rank] += its.bytes_sent
        assert its.message.shape == (up, length)
        assert its.decision.shape == (planes_down, length)
        if group.local_rank >= lanes:
            assert its.bytes_sent == 0, "it has no lane"
    if method.rule.elects:  # type: ignore[attr-defined]
        counts = up * math.ceil(math.log2(max(sizes) + 1))
    else:
        counts = math.ceil(math.log2(up * max(sizes) + 1))
    card = (nodes - 1) * 4 * length * (counts + planes_down) // nodes
    assert by_node == [card] * nodes if ranks < 100 else by_node[0] <= card


@pytest.mark.long
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("ranks", [7, 8])
def test_more_ranks_than_the_other_tests_have(ranks: int) -> None:
    """Halves, 4 + 2 + 1, and nodes of 1 + 1 + 3 + 3 ranks of which the numbers are in another order."""
    tests = Path(__file__).parent / "mpi" / "test_hierarchical.py"
    command = ["-m", "pytest", "--with-mpi", "--color=no", "-k", "halves or uneven", tests]
    done = mpirun(ranks, *command, cwd=Path(__file__).parents[1], timeout=900)
    assert done.returncode == 0, done.text[-5000:]
    assert "[100%]" in done.text
