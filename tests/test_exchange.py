"""mpisign.exchange without other ranks: which exchange is taken, what it costs, who votes on what."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import oracle
import pytest
import torch
from mpisign.exchange.runs import decide_runs, runs_of

from mpisign import OptionError
from mpisign.backends.host import as_words
from mpisign.codecs import Dense, SignBits
from mpisign.exchange.choose import Exchange, cap_bytes, check_exchange, choose
from mpisign.layout import Bucket, Layout
from mpisign.memory import Identity
from mpisign.methods import Method
from mpisign.policy import Policy
from mpisign.rules import MajorityVote, Mean, Rule
from mpisign.session import current

HOST = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class WholeVectors(Mean):
    shardable = False


def method_of(rule: Rule | None = None) -> Method:
    return Method(Identity(), Dense(), rule) if rule else Method(Identity(), SignBits(), MajorityVote())


def chosen(option: str, ranks: int, length: int, up: int = 1, down: int = 1, rule: Rule | None = None) -> Exchange:
    """What a job of so many ranks would take; making it needs no other rank."""
    world = dataclasses.replace(current().group, size=ranks)
    return choose(option, method_of(rule), length, torch.int32, up, down, world, HOST)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 7, 1000, 8192])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (1, 2), (2, 2)])
def test_bytes_sent_are_the_formula(ranks: int, length: int, up: int, down: int) -> None:
    gathered = chosen("allgather", ranks, length, up, down)
    assert gathered.bytes_sent == (ranks - 1) * 4 * length * up
    two_phase = chosen("two_phase", ranks, length, up, down)
    shard = math.ceil(length / ranks)
    assert two_phase.bytes_sent == (ranks - 1) * 4 * shard * (up + down)
    for exchange in (gathered, two_phase):
        assert exchange.message.shape == (up, length)


@pytest.mark.usefixtures("world")
def test_auto_takes_two_phase_where_it_saves() -> None:
    large, small = 1 << 18, 64
    assert [chosen("auto", ranks, large).name for ranks in (1, 2, 3, 8)] == ["allgather"] * 2 + ["two_phase"] * 2
    assert [chosen("auto", ranks, small).name for ranks in (1, 2, 3, 8)] == ["allgather"] * 4
    assert chosen("auto", 3, large, up=1, down=2).name == "allgather", "3 planes back and forth against 2"
    # 4 ranks: 3 messages against 2 * 3/4, so 6 bytes saved a word; the second latency is worth 65536.
    assert [chosen("auto", 4, words).name for words in (10_922, 10_923)] == ["allgather", "two_phase"]


@pytest.mark.usefixtures("world")
def test_messages_grow_to_a_mebibyte_or_to_16_among_gpus() -> None:
    for gpus, default in ((False, 1 << 20), (True, 16 << 20)):
        world = dataclasses.replace(current().group, gpus=gpus)
        assert (cap_bytes(None, world), cap_bytes(2.5, world)) == (default, 2.5 * 2**20)


@pytest.mark.usefixtures("world")
def test_a_rule_that_needs_whole_vectors_gets_all_gather() -> None:
    assert chosen("auto", 8, 1 << 18, rule=WholeVectors()).name == "allgather"
    check_exchange("allgather", method_of(WholeVectors()))
    with pytest.raises(OptionError, match="needs whole vectors"):
        check_exchange("two_phase", method_of(WholeVectors()))


@pytest.mark.parametrize("option", ["ring", "", None])
def test_unknown_exchanges(option: str) -> None:
    with pytest.raises(OptionError, match="'auto', 'allgather', 'two_phase'"):
        check_exchange(option, method_of())


# ------------------------------------------------------------------------------------- who votes on what

SIZES = [40, 32, 0, 100, 5]


def one_bucket() -> Bucket:
    layout = Layout([(f"p{i}", torch.zeros(size)) for i, size in enumerate(SIZES)], SignBits(), 1 << 20)
    return layout.buckets[0]


def test_the_usual_bucket_is_one_run() -> None:
    everybody = (0, 1, 2)
    assert runs_of(one_bucket(), [everybody] * len(SIZES)) == [(0, 8, everybody)]


def test_runs_end_where_the_voters_change() -> None:
    voters = [(0, 1), (0, 1), (2,), (), (0, 2)]  # the bucket holds them from the last to the first
    assert [run for run in runs_of(one_bucket(), voters) if run[0] < run[1]] == [
        (0, 1, (0, 2)),
        (1, 5, ()),
        (5, 8, (0, 1)),
    ]


@pytest.mark.parametrize("cuts", [[0, 8], [0, 1, 8], [0, 3, 6, 8], [0, 2, 4, 5, 7, 8]])
def test_shards_decide_what_the_voters_of_each_parameter_decide(cuts: list[int]) -> None:
    bucket, ranks = one_bucket(), 3
    voters = [(0, 1), (0, 1, 2), (2,), (), (0, 2)]
    rng = np.random.default_rng(0)
    values = [[rng.standard_normal(size) for size in SIZES] for _ in range(ranks)]
    starts = oracle.first_words(SIZES)
    messages = torch.zeros((ranks, 1, bucket.length), dtype=torch.int32)
    for rank, (i, start) in itertools.product(range(ranks), enumerate(starts)):
        words = oracle.to_words(values[rank][i] > 0)
        as_words(messages)[rank, 0, start : start + len(words)] = words

    out, ties = torch.zeros((1, bucket.length), dtype=torch.int32), 0
    context = Policy(seed=1).context(7, 0)
    for lo, hi in itertools.pairwise(cuts):
        runs = runs_of(bucket, voters)
        shards = [message[:, lo:hi] for message in messages]
        ties += decide_runs(MajorityVote(), context, bucket, runs, shards, out[:, lo:hi], lo)

    expected_ties = 0
    for i, (size, start) in enumerate(zip(SIZES, starts, strict=True)):
        if voters[i] and size:
            coin = oracle.coins(oracle.coin_key(1, 7, oracle.TIES), start, size)
            decision, tied = oracle.majority([oracle.ballot(values[r][i], "positive") for r in voters[i]], "coin", coin)
            assert (oracle.to_flags(as_words(out[0, start:]), size) == (decision > 0)).all()
            expected_ties += tied
    assert ties == expected_ties > 0
