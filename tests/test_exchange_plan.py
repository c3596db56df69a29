"""mpisign.exchange.plan on a rank alone: what it refuses, what it stands for, what it was made for."""

from __future__ import annotations

from typing import Any

import parts
import pytest
import rounds
import torch
from parts import ONE_SEGMENT_A_BUCKET

import mpisign
from mpisign import GradientError, OptionError
from mpisign.policy import Policy

pytestmark = pytest.mark.usefixtures("world")


def test_ranks_too_few_for_a_rule_are_told_at_once() -> None:
    with pytest.raises(OptionError, match=r"krum with f=1 needs at least .* 5 ranks, and this job has 1"):
        rounds.job(parts.parameters((3,)), mpisign.krum(1))


def test_parameters_that_cannot_be_voted_on_are_told_at_once() -> None:
    whole = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(GradientError, match=r"parameter 'p0' is torch\.int64"):
        rounds.job([whole])


def test_models_are_not_exchanged_beside_gradients() -> None:
    with pytest.raises(OptionError, match=r"monna exchanges models, so it must be the method of all parameters"):
        rounds.job(parts.parameters((3,), (4,)), [mpisign.monna(0), mpisign.signsgd()])


def test_the_fingerprint_stands_for_all_that_ranks_must_share() -> None:
    tensors, vote, mean = parts.parameters((40,), (5,)), mpisign.signsgd(), mpisign.mean()
    same = [rounds.job(parts.parameters((40,), (5,))).plan.fingerprint for _ in range(2)]
    others = [
        rounds.job(tensors, number=2),
        rounds.job(tensors, mpisign.signum()),
        rounds.job(tensors, mpisign.signum(0.8)),
        rounds.job(tensors, [vote, mean]),
        rounds.job(tensors, [mean, vote]),
        rounds.job(tensors, policy=Policy("coin", seed=1)),
        rounds.job(tensors, policy=Policy("abstain")),
        rounds.job(tensors, policy=Policy("rows")),
        rounds.job(tensors, policy=Policy("coin", "zero")),
        rounds.job(tensors, exchange="allgather"),
        rounds.job(tensors, cap=ONE_SEGMENT_A_BUCKET),
        rounds.job(tensors[::-1]),
        rounds.job(tensors[:1]),
    ]
    assert same[0] == same[1]
    assert len({same[0], *(made.plan.fingerprint for made in others)}) == 1 + len(others)


def test_it_fits_what_it_was_made_for() -> None:
    tensors, method = parts.parameters((40,), (5,)), mpisign.signum()
    plan, group = rounds.job(tensors, method).plan, rounds.session().group
    assert plan.fits(tensors, [method] * 2, group)
    assert plan.fits(tensors, [mpisign.signum()] * 2, group), "an equal method is the same"
    assert not plan.fits(tensors[:1], [method], group)
    assert not plan.fits(tensors, [method, mpisign.signsgd()], group)
    mpisign.shutdown()
    mpisign.init()
    assert not plan.fits(tensors, [method] * 2, rounds.session().group)


def test_batches_are_all_buckets_in_the_order_in_which_they_are_sent() -> None:
    tensors = parts.parameters((40,), (41,), (42,), (43,))
    vote, mean = mpisign.signsgd(), mpisign.mean()
    plan = rounds.job(tensors, [vote, mean, mean, vote], cap=ONE_SEGMENT_A_BUCKET).plan
    assert [batch.places for batch in plan.batches] == [(3,), (2,), (1,), (0,)]
    assert [batch.method for batch in plan.batches] == [vote, mean, mean, vote]
    assert [bucket.index for batch in plan.batches for bucket in batch.buckets] == [0, 1, 2, 3]
    together = rounds.job(tensors, [vote, mean, mean, vote]).plan
    assert [batch.places for batch in together.batches] == [(2, 1), (3, 0)], "complete when backward reaches its last"


@pytest.mark.parametrize("zeros", ["rows", "coin", "abstain", "positive"])
@parts.each_method_that(parts.runs_alone)
def test_rows_count_where_there_are_ballots_of_one_plane(name: str, zeros: str) -> None:
    method, policy = parts.methods_for(1)[name], Policy(zeros)
    plan = rounds.job(parts.parameters((40,)), method, policy=policy).plan
    ballots = method.codec.ballots and method.codec.planes(policy) == 1
    (spoken,) = plan.spoken
    assert (spoken is not None) == (zeros == "rows" and ballots)


def test_headers_tell_rows_only_of_parameters_that_have_had_one_of_zeros() -> None:
    tensors = parts.parameters((4, 70), (5, 70), (3,))
    made = rounds.job(tensors, policy=Policy("rows"))
    plain = made.plan
    bits: Any = lambda plan: plan.headers[0]._bits  # noqa: E731
    assert plain.telling() is plain
    assert (plain.told, bits(plain)) == ((), 6)
    made.store.rows |= {tensors[1], tensors[2]}
    telling = plain.telling()
    assert (set(telling.told), bits(telling)) == ({"p1", "p2"}, 6 + 5 + 1)
    assert telling.telling() is telling
    assert telling.batches is plain.batches, "all else is the same, also its buffers"
    assert rounds.job(tensors, policy=Policy("rows"), store=made.store).plan.told == telling.told
    assert rounds.job(tensors, policy=Policy("coin"), store=made.store).plan.told == ()
