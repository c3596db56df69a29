"""mpisign.exchange without other ranks: which exchange is taken, and what it costs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mpisign import OptionError
from mpisign.codecs import Dense, SignBits
from mpisign.exchange.choose import Exchange, cap_bytes, check_exchange, choose
from mpisign.memory import Identity
from mpisign.methods import Method
from mpisign.network import Network
from mpisign.policy import Policy
from mpisign.rules import GeometricMedian, MajorityVote, Rule
from mpisign.session import current

HOST = torch.device("cpu")


def method_of(rule: Rule | None = None) -> Method:
    return Method(Identity(), Dense(), rule) if rule else Method(Identity(), SignBits(), MajorityVote())


def chosen(option: str, ranks: int, length: int, up: int = 1, down: int = 1, rule: Rule | None = None) -> Exchange:
    """What a job of so many ranks would take; making it needs no other rank."""
    world = dataclasses.replace(current().group, size=ranks)
    return choose(option, method_of(rule), length, torch.int32, up, down, world, Network(), HOST)


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
        assert [cap_bytes(cap, [method_of()], Policy(), world, Network()) for cap in (None, 2.5)] == [
            default,
            2.5 * 2**20,
        ]


@pytest.mark.usefixtures("world")
def test_a_rule_that_needs_whole_vectors_gets_all_gather() -> None:
    assert chosen("auto", 8, 1 << 18, rule=GeometricMedian()).name == "allgather"
    check_exchange("allgather", method_of(GeometricMedian()))
    with pytest.raises(OptionError, match="needs whole vectors"):
        check_exchange("two_phase", method_of(GeometricMedian()))


@pytest.mark.parametrize("option", ["ring", "", None])
def test_unknown_exchanges(option: str) -> None:
    with pytest.raises(OptionError, match="'auto', 'allgather', 'two_phase'"):
        check_exchange(option, method_of())
