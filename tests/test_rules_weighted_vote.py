"""mpisign.rules.WeightedVote against its oracle, and where it does better than a plain vote."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from gpu_branch import gpu_branch, needs_compiler

import mpisign
from mpisign.backends.host import Host, as_words
from mpisign.codecs import SignBits, Trits
from mpisign.policy import Policy
from mpisign.rules import WeightedVote
from mpisign.rules.weighted_vote import weight

FIRST_WORD = 77
on = pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=needs_compiler)], ids=["host", "kernels"])


@pytest.fixture(params=[None, 64], ids=["", "small blocks"], autouse=True)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(Host, "cache", request.param)


def decided(ballots: np.ndarray, ties: str) -> np.ndarray:
    """What the rule makes of ballots (V, n) of +1, -1 and 0."""
    policy, n = Policy("abstain", ties, seed=9), ballots.shape[1]
    context = policy.context(4, 0)
    planes = [np.stack([oracle.to_words(its > 0), oracle.to_words(its != 0)]) for its in ballots]
    out = torch.full((2, planes[0].shape[1]), 0x25A5A5A5, dtype=torch.int32)
    messages = [torch.from_numpy(its.view(np.int32)) for its in planes]
    WeightedVote().recode(messages, torch.empty(0), out, Trits(), context, FIRST_WORD)
    signs, moved = (oracle.to_flags(as_words(row), n) for row in out)
    return np.where(moved, np.where(signs, 1, -1), 0)


@on
@pytest.mark.parametrize("ties", ["coin", "zero", "positive"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 16])
def test_it_is_the_oracles(ranks: int, ties: str, gpu: bool) -> None:
    coin = oracle.coins(oracle.coin_key(9, 4, oracle.TIES), FIRST_WORD, 333)
    for seed in range(3):
        random = np.random.default_rng(seed)
        truth = random.choice([-1, 1], 333)
        right = random.random((ranks, 1)) * 0.6 + 0.3
        ballots = np.where(random.random((ranks, 333)) < right, truth, -truth)
        ballots[random.random((ranks, 333)) < 0.2] = 0
        ballots[:, 100:140] = 0  # of which nobody says anything
        with gpu_branch(gpu):
            ours = decided(ballots.astype(np.int8), ties)
        assert (ours == oracle.weighted_vote(ballots.astype(np.int8), ties, coin)).all()


def test_weights_are_log_odds() -> None:
    assert weight(0, 0) == 0.0
    assert weight(50, 100) == 0.0
    assert weight(30, 100) == -weight(70, 100) == round(64 * math.log(71 / 31))


def test_ranks_that_err_blindly_do_less_harm_and_flippers_help() -> None:
    """9 ranks are right in 70 of 100, and 6 in 30, which the weighted vote turns round."""
    random = np.random.default_rng(0)
    truth = random.choice([-1, 1], 20_000)
    chance = np.array([0.7] * 9 + [0.3] * 6)[:, None]
    ballots = np.where(random.random((15, 20_000)) < chance, truth, -truth).astype(np.int8)
    plain, _ = oracle.majority(ballots, "positive")
    rates = [float((vote == truth).mean()) for vote in (plain, decided(ballots, "positive"))]
    assert rates[0] < 0.8
    assert rates[1] > 0.87


def test_it_needs_votes_that_can_be_none() -> None:
    with pytest.raises(mpisign.OptionError, match=r"'weighted_vote' weighs votes that can be none, not 'sign_bits'"):
        WeightedVote().down(SignBits(), Policy(), 3)
