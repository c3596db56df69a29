"""mpisign.exchange.header on a rank alone: what a header says, bit for bit, and what it costs."""

from __future__ import annotations

import parts
import pytest

from mpisign import ConsistencyError
from mpisign.exchange.header import (
    JOINED,
    NO_GRADIENT,
    NON_FINITE,
    REASONS,
    SCALER_INF,
    VOTES,
    Handshake,
    Participation,
)

pytestmark = pytest.mark.usefixtures("world")


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 17, 100])
def test_one_bit_says_whether_there_is_a_gradient(count: int) -> None:
    for present in ([True] * count, [False] * count, [i % 3 == 0 for i in range(count)]):
        heard = parts.participation(VOTES, present)
        assert heard == Participation((VOTES,), tuple((0,) if has else () for has in present), 0)


@pytest.mark.parametrize("status", REASONS)
def test_whoever_abstains_votes_on_nothing(status: int) -> None:
    heard = parts.participation(status, [True, False, True])
    assert heard.status == (status,)
    assert heard.voters == ((), (), ())


def test_every_reason_has_words() -> None:
    assert set(REASONS) == {NON_FINITE, SCALER_INF, JOINED, NO_GRADIENT}
    assert VOTES not in REASONS
    assert len(set(REASONS.values())) == len(REASONS)


@pytest.mark.parametrize("joined_for", [None, 0, 1, 10**9])
def test_a_handshake_says_who_trains(joined_for: int | None) -> None:
    handshake = parts.shake_hands(parts.parameters((3,)), 5, joined_for)
    assert handshake == Handshake((joined_for,), 0)
    assert handshake.all_joined == (joined_for is not None)


def test_all_have_joined_only_if_each_has() -> None:
    assert Handshake((0, 3, 0), 0).all_joined
    assert not Handshake((0, None, 0), 0).all_joined
    assert not Handshake((None, None), 0).all_joined


def test_the_wish_to_stop_travels_beside_the_count_of_steps_sat_out() -> None:
    session = parts.session()
    for wish in (True, False):
        session.wants_stop = wish
        assert parts.shake_hands(parts.parameters((3,)), 0, 4).joined_for == (4,)
        assert session.stopping == wish


def test_after_an_interruption_nobody_is_answered() -> None:
    session = parts.session()
    with pytest.raises(KeyboardInterrupt), session.watchdog.unbroken("step 3"):
        raise KeyboardInterrupt
    with pytest.raises(ConsistencyError, match="rank 0 was interrupted in step 3"):
        parts.shake_hands(parts.parameters((3,)), 4)
