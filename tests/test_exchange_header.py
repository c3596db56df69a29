"""mpisign.exchange.header on a rank alone: what a header says, bit for bit, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import parts
import pytest
import rounds
from parts import group_of
from shapes import resnet50

import mpisign
from mpisign import ConsistencyError
from mpisign.exchange.header import (
    JOINED,
    NO_GRADIENT,
    NON_FINITE,
    REASONS,
    SCALER_INF,
    VOTES,
    Handshake,
    Header,
)
from mpisign.exchange.plan import make_plan
from mpisign.memory.store import MemoryStore
from mpisign.policy import Policy

pytestmark = pytest.mark.usefixtures("world")


def header_of(segments: int, rows: dict[int, int] | None = None, *, tells: bool = True, ranks: int = 1) -> Header:
    return Header(rounds.bucket_of(segments), rows or {}, tells, ranks)


def patterns(count: int) -> list[list[bool]]:
    return [[True] * count, [False] * count, [i % 3 == 0 for i in range(count)], [i == count - 1 for i in range(count)]]


@pytest.mark.parametrize("tells", [False, True])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17, 100])
def test_one_bit_says_whether_there_is_a_vote(count: int, tells: bool) -> None:
    its = header_of(count, tells=tells)
    for votes in patterns(count):
        heard = rounds.tell(its, VOTES, votes)
        assert heard.votes.tolist() == [votes]
        assert heard.zero_rows.tolist() == [[False] * count]
        assert (heard.status, heard.ended, heard.spoken) == ((VOTES,), (-1,), {})
        assert [heard.voters(place) for place in range(count)] == [(0,) if vote else () for vote in votes]


@pytest.mark.parametrize("count", [1, 8, 9])
def test_another_says_whether_there_is_a_row_of_zeros(count: int) -> None:
    """Of what one has voted on."""
    its = header_of(count)
    for votes in patterns(count):
        for zero in patterns(count):
            heard = rounds.tell(its, VOTES, votes, -1, np.array(zero))
            assert heard.zero_rows.tolist() == [[vote and its for vote, its in zip(votes, zero, strict=True)]]
            assert heard.votes.tolist() == [votes]


def test_rows_that_are_told_have_a_bit_each() -> None:
    its = header_of(3, {0: 5, 2: 1})
    spoken = {0: np.array([True, False, True, False, False]), 2: np.array([False])}
    zero = np.array([True, False, True])
    heard = rounds.tell(its, VOTES, [True] * 3, -1, zero, spoken)
    assert {place: rows.tolist() for place, rows in heard.spoken.items()} == {
        0: [[True, False, True, False, False]],
        2: [[False]],
    }
    assert heard.zero_rows.tolist() == [[True, False, True]]
    heard = rounds.tell(its, VOTES, [True] * 3)
    assert heard.spoken == {}, "who votes on all rows has none to tell of"


@pytest.mark.parametrize("ended", [0, 1, 6])
def test_where_a_ballot_ends_is_told(ended: int) -> None:
    """And what stands before it counts."""
    votes = [i < ended for i in range(7)]
    heard = rounds.tell(header_of(7), NON_FINITE, votes, ended)
    assert (heard.status, heard.ended, heard.votes.tolist()) == ((NON_FINITE,), (ended,), [votes])


@pytest.mark.parametrize("status", [status for status in REASONS if status != NON_FINITE])
def test_whoever_abstains_wholly_votes_on_nothing(status: int) -> None:
    heard = rounds.tell(header_of(3), status, [True, False, True], -1, np.array([True] * 3))
    assert heard.status == (status,)
    assert not heard.votes.any()
    assert not heard.zero_rows.any()


@pytest.mark.parametrize(("status", "ended"), [(len(REASONS) + 1, -1), (255, -1), (NON_FINITE, 3), (NON_FINITE, -2)])
def test_what_cannot_be_is_refused(status: int, ended: int) -> None:
    with pytest.raises(ConsistencyError, match=r"ranks \[0\] abstain for a reason that this mpisign does not know"):
        rounds.tell(header_of(3), status, [True] * 3, ended)


@pytest.mark.parametrize("ranks", [1, 2, 32])
def test_a_header_costs_five_bytes_and_its_bits(ranks: int) -> None:
    for count, rows, tells in ((1, {}, False), (8, {}, False), (9, {}, False), (9, {}, True), (9, {1: 1000}, True)):
        bits = count * (2 if tells else 1) + sum(rows.values())
        assert header_of(count, rows, tells=tells, ranks=ranks).bytes_sent == (ranks - 1) * (5 + -(-bits // 8))


@pytest.mark.parametrize("zeros", ["rows", "coin"])
@pytest.mark.parametrize("exchange", ["allgather", "two_phase", "auto"])
@pytest.mark.parametrize("ranks", [2, 3, 8, 32])
def test_headers_are_less_than_a_thousandth_of_resnet50s_messages(ranks: int, exchange: str, zeros: str) -> None:
    named = parts.named(parts.parameters(*resnet50()))
    methods: Sequence[Any] = [mpisign.signsgd()] * len(named)
    plan = make_plan(named, methods, Policy(zeros), exchange, None, MemoryStore(methods[0].memory), group_of(ranks), 1)
    headers = sum(its.bytes_sent for its in plan.headers)
    messages = sum(its.bytes_sent for its in plan.exchanges)
    assert 0 < headers + (ranks - 1) * (7 * 8 + 8) < 0.001 * messages, "with the handshake and the count of ties"


def test_every_reason_has_words() -> None:
    assert set(REASONS) == {NON_FINITE, SCALER_INF, JOINED, NO_GRADIENT}
    assert VOTES not in REASONS
    assert len(set(REASONS.values())) == len(REASONS)


@pytest.mark.parametrize("joined_for", [None, 0, 1, 10**9])
def test_a_handshake_says_who_trains(joined_for: int | None) -> None:
    handshake = rounds.shake_hands(parts.parameters((3,)), 5, joined_for)
    assert handshake == Handshake((joined_for,), 0, (0,))
    assert handshake.all_joined == (joined_for is not None)


def test_all_have_joined_only_if_each_has() -> None:
    assert Handshake((0, 3, 0), 0).all_joined
    assert not Handshake((0, None, 0), 0).all_joined
    assert not Handshake((None, None), 0).all_joined


def test_the_wish_to_stop_travels_beside_the_count_of_steps_sat_out() -> None:
    session = rounds.session()
    for wish in (False, True):
        session.wants_stop = wish
        assert rounds.shake_hands(parts.parameters((3,)), 0, 4).joined_for == (4,)
        assert session.stopping == wish


def test_after_an_interruption_nobody_is_answered() -> None:
    session = rounds.session()
    with pytest.raises(KeyboardInterrupt), session.watchdog.unbroken("step 3"):
        raise KeyboardInterrupt
    with pytest.raises(ConsistencyError, match="rank 0 was interrupted in step 3"):
        rounds.shake_hands(parts.parameters((3,)), 4)
