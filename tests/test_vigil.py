"""mpisign.vigil: when a run of steps without votes is said, and when it is over."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pytest
import torch

from mpisign import DeadTrainingError, StepReport
from mpisign.vigil import FIRST, Vigil

FINE: dict[int, str] = {}
ALL_BAD = dict.fromkeys(range(3), "non-finite gradient")
NAMED = [("fine", torch.zeros(2)), ("worse", torch.tensor([1.0, torch.nan]))]


def report_of(
    step: int,
    abstentions: Mapping[int, str],
    ended: Mapping[int, str] = FINE,
    members: tuple[int, ...] = (0, 1, 2),
) -> StepReport:
    voters = tuple(rank for rank in range(len(members)) if rank not in abstentions)
    return StepReport(step, "signum", (), 0, 0, voters, abstentions, ended, not voters, 0, {}, members=members)


def said(
    caplog: pytest.LogCaptureFixture,
    steps: int,
    abstentions: Mapping[int, str],
    rank: int = 0,
    ended: Mapping[int, str] = FINE,
) -> dict[int, str]:
    """By the number of the step, what is logged."""
    vigil, texts = Vigil(), {}
    for step in range(steps):
        caplog.clear()
        vigil.heard(report_of(step, abstentions, ended), rank, "warn", NAMED)
        texts.update((step + 1, record.getMessage()) for record in caplog.records)
        assert all(record.levelno == logging.WARNING for record in caplog.records)
    return texts


def test_it_is_said_at_first_and_when_it_has_doubled(caplog: pytest.LogCaptureFixture) -> None:
    texts = said(caplog, 8 * FIRST, ALL_BAD)
    assert list(texts) == [FIRST, 2 * FIRST, 4 * FIRST, 8 * FIRST]
    assert "training has died: nobody has voted in 32 steps in a row, up to step 31 (rank 0: non-finite" in texts[FIRST]
    assert "'worse' itself has a NaN" in texts[FIRST]
    assert said(caplog, FIRST, ALL_BAD, rank=1) == {}, "rank 0 speaks for all"


@pytest.mark.parametrize("why", ["non-finite gradient", "inf found by GradScaler"])
@pytest.mark.parametrize("partly", [False, True])
def test_a_rank_that_never_votes_is_named_there_and_on_rank_0(
    caplog: pytest.LogCaptureFixture, why: str, partly: bool
) -> None:
    abstentions, ended = (FINE, {1: "weight"}) if partly else ({1: why}, FINE)
    for rank in range(3):
        texts = said(caplog, 2 * FIRST, abstentions, rank, ended)
        assert list(texts) == ([] if rank == 2 else [FIRST, 2 * FIRST])
        assert all("ranks [1] have not cast a whole vote" in text for text in texts.values())


@pytest.mark.parametrize(("bad", "texts"), [(2, ["ranks [1] have not cast a whole vote in 32 steps"]), (1, [])])
def test_a_rank_that_gets_another_number_is_the_same(
    bad: int, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 0 dies in the middle; rank 1, from then on the one with the bad gradient, may be the one that had it."""
    vigil = Vigil()
    for step in range(FIRST // 2):
        vigil.heard(report_of(step, {bad: "non-finite gradient"}), 0, "warn", NAMED)
    for step in range(FIRST // 2, FIRST):
        vigil.heard(report_of(step, {1: "non-finite gradient"}, members=(1, 2)), 0, "warn", NAMED)
    assert [record.getMessage().partition(" in a row")[0] for record in caplog.records] == texts


@pytest.mark.parametrize("why", ["joined", "no gradient"])
def test_ranks_that_have_nothing_to_vote_on_are_no_matter(caplog: pytest.LogCaptureFixture, why: str) -> None:
    assert said(caplog, 4 * FIRST, {1: why}) == {}


def test_a_vote_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    vigil = Vigil()
    for step in range(10 * FIRST):
        broken = step % FIRST == FIRST - 1
        vigil.heard(report_of(step, FINE if broken else ALL_BAD), 0, "raise", NAMED)
        vigil.stepped(broken, 0)
    assert not caplog.records


def test_it_may_raise() -> None:
    vigil = Vigil()
    for step in range(FIRST - 1):
        vigil.heard(report_of(step, ALL_BAD), 2, "raise", NAMED)
    with pytest.raises(DeadTrainingError, match=r"training has died.*set_detect_anomaly.*this is rank 2"):
        vigil.heard(report_of(FIRST, ALL_BAD), 2, "raise", NAMED)


def test_one_rank_does_not_raise(caplog: pytest.LogCaptureFixture) -> None:
    vigil = Vigil()
    for step in range(FIRST):
        vigil.heard(report_of(step, {1: "non-finite gradient"}), 0, "raise", NAMED)
    assert len(caplog.records) == 1


def test_steps_of_ones_own_that_fail(caplog: pytest.LogCaptureFixture) -> None:
    vigil = Vigil()
    for _ in range(2 * FIRST):
        vigil.stepped(False, 1)
    assert ["rank 1: the gradient" in record.getMessage() for record in caplog.records] == [True, True]
