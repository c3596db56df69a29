"""mpisign.rules: how messages become one, against the oracle, however the coordinates are sliced."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import oracle
import pytest
import torch

from mpisign.backends import backend_for
from mpisign.backends.host import as_words
from mpisign.codecs import SignBits, Trits
from mpisign.policy import Policy
from mpisign.rules import MajorityVote, Mean, MeanOfSigns, TallyRule, ValueRule

STEP, RANK, FIRST_WORD = 5, 1, 333
RANKS = [1, 2, 3, 4, 5, 8]


def some_updates(ranks: int, n: int) -> list[oracle.Floats]:
    rng = np.random.default_rng((ranks, n))
    return [np.where(rng.random(n) < 0.2, 0.0, rng.standard_normal(n)) for _ in range(ranks)]


def planes(ballot: oracle.Ballot, count: int) -> torch.Tensor:
    words = np.stack([oracle.to_words(ballot > 0), oracle.to_words(ballot != 0)][:count])
    return torch.from_numpy(words.view(np.int32))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("ties", ["coin", "zero", "positive"])
@pytest.mark.parametrize("zeros", ["coin", "abstain", "positive"])
def test_majority_vote(zeros: str, ties: str, ranks: int) -> None:
    policy, n = Policy(zeros, ties, seed=2), 300
    up, down = SignBits().planes(policy), MajorityVote().down(SignBits(), policy, ranks).planes(policy)
    assert down == (2 if zeros == "abstain" or ties == "zero" else 1)
    keys = [oracle.coin_key(2, STEP, oracle.zeros_stream(rank)) for rank in range(ranks)]
    ballots = [
        oracle.ballot(update, zeros, oracle.coins(key, FIRST_WORD, n))
        for update, key in zip(some_updates(ranks, n), keys, strict=True)
    ]
    expected, expected_ties = oracle.decide(some_updates(ranks, n), STEP, FIRST_WORD, zeros=zeros, ties=ties, seed=2)
    out = torch.empty((down, SignBits().length(n)), dtype=torch.int32)
    tied = MajorityVote().decide([planes(b, up) for b in ballots], out, policy.context(STEP, RANK), FIRST_WORD)
    decided = np.where(oracle.to_flags(as_words(out[0]), n), 1, -1)
    if down == 2:
        decided[~oracle.to_flags(as_words(out[1]), n)] = 0
    assert (decided == expected).all()
    assert tied == expected_ties


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 1, 1000, 70_001])
def test_mean_rounds_as_a_sum_in_the_order_of_the_ranks(n: int, dtype: type, ranks: int) -> None:
    updates = [update.astype(dtype) for update in some_updates(ranks, n)]
    before = [update.copy() for update in updates]
    messages = [torch.from_numpy(update[None]) for update in updates]
    out = torch.full((1, n), torch.nan, dtype=messages[0].dtype)
    assert Mean().decide(messages, out, Policy().context(STEP, RANK), FIRST_WORD) == 0
    assert (out[0].numpy() == oracle.mean(updates)).all()
    assert all((a == b).all() for a, b in zip(updates, before, strict=True))


@pytest.mark.parametrize("ranks", RANKS)
def test_a_mean_does_not_depend_on_the_shards(ranks: int) -> None:
    assert isinstance(Mean(), ValueRule)
    n = 100_003
    messages = [torch.from_numpy(update.astype(np.float32)[None]) for update in some_updates(ranks, n)]
    whole, shards = torch.empty((2, 1, n))
    context = Policy().context(STEP, RANK)
    Mean().decide(messages, whole, context, 0)
    for lo, hi in itertools.pairwise([0, 1, 7, 32_769, n]):
        Mean().decide([message[:, lo:hi] for message in messages], shards[:, lo:hi], context, lo)
    assert torch.equal(whole, shards)


@pytest.mark.parametrize("voters", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("ranks", [8, 9])
@pytest.mark.parametrize("codec", [SignBits(), Trits()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mean_of_signs_is_counted(dtype: torch.dtype, codec: SignBits, ranks: int, voters: int) -> None:
    """Also where fewer vote than there are ranks, and however the words are sliced."""
    rule, policy, n = MeanOfSigns(), Policy(), 1000
    up, words, counts = codec.planes(policy), codec.length(n), rule.down(codec, policy, ranks)
    planes_down = counts.planes(policy)
    assert 2**planes_down > up * ranks >= 2 ** (planes_down - 1)
    signs = np.random.default_rng(voters).choice([-1, 1] if up == 1 else [-1, 0, 1], (voters, n))
    context = dataclasses.replace(policy.context(STEP, RANK), voters=tuple(range(voters)))
    decision = torch.full((planes_down, words), 0x25A5A5A5, dtype=torch.int32)
    for lo, hi in itertools.pairwise([0, 1, 20, words]):
        messages = [planes(ballot, up)[:, lo:hi] for ballot in signs]
        assert rule.decide(messages, decision[:, lo:hi], context, lo) == 0
    out = torch.full((n,), torch.nan, dtype=dtype)
    counts.decode(decision, out, context)
    assert torch.equal(out, torch.from_numpy(signs.sum(axis=0)).to(dtype) / voters)


# ------------------------------------------------------------------------------------------------ tallies


def tally(rule: TallyRule, messages: list[torch.Tensor], voters: int) -> torch.Tensor:
    """Of some of ``voters``, with room for all."""
    counts, rows = rule.tally_shape(len(messages[0]), voters)
    out = torch.full((counts, rows, messages[0].shape[1]), 0x5A5A5A5A, dtype=torch.int32)
    rule.tally(messages, out)
    return out


@pytest.mark.parametrize("parts", [[7], [1, 6], [3, 3, 1], [1] * 7, [4, 4], [2, 1, 1]], ids=str)
@pytest.mark.parametrize("ties", ["coin", "zero", "positive"])
@pytest.mark.parametrize("zeros", ["coin", "abstain"])
@pytest.mark.parametrize("rule", [MajorityVote(), MeanOfSigns()], ids=lambda rule: rule.name)
def test_tallies_of_parts_add_up_to_the_decision_of_all(
    rule: TallyRule, zeros: str, ties: str, parts: list[int]
) -> None:
    policy, ranks, n = Policy(zeros, ties, seed=2), sum(parts), 1000
    ballots = [np.sign(update).astype(np.int8) for update in some_updates(ranks, n)]
    if zeros == "coin":
        ballots = [np.where(ballot == 0, np.int8(1), ballot) for ballot in ballots]
    up, down = SignBits().planes(policy), rule.down(SignBits(), policy, ranks).planes(policy)
    messages = [planes(ballot, up) for ballot in ballots]
    context = dataclasses.replace(policy.context(STEP, RANK), voters=tuple(range(ranks)))
    expected, out = torch.zeros((2, down, SignBits().length(n)), dtype=torch.int32)
    tied = rule.decide(messages, expected, context, FIRST_WORD)

    stops = list(itertools.accumulate(parts))
    tallies = [tally(rule, messages[lo:hi], max(parts)) for lo, hi in itertools.pairwise([0, *stops])]
    total = torch.empty((len(tallies[0]), rule.tally_shape(up, ranks)[1], SignBits().length(n)), dtype=torch.int32)
    rule.merge(tallies, total)
    assert rule.settle(total, out, context, FIRST_WORD) == tied
    assert torch.equal(out, expected)


@pytest.mark.parametrize("ties", ["coin", "zero", "positive"])
@pytest.mark.parametrize("rule", [MajorityVote(), MeanOfSigns()], ids=lambda rule: rule.name)
def test_tallies_where_ranks_have_not_spoken(rule: TallyRule, ties: str) -> None:
    """What is known beside the ballots of one plane decides as if they had two."""
    policy, ranks, n = Policy("rows", ties, seed=2), 6, 300
    ballots = [np.sign(update).astype(np.int8) for update in some_updates(ranks, n)]
    messages = [planes(ballot, 1) for ballot in ballots]
    spoken = [planes(ballot, 2)[1] for ballot in ballots]
    context = dataclasses.replace(policy.context(STEP, RANK), voters=tuple(range(ranks)))
    k = SignBits().length(n)
    rows = 2 if rule.elects else MeanOfSigns().tally_shape(1, ranks)[1]
    expected, out = torch.zeros((2, rows, k), dtype=torch.int32)
    moved = expected[1] if rule.elects else torch.empty(k, dtype=torch.int32)
    tied = rule.decide_spoken(messages, spoken, expected, moved, context, FIRST_WORD)

    total, voted = tally(rule, messages, ranks), torch.empty((3, k), dtype=torch.int32)
    backend_for(voted.device).count(spoken, voted)
    assert rule.settle(total, out, context, FIRST_WORD, voted) == tied
    assert torch.equal(out, expected)
