"""mpisign.exchange.round on a rank alone: rounds that are dropped and run again, and that go on without waiting."""

from __future__ import annotations

import drops
import parts
import pytest
import rounds
import torch
from methods_table import exchanges
from parts import ONE_SEGMENT_A_BUCKET

import mpisign
from mpisign import MpisignError

pytestmark = pytest.mark.usefixtures("world")

each_that_runs = parts.each_method_that(parts.runs_alone)
each_exchange = pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
each_way = pytest.mark.parametrize(
    ("exchange", "cap"),
    [
        ("allgather", None),
        ("allgather", ONE_SEGMENT_A_BUCKET),
        ("two_phase", None),
        pytest.param("two_phase", ONE_SEGMENT_A_BUCKET, marks=pytest.mark.long),
    ],
)


def method_by(name: str, exchange: str) -> mpisign.Method:
    method = parts.methods_for(1)[name]
    if exchange not in exchanges(method):
        pytest.skip(f"not by {exchange}")
    return method


@each_that_runs
@each_way
def test_a_round_that_was_dropped_leaves_no_trace(name: str, exchange: str, cap: float | None) -> None:
    drops.check_that_drops_leave_no_trace(method_by(name, exchange), exchange, cap)


@each_that_runs
@each_exchange
def test_to_advance_between_submits_changes_no_bit(name: str, exchange: str) -> None:
    method = method_by(name, exchange)
    drops.check_that_drops_leave_no_trace(method, exchange, ONE_SEGMENT_A_BUCKET, advance=True)


def test_a_round_that_was_dropped_may_be_run_again_with_the_same_coins() -> None:
    tensors = parts.parameters((1000,))
    made = rounds.job(tensors, exchange="two_phase")
    decided = []
    for step in (3, 3, 4):
        parts.give(tensors, [torch.zeros(1000)])
        made.drop(step, 1)
        made.run(step)
        decided.append(parts.flat(tensors[0].grad).tolist())
    assert decided[0] == decided[1] != decided[2]


def test_what_has_changed_the_memory_cannot_be_dropped() -> None:
    tensors = parts.parameters((40,))
    made = rounds.job(tensors, mpisign.signum())
    parts.give(tensors, [torch.ones(40)])
    values = made.values()
    a_round, _ = made.begin(0, values)
    made.submit(a_round, values)
    with pytest.raises(MpisignError, match="only one that is reversible can be dropped"):
        a_round.drop()
    a_round.close()
    assert a_round.commit(made.sink).voters == (0,), "and can go on"


def test_until_it_is_committed_a_round_shows_nothing() -> None:
    tensors = parts.parameters((40,), (41,))
    made = rounds.job(tensors, mpisign.signum(0.5), cap=ONE_SEGMENT_A_BUCKET)
    for step in range(3):
        parts.give(tensors, parts.draw_normal(tensors, step))
        values, before = made.values(), drops.kept(made)
        given = parts.copies(values)
        a_round, _ = made.begin(step, values, reversible=True)
        made.submit(a_round, values)
        a_round.close()
        assert parts.same([t.grad for t in tensors], given)
        assert drops.same_kept(drops.kept(made), before)
        a_round.commit(made.sink)
        assert not drops.same_kept(drops.kept(made), before)
