"""mpisign.lateness: who is named, and when, by what ranks tell of their waiting."""

from __future__ import annotations

import logging

import pytest

from mpisign import lateness
from mpisign.lateness import NOBODY, SCALE, WINDOW, Late, Lateness

FOUR = (0, 1, 2, 3)


def told(*shares: float | None) -> list[int]:
    return [0 if share is None else 1 + round(share * SCALE) for share in shares]


def heard(*shares: float | None, step: int = WINDOW) -> Late:
    its = Lateness()
    its.hears(step, told(*shares), FOUR[: len(shares)], 0)
    return its.among(FOUR[: len(shares)])


@pytest.mark.parametrize(
    ("shares", "rank", "share"),
    [
        ((0.3, 0.25, 0.05, 0.35), 2, 0.25),
        ((0.0, 0.5), 0, 0.5),
        ((0.5, 0.25), 1, 0.25),
        ((0.1, 0.1, 0.1, 0.11), None, 0.0),  # nobody in particular
        ((0.4, 0.0, 0.0, 0.4), 1, 0.4),
        ((0.4, None, 0.1, 0.4), 2, 0.3),  # one has joined, and has told nothing
        ((None, None, 0.1, None), None, 0.0),
        ((0.0,), None, 0.0),
    ],
)
def test_who_is_waited_for(shares: tuple[float | None, ...], rank: int | None, share: float) -> None:
    found = heard(*shares)
    if share:
        assert (found.rank, found.share) == (rank, pytest.approx(share, abs=1e-5))
    else:
        assert found == NOBODY


def test_numbers_that_cannot_be() -> None:
    its = Lateness()
    its.hears(WINDOW, [2**31 - 1, 1, -5, 1 + SCALE], FOUR, 0)
    assert its.among(FOUR) == Late(1, 1.0)


def test_after_a_change_of_ranks_nobody_is_named() -> None:
    its = Lateness()
    its.hears(WINDOW, told(0.5, 0.0, 0.5), (0, 1, 2), 0)
    assert its.among((0, 1, 2)).rank == 1
    assert its.among((0, 2)) == NOBODY


def test_what_a_rank_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000
    monkeypatch.setattr(lateness, "perf_counter_ns", lambda: now)
    its = Lateness()
    for step in range(WINDOW):
        assert its.says(step) == 0
        its.waits(30)
        now += 100
    now += 100
    share = (WINDOW - 1) * 30 / (WINDOW * 100 + 100)
    assert its.says(WINDOW) == 1 + int(SCALE * share)
    assert its.says(WINDOW + 1) == 0
    its.hears(WINDOW, [its.says(WINDOW)], (0,), 0)
    assert its.says(2 * WINDOW) == 0, "hardly a step since then"
    for _ in range(WINDOW):
        its.waits(100)
        now += 100
    assert its.says(2 * WINDOW) == 1 + SCALE


LATE, QUIET = told(0.4, 0.1, 0.4), told(0.4, 0.37, 0.4)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_advice_comes_once_after_two_windows_and_on_two_ranks(rank: int, caplog: pytest.LogCaptureFixture) -> None:
    its = Lateness()
    with caplog.at_level(logging.WARNING, "mpisign.lateness"):
        for number, numbers in enumerate([LATE, QUIET, LATE, told(0.1, 0.4, 0.4), LATE], 1):
            its.hears(WINDOW * number, numbers, (0, 1, 2), rank)
        assert not caplog.records, "it was another each time, or nobody much"
        for number in (6, 7, 8):
            its.hears(WINDOW * number, LATE, (0, 1, 2), rank)
    assert len(caplog.records) == (rank != 2)
    if rank != 2:
        assert "wait for rank 1: from step 200 to 299 that has cost 30 % of the time" in caplog.text
