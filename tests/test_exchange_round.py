"""mpisign.exchange.round on a rank alone: the order of a step's parts, its report, and what errors leave."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import oracle
import parts
import pytest
import rounds
import torch
from parts import DTYPES, ONE_SEGMENT_A_BUCKET, SHAPES

import mpisign
from mpisign import ConsistencyError, GradientError, Method, MpisignError
from mpisign.codecs import SignBits
from mpisign.exchange.header import JOINED, NON_FINITE, REASONS, SCALER_INF
from mpisign.exchange.local import local_update
from mpisign.memory import Memory
from mpisign.memory.memory import State
from mpisign.policy import Policy, StepContext
from mpisign.rules import MajorityVote, VectorRule
from mpisign.trace import PHASES

pytestmark = pytest.mark.usefixtures("world")

each_that_decides = parts.each_method_that(lambda method: parts.runs_alone(method) and not method.exchanges_models)
BAD = [float("nan"), float("inf")]


def memories(store: Any, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [value.clone() for tensor in tensors for value in store.of(tensor).values()]


# ------------------------------------------------------------------------------------------------------- a step


@parts.each_method_that(parts.runs_alone)
@pytest.mark.parametrize("cap", [None, ONE_SEGMENT_A_BUCKET])
def test_every_method_takes_a_step_and_reports_it(name: str, cap: float | None) -> None:
    tensors = parts.parameters(*SHAPES)
    method = parts.methods_for(1)[name]
    made = rounds.job(tensors, method, cap=cap)
    for step in range(3):
        parts.give(tensors, parts.draw_normal(tensors, step))
        given, before = [t.grad for t in tensors], parts.copies(tensors)
        report = made.run(step)
        assert (report.step, report.method, report.voters, dict(report.abstentions)) == (step, method.name, (0,), {})
        assert report.exchange == ("allgather",) * len(made.plan.layout.buckets)
        assert (report.bytes_sent, report.header_bytes, report.skipped) == (0, 0, False)
        assert isinstance(report.ties, int) if method.elects else report.ties is None
        assert set(report.seconds) == set(PHASES)
        assert all(tensor.grad is gradient for tensor, gradient in zip(tensors, given, strict=True))
        assert all(bool(t.grad.isfinite().all()) for t in tensors)
        assert parts.same(tensors, before), "a model's mean with itself is itself, and others leave parameters alone"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zeros", ["coin", "abstain", "positive"])
def test_alone_the_ballot_is_the_decision(dtype: torch.dtype, zeros: str) -> None:
    tensors = parts.parameters(*SHAPES, dtypes=[dtype])
    made = rounds.job(tensors, policy=Policy(zeros, seed=4), cap=ONE_SEGMENT_A_BUCKET)
    starts = oracle.first_words([t.numel() for t in tensors])
    for step in range(2):
        gradients = parts.draw(tensors, step)
        parts.give(tensors, gradients)
        made.run(step)
        for tensor, gradient, start in zip(tensors, gradients, starts, strict=True):
            coins = parts.zero_coins(tensor.numel(), start, step=step, seed=4)
            assert parts.flat(tensor.grad).tolist() == oracle.ballot(parts.flat(gradient), zeros, coins).tolist()


def test_the_same_step_run_again_decides_the_same_and_another_does_not() -> None:
    tensors = parts.parameters((1000,))
    decisions = []
    for step in (3, 3, 4):
        parts.give(tensors, [torch.zeros(1000)])
        rounds.job(tensors).run(step)
        decisions.append(parts.flat(tensors[0].grad).tolist())
    assert decisions[0] == decisions[1] != decisions[2]


def test_a_loss_scale_is_taken_out() -> None:
    (tensor,) = tensors = parts.parameters((40,))
    (gradient,) = parts.draw_normal(tensors, 0)
    parts.give(tensors, [gradient * 2.0**10])
    rounds.job(tensors, mpisign.mean()).run(0, unscale=2.0**-10)
    assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_rule_that_remembers_is_given_its_last_decision(momentum: float) -> None:
    """Also by a plan that is made anew for the same memory, as it is when a parameter is frozen."""
    tensors = parts.parameters((40,), (3,), dtypes=[torch.float64])
    method = mpisign.centered_clipping(radius=0.5, momentum=momentum)
    store = rounds.store_for(method)
    made = rounds.job(tensors, method, store=store)
    center, kept = np.zeros(43), np.zeros(43)
    for step in range(4):
        if step == 2:
            store.follow(tensors, {t: method.memory for t in tensors}, rounds.session().group)
            made = rounds.job(tensors, method, store=store)
        gradients = parts.draw_normal(tensors, step)
        parts.give(tensors, gradients)
        made.run(step)
        g = np.concatenate([parts.flat(gradient) for gradient in gradients])
        sent, kept = oracle.momentum(kept, g, momentum)
        center = oracle.centered_clipping(sent[None], 0.5, center, 1)
        ours = np.concatenate([parts.flat(t.grad) for t in tensors])
        np.testing.assert_allclose(ours, center, rtol=0, atol=1e-6)


def test_a_local_update_leaves_the_momentum_in_the_gradients() -> None:
    tensors = parts.parameters((40,), (3,))
    made = rounds.job(tensors, mpisign.monna(0, momentum=0.5))
    parts.give(tensors, [torch.full((40,), 8.0), None])
    assert local_update(made.plan, 0, [t.grad for t in tensors], 0.5)
    assert (tensors[0].grad == 2.0).all()
    assert tensors[1].grad is None
    tensors[0].grad[3] = torch.nan
    assert not local_update(made.plan, 1, [t.grad for t in tensors], 1.0)


# ----------------------------------------------------------------------------------------------- the order of calls


@dataclasses.dataclass(frozen=True)
class NotedBits(SignBits):
    log: list[str] = dataclasses.field(default_factory=list, repr=False, compare=False)
    fails_at: int = -1

    def encode(self, values: torch.Tensor, message: torch.Tensor, context: StepContext, first_word: int) -> Any:
        self.log.append(f"encode {first_word}")
        if first_word == self.fails_at:
            raise RuntimeError("the codec broke")
        return super().encode(values, message, context, first_word)


@dataclasses.dataclass(frozen=True)
class NotedVote(MajorityVote):
    log: list[str] = dataclasses.field(default_factory=list, repr=False, compare=False)
    fails: bool = False

    def decide(self, messages: Sequence[torch.Tensor], out: torch.Tensor, context: StepContext, first_word: int) -> Any:
        self.log.append(f"decide {first_word}")
        if self.fails:
            raise RuntimeError("the rule broke")
        return super().decide(messages, out, context, first_word)


@dataclasses.dataclass(frozen=True)
class Told(Memory):
    """Hears what counted."""

    log: list[str] = dataclasses.field(default_factory=list, repr=False, compare=False)
    fields = ("taken",)
    feedback = True

    def __call__(
        self, gradient: torch.Tensor, state: State, scratch: torch.Tensor, context: StepContext, first_word: int
    ) -> torch.Tensor:
        state["taken"].add_(gradient)
        return gradient

    def sent(self, message: torch.Tensor, codec: Any, state: State) -> None:
        self.log.append(f"sent {message.shape[1]}")


def noted(log: list[str], **fails: Any) -> Method:
    rule = NotedVote(log, fails=fails.get("rule", False))
    return parts.method_of(Told(log), NotedBits(log, fails_at=fails.get("codec", -1)), rule)


def started(log: list[str], tensors: Any, gradients: Sequence[torch.Tensor], **options: Any) -> rounds.Job:
    method = noted(log, **options)
    made = rounds.record(rounds.job(tensors, method, cap=ONE_SEGMENT_A_BUCKET), log)
    parts.give(tensors, gradients)
    return made


def test_a_message_leaves_before_the_next_is_encoded_and_each_is_decided_when_it_is_here() -> None:
    log: list[str] = []
    tensors = parts.parameters((96,), (33,), (5,))  # 3, 2 and 1 words, the last first
    made = started(log, tensors, parts.draw_normal(tensors, 0))
    with rounds.waits_recorded(log):
        made.run(8)
    assert log == [
        "wait: step 8, handshake",
        *("encode 0", "push 0", "post 0"),
        *("encode 1", "push 1", "post 1"),
        *("encode 3", "push 2", "post 2"),
        *("wait: step 8, bucket 0, header", "wait: step 8, bucket 0, phase 1", "go_on 0", "decide 0"),
        *("wait: step 8, bucket 1, header", "wait: step 8, bucket 1, phase 1", "go_on 1", "decide 1"),
        *("wait: step 8, bucket 2, header", "wait: step 8, bucket 2, phase 1", "go_on 2", "decide 3"),
        *("sent 1", "sent 2", "sent 3"),
        "wait: step 8, count of ties",
    ]


def test_to_advance_waits_for_nothing_and_decides_what_is_here() -> None:
    """Alone, every message arrives in the end without anybody waiting; nothing is written before the commit."""
    log: list[str] = []
    tensors = parts.parameters((96,), (33,), (5,))
    gradients = parts.draw_normal(tensors, 0)
    made = started(log, tensors, gradients)
    values = made.values()
    a_round, _ = made.begin(8, values)
    deadline = time.monotonic() + 60
    with rounds.waits_recorded(log):
        log.clear()
        for batch in made.plan.batches:
            a_round.submit(batch, [values[place] for place in batch.places])
            while not a_round.advance():
                assert time.monotonic() < deadline
        assert [entry for entry in log if entry.startswith(("encode", "decide", "wait"))] == [
            *("encode 0", "decide 0", "encode 1", "decide 1", "encode 3", "decide 3")
        ]
        a_round.close()
        assert not any(entry.startswith("wait") for entry in log), "all was here"
    assert parts.same([t.grad for t in tensors], gradients)
    assert a_round.commit(made.sink).voters == (0,)
    assert parts.same([t.grad for t in tensors], [g.sign() for g in gradients])


def test_where_a_ballot_has_ended_all_messages_leave_and_what_came_before_is_decided() -> None:
    log: list[str] = []
    tensors = parts.parameters((96,), (33,), (5,))
    gradients = parts.draw_normal(tensors, 0)
    gradients[1][32] = torch.nan
    report = started(log, tensors, gradients).run(0)
    assert (report.voters, dict(report.abstentions), report.ended_at) == ((0,), {}, {0: "p1"})
    assert [entry for entry in log if entry.startswith(("encode", "post", "decide", "sent"))] == [
        *("encode 0", "post 0", "encode 1", "post 1", "encode 3", "post 2", "decide 0", "sent 1")
    ]
    assert torch.equal(tensors[2].grad, gradients[2].sign())
    assert [tensors[place].grad for place in (0, 1)] == [None, None], "on which nobody has voted"


# --------------------------------------------------------------------------------------------------- nobody votes


@each_that_decides
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("cap", [None, ONE_SEGMENT_A_BUCKET])
def test_a_bad_gradient_ends_the_ballot_where_it_is(name: str, bad: float, cap: float | None) -> None:
    """Parameters before it on the wire are decided as if nothing were; on it and those after it nobody votes.

    With a rule on whole vectors, or a memory that must see all gradients, on nothing: all stays as it is.
    """
    method = parts.methods_for(1)[name]
    ours, whole = ([*parts.parameters((40,), (100,), (5,))] for _ in range(2))
    made, fine = (rounds.job(tensors, method, cap=cap) for tensors in (ours, whole))
    for tensors, one in ((ours, made), (whole, fine)):
        parts.give(tensors, parts.draw_normal(tensors, 0))
        one.run(0)
    kept, gradients = made.memories(), parts.draw_normal(ours, 1)
    parts.give(whole, gradients)
    fine.run(1)
    gradients[1][50] = bad
    parts.give(ours, gradients)
    report = made.run(1)
    assert report.ended_at == {0: "p1"}
    if isinstance(method.rule, VectorRule) or method.memory.needs_all:
        assert (report.voters, report.skipped, report.abstentions) == ((), True, {0: REASONS[NON_FINITE]})
        assert parts.same([t.grad for t in ours], gradients)
        assert parts.same(made.memories(), kept) or not method.memory.needs_all
    else:
        assert (report.voters, report.skipped, report.abstentions) == ((0,), False, {})
        assert parts.same([t.grad for t in ours], [None, None, whole[2].grad])
        assert parts.same(list(made.store.of(ours[2]).values()), list(fine.store.of(whole[2]).values()))
    assert all(bool(value.isfinite().all()) for value in made.memories())
    parts.give(ours, parts.draw_normal(ours, 2))
    report = made.run(2)
    assert (report.voters, report.ended_at) == ((0,), {}), "the next step is fine again"


def test_only_the_method_of_a_bad_gradient_abstains() -> None:
    tensors = parts.parameters((40,), (41,), (42,), (43,))
    made = rounds.job(tensors, [mpisign.signsgd(), mpisign.mean()] * 2)
    gradients = parts.draw_normal(tensors, 0)
    gradients[2][7] = torch.nan  # the first of signsgd on the wire
    parts.give(tensors, gradients)
    report = made.run(0)
    assert (report.voters, report.ended_at) == ((0,), {0: "p2"})
    assert parts.same([t.grad for t in tensors], [None, gradients[1], None, gradients[3]])


def test_a_memory_that_overflows_costs_one_step() -> None:
    """Without being cleared it would never be finite again."""
    tensors = parts.parameters((40,), (5,))
    made = rounds.job(tensors, mpisign.ef_signsgd())
    huge = torch.ones(40)
    huge[7] = 3e38
    ended = []
    for step in range(4):
        parts.give(tensors, [huge if step < 2 else torch.ones(40), torch.ones(5)])
        ended.append(dict(made.run(step).ended_at))
    assert ended == [{}, {0: "p0"}, {}, {}]


@each_that_decides
@pytest.mark.parametrize("reason", [SCALER_INF, JOINED])
def test_who_abstains_beforehand_changes_nothing(name: str, reason: int) -> None:
    tensors = parts.parameters((40,), (100,), (5,))
    method = parts.methods_for(1)[name]
    store = rounds.store_for(method)
    made = rounds.job(tensors, method, store=store)
    parts.give(tensors, parts.draw_normal(tensors, 0))
    made.run(0)
    kept, gradients = memories(store, tensors), parts.draw_normal(tensors, 1)
    parts.give(tensors, gradients)
    report = made.run(1, reason)
    assert (report.voters, report.skipped, report.abstentions) == ((), True, {0: REASONS[reason]})
    assert parts.same([t.grad for t in tensors], gradients)
    assert parts.same(memories(store, tensors), kept)


@each_that_decides
def test_without_any_gradient_nothing_happens(name: str) -> None:
    tensors = parts.parameters((40,), (5,))
    report = rounds.job(tensors, parts.methods_for(1)[name]).run(0)
    assert (report.skipped, report.abstentions) == (True, {0: "no gradient"})
    assert [t.grad for t in tensors] == [None, None]


@pytest.mark.parametrize("name", ["signsgd", "mean", "ef_signsgd"])
def test_a_parameter_without_gradient_is_left_alone(name: str) -> None:
    tensors = parts.parameters((40,), (5,), (7,))
    parts.give(tensors, [torch.ones(40), None, torch.ones(7)])
    report = rounds.job(tensors, parts.methods_for(1)[name]).run(0)
    assert (report.skipped, report.voters) == (False, (0,))
    assert tensors[1].grad is None
    assert (tensors[0].grad == 1.0).all()


def test_no_parameters_at_all() -> None:
    report = rounds.job([]).run(0)
    assert (report.skipped, report.exchange, report.bytes_sent) == (True, (), 0)


# ------------------------------------------------------------------------------------------------------- errors


def test_a_sparse_gradient_is_refused_before_anybody_hears_of_the_step() -> None:
    log: list[str] = []
    tensors = parts.parameters((40,), (5,))
    method = mpisign.signum()
    store = rounds.store_for(method)
    made = rounds.job(tensors, method, store=store)
    parts.give(tensors, parts.draw_normal(tensors, 0))
    tensors[0].grad = torch.zeros(40).to_sparse()
    before = parts.copies([tensors[1].grad])
    with rounds.waits_recorded(log), pytest.raises(GradientError, match=r"rank 0: the gradient of 'p0' is .*sparse"):
        made.run(0)
    assert log == []
    assert parts.same([tensors[1].grad], before)
    assert not any(bool(value.any()) for value in memories(store, tensors))
    parts.give(tensors, parts.draw_normal(tensors, 0))
    assert made.run(0).voters == (0,)


@pytest.mark.parametrize("where", [{"codec": 1}, {"rule": True}], ids=["codec", "rule"])
def test_what_breaks_in_the_middle_breaks_the_session(where: dict[str, Any]) -> None:
    """The other ranks wait there, so that nothing this rank sends afterwards may be taken for it."""
    tensors = parts.parameters((96,), (33,), (5,))
    made = rounds.job(tensors, noted([], **where), cap=ONE_SEGMENT_A_BUCKET)
    gradients = parts.draw_normal(tensors, 0)
    parts.give(tensors, gradients)
    with pytest.raises(RuntimeError, match="broke"):
        made.run(6)
    assert rounds.session().watchdog.broken == "step 6"
    assert parts.same([t.grad for t in tensors], gradients)
    with pytest.raises(ConsistencyError, match="rank 0 was interrupted in step 6"):
        made.run(7)


# --------------------------------------------------------------------------------------------------- sitting out


@each_that_decides
def test_alone_to_sit_out_is_the_end(name: str) -> None:
    tensors = parts.parameters((40,))
    made = rounds.job(tensors, parts.methods_for(1)[name])
    parts.give(tensors, [torch.ones(40)])
    handshake, report = made.sit_out(3, 5)
    assert handshake.all_joined
    assert handshake.joined_for == (5,)
    assert (report.step, report.skipped, report.voters, report.ties) == (3, True, (), None)
    assert report.abstentions == {0: "joined"}
    assert (tensors[0].grad == 1.0).all()


# ------------------------------------------------------------------------------------------------------ agreement


def test_alone_one_agrees_with_oneself() -> None:
    tensors = parts.parameters((40,), (5,))
    for zeros in ("coin", "abstain"):
        parts.give(tensors, parts.draw(tensors, 0))
        assert rounds.job(tensors, policy=Policy(zeros)).run(0).agreement() == [1.0]


def test_who_did_not_vote_agrees_with_nobody() -> None:
    tensors = parts.parameters((40,))
    parts.give(tensors, [torch.full((40,), torch.nan)])
    (share,) = rounds.job(tensors).run(0).agreement()
    assert math.isnan(share)


def test_agreement_is_asked_for_in_time() -> None:
    tensors = parts.parameters((40,))
    made = rounds.job(tensors)
    parts.give(tensors, [torch.ones(40)])
    old, new = made.run(4), made.run(5)
    with pytest.raises(MpisignError, match="step 4 are gone"):
        old.agreement()
    assert new.agreement() == [1.0]
    mpisign.shutdown()
    mpisign.init()
    with pytest.raises(MpisignError, match="shut down"):
        new.agreement()


@parts.each_method_that(lambda method: parts.runs_alone(method) and not method.elects)
def test_where_nobody_votes_with_signs_there_is_no_agreement(name: str) -> None:
    tensors = parts.parameters((40,))
    parts.give(tensors, [torch.ones(40)])
    with pytest.raises(MpisignError, match="casts no votes"):
        rounds.job(tensors, parts.methods_for(1)[name]).run(0).agreement()
