"""mpisign.exchange.round on real ranks: who votes on what, in which order things happen, what an error leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import drops
import numpy as np
import oracle
import parts
import pytest
import rounds
import torch
from gpu_branch import gpu_branch, needs_compiler
from methods_table import exchanges
from parts import DTYPES, ONE_BUCKET, ONE_SEGMENT_A_BUCKET

import mpisign
from mpisign import ConsistencyError
from mpisign.codecs import SignBits
from mpisign.exchange.header import JOINED, NO_GRADIENT, REASONS, SCALER_INF, VOTES
from mpisign.policy import Policy, StepContext
from mpisign.rules import MajorityVote

from . import ballots

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi

SHAPES = ((40,), (3, 5, 7), (), (33,), (0,), (100,))
EXCHANGES = ("allgather", "two_phase")


def gradients_of_ranks(tensors: Sequence[torch.Tensor], step: int, size: int) -> list[list[Any]]:
    """``[rank][place]``, known to all: rank r lacks the gradient of parameter r + 1, rank 1 has a NaN in step 1."""
    drawn: list[list[Any]] = [parts.draw(tensors, step, rank) for rank in range(size)]
    for rank, gradients in enumerate(drawn):
        gradients[(rank + 1) % len(gradients)] = None
    if step == 1:
        drawn[1 % size][3][20] = torch.nan
        drawn[1 % size][0][3] = torch.inf
    return drawn


def statuses(step: int, size: int) -> list[int]:
    """In step 1 a scaler has found an Inf on rank 2."""
    return [SCALER_INF if step == 1 and rank == 2 else VOTES for rank in range(size)]


def method_here(comm: MPI.Comm, name: str, least: int = 1) -> mpisign.Method:
    """The method for this job; skips the test where it needs more ranks than there are, or ``least``."""
    method = parts.methods_for(comm.size)[name]
    if comm.size < least or not parts.runs_with(method, comm.size):
        pytest.skip("needs more ranks")
    return method


def voted(drawn: Sequence[Sequence[Any]], status: Sequence[int]) -> tuple[list[list[Any]], dict[int, str]]:
    """What counts, ``[rank][place]``, and where a ballot has ended: it counts until there, from the last place on."""
    counted: list[list[Any]] = []
    ended: dict[int, str] = {}
    for rank, gradients in enumerate(drawn):
        mine: list[Any] = [None if g is None or status[rank] != VOTES else ballots.flat(g) for g in gradients]
        for place in reversed(range(len(mine))):
            if rank not in ended and mine[place] is not None and not np.isfinite(mine[place]).all():
                ended[rank] = f"p{place}"
            if rank in ended:
                mine[place] = None
        counted.append(mine)
    return counted, ended


@pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=needs_compiler)], ids=["host", "kernels"])
@pytest.mark.parametrize("cap", [ONE_BUCKET, ONE_SEGMENT_A_BUCKET])
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(("zeros", "ties"), [("coin", "coin"), ("abstain", "zero"), ("positive", "positive")])
def test_each_parameter_is_decided_by_those_who_vote_on_it(
    comm: MPI.Comm, zeros: str, ties: str, exchange: str, cap: float, gpu: bool
) -> None:
    """By every exchange, in messages of any size, on the host and by the kernels; also in a step with a NaN."""
    tensors = parts.parameters(*SHAPES, dtypes=DTYPES)
    sizes = [t.numel() for t in tensors]
    with gpu_branch(gpu):
        made = rounds.job(tensors, policy=Policy(zeros, ties, seed=9), exchange=exchange, cap=min(cap, 1 << 20))
        for step in range(3):
            drawn, status = gradients_of_ranks(tensors, step, comm.size), statuses(step, comm.size)
            parts.give(tensors, drawn[comm.rank])
            report = made.run(step, status[comm.rank])
            counted, ended = voted(drawn, status)
            decisions, tied = ballots.vote(counted, sizes, step, zeros=zeros, ties=ties, seed=9)
            for tensor, decision in zip(tensors, decisions, strict=True):
                ours = None if tensor.grad is None else parts.flat(tensor.grad).tolist()
                assert ours == (None if decision is None else decision.tolist())
            assert report.ties == tied
            assert report.voters == tuple(rank for rank, code in enumerate(status) if code == VOTES)
            assert report.abstentions == {r: REASONS[code] for r, code in enumerate(status) if code != VOTES}
            assert report.ended_at == ended
            said = (report.step, report.voters, dict(report.abstentions), report.ties, report.bytes_sent)
            assert len(set(map(str, comm.allgather(said)))) == 1


@pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=needs_compiler)], ids=["host", "kernels"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_after_a_nan_the_memory_is_as_if_only_that_element_had_been_left_out(
    comm: MPI.Comm, exchange: str, gpu: bool
) -> None:
    tensors = parts.parameters(*SHAPES)
    sizes = [t.numel() for t in tensors]
    momenta = [[np.zeros(size) for size in sizes] for _ in range(comm.size)]
    with gpu_branch(gpu):
        made = rounds.job(tensors, mpisign.signum(0.5), exchange=exchange, cap=ONE_SEGMENT_A_BUCKET)
        for step in range(3):
            drawn: list[list[Any]] = [parts.draw_normal(tensors, step, rank) for rank in range(comm.size)]
            if step == 1:
                drawn[0][3][20] = torch.nan
                drawn[-1][1][1, 2, 3] = -torch.inf
            parts.give(tensors, drawn[comm.rank])
            report = made.run(step)
            sent: list[list[Any]] = []
            for rank, its in enumerate(drawn):
                for place, gradient in enumerate(its):
                    g = parts.flat(gradient)
                    fine = np.isfinite(g)
                    momenta[rank][place][fine] = (0.5 * momenta[rank][place] + 0.5 * g)[fine]
                bad = [place for place, g in enumerate(its) if not g.isfinite().all()]
                last = max(bad, default=-1)
                sent.append([m if place > last else None for place, m in enumerate(momenta[rank])])
            decisions, tied = ballots.vote(sent, sizes, step)
            for tensor, decision in zip(tensors, decisions, strict=True):
                ours = None if tensor.grad is None else parts.flat(tensor.grad).tolist()
                assert ours == (None if decision is None else decision.tolist()), step
            assert report.ties == tied
            assert report.voters == tuple(range(comm.size))


# ------------------------------------------------------------------------------------------- dropped and run again


@parts.each_method
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_round_that_was_dropped_leaves_no_trace(comm: MPI.Comm, name: str, exchange: str) -> None:
    method = method_here(comm, name)
    if exchange not in exchanges(method):
        pytest.skip(f"not by {exchange}")
    drops.check_that_drops_leave_no_trace(method, exchange, ONE_SEGMENT_A_BUCKET, (0.5,), advance=True)


@parts.each_method_that(lambda method: not method.exchanges_models)
def test_every_method_leaves_the_same_gradients_on_all_ranks(comm: MPI.Comm, name: str) -> None:
    method = method_here(comm, name)
    tensors = parts.parameters(*SHAPES)
    made = rounds.job(tensors, method, cap=ONE_SEGMENT_A_BUCKET)
    for step in range(2):
        parts.give(tensors, parts.draw_normal(tensors, step, comm.rank))
        report = made.run(step)
        assert report.voters == tuple(range(comm.size))
        everyones = comm.allgather([t.grad for t in tensors])
        assert all(parts.same(everyones[0], theirs) for theirs in everyones)
        costs = [exchange.bytes_sent for exchange in made.plan.exchanges]
        extra = 2 * (comm.size - 1) * 4 * sum(t.numel() for t in tensors) // comm.size
        assert report.bytes_sent - report.header_bytes == sum(costs) + extra * method.memory.needs_maximum
        told = sum(header.bytes_sent for header in made.plan.headers)
        assert report.header_bytes == (comm.size - 1) * (56 + 8 * method.elects) + told


def test_for_whole_vectors_a_missing_gradient_counts_as_zero(comm: MPI.Comm) -> None:
    """Whoever votes at all votes on everything; on what no rank has, nobody does."""
    tensors = parts.parameters((40,), (3,), (5,), dtypes=[torch.float64])
    drawn: list[list[Any]] = [parts.draw_normal(tensors, rank) for rank in range(comm.size)]
    for gradients in drawn:
        gradients[2] = None
    drawn[0][1] = None
    parts.give(tensors, drawn[comm.rank])
    rounds.job(tensors, mpisign.geometric_median(nu=0.1, steps=3, momentum=0.0)).run(0)
    rows = np.zeros((comm.size, 48))
    for row, gradients in zip(rows, drawn, strict=True):
        for place, span in enumerate((slice(0, 40), slice(40, 43), slice(43, 48))):
            if gradients[place] is not None:
                row[span] = parts.flat(gradients[place])
    expected = oracle.geometric_median(rows, 0.1, 3)
    np.testing.assert_allclose(parts.flat(tensors[0].grad), expected[:40], rtol=0, atol=1e-9)
    if comm.size > 1:
        np.testing.assert_allclose(parts.flat(tensors[1].grad), expected[40:43], rtol=0, atol=1e-9)
    else:
        assert tensors[1].grad is None
    assert tensors[2].grad is None


# ------------------------------------------------------------------------------------------------ order of calls


@dataclass(frozen=True)
class NotedBits(SignBits):
    log: list[str] = field(default_factory=list, repr=False, compare=False)

    def encode(self, values: torch.Tensor, message: torch.Tensor, context: StepContext, first_word: int) -> Any:
        self.log.append(f"encode {first_word}")
        return super().encode(values, message, context, first_word)


@dataclass(frozen=True)
class NotedVote(MajorityVote):
    log: list[str] = field(default_factory=list, repr=False, compare=False)

    def decide(self, messages: Any, out: torch.Tensor, context: StepContext, first_word: int) -> Any:
        self.log.append(f"decide for {context.voters}")
        return super().decide(messages, out, context, first_word)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_messages_leave_one_by_one_and_each_is_decided_when_it_and_its_header_are_here(
    comm: MPI.Comm, exchange: str
) -> None:
    """Also where the last rank abstains: its messages leave all the same, and are never counted."""
    log: list[str] = []
    tensors = parts.parameters((320,), (640,))
    method = parts.method_of(codec=NotedBits(log), rule=NotedVote(log))
    made = rounds.record(rounds.job(tensors, method, exchange=exchange, cap=ONE_SEGMENT_A_BUCKET), log)
    parts.give(tensors, parts.draw_normal(tensors, 0))
    absent = comm.size > 1 and comm.rank == comm.size - 1
    with rounds.waits_recorded(log):
        made.run(0, SCALER_INF if absent else VOTES)
    voters = tuple(range(comm.size - 1)) if comm.size > 1 else (0,)
    expected = ["wait: step 0, handshake"]
    for number, first_word in ((0, 0), (1, 20)):
        expected += [] if absent else [f"encode {first_word}"]
        expected += [f"push {number}", f"post {number}"]
    for number in (0, 1):
        expected += [f"wait: step 0, bucket {number}, header", f"wait: step 0, bucket {number}, phase 1"]
        expected += [f"go_on {number}", f"decide for {voters}"]
    for number in (0, 1):
        expected += [] if exchange == "allgather" else [f"wait: step 0, bucket {number}, phase 2", f"go_on {number}"]
    expected += ["wait: step 0, count of ties"]
    assert log == expected


# ---------------------------------------------------------------------------------------------- errors, and leaving


@parts.each_method
def test_ranks_at_different_steps_change_nothing(comm: MPI.Comm, name: str) -> None:
    method = method_here(comm, name, least=2)
    tensors, store = parts.parameters((40,), (3,)), rounds.store_for(method)
    made = rounds.job(tensors, method, store=store)
    for step in range(2):
        parts.give(tensors, parts.draw_normal(tensors, step, comm.rank))
        if step == 0:
            made.run(step)
    before = [value.clone() for t in tensors for value in (t.detach(), t.grad, *store.of(t).values())]
    with pytest.raises(ConsistencyError, match=rf"not at the same step: rank {comm.size - 1} at 7, the others at 1"):
        made.run(7 if comm.rank == comm.size - 1 else 1)
    after = [value for t in tensors for value in (t.detach(), t.grad, *store.of(t).values())]
    assert parts.same(before, after)
    assert made.run(1).voters == tuple(range(comm.size)), "and all can go on"


@parts.each_method_that(lambda method: not method.exchanges_models)
def test_a_rank_may_sit_out_while_the_others_vote(comm: MPI.Comm, name: str) -> None:
    method = method_here(comm, name, least=2)
    tensors = parts.parameters((40,), (3,))
    made = rounds.job(tensors, method)
    joined = comm.rank == 0
    for step in range(2):
        parts.give(tensors, [torch.full((40,), 7.0), None] if joined else parts.draw_normal(tensors, step, comm.rank))
        if joined:
            handshake, report = made.sit_out(step, step)
            assert handshake.joined_for == (step, *[None] * (comm.size - 1))
            assert (tensors[0].grad == 7.0).all()
            assert tensors[1].grad is None
        else:
            report = made.run(step)
        assert report.voters == tuple(range(1, comm.size))
        assert report.abstentions == {0: REASONS[JOINED]}
        assert not report.skipped


def test_where_one_rank_has_no_gradient_at_all_it_gets_the_others(comm: MPI.Comm) -> None:
    tensors = parts.parameters((40,), (3,))
    drawn = [parts.draw_normal(tensors, rank) for rank in range(comm.size)]
    parts.give(tensors, [None, None] if comm.rank == 0 else drawn[comm.rank])
    report = rounds.job(tensors).run(0)
    assert report.abstentions == {0: REASONS[NO_GRADIENT]}
    assert report.skipped == (comm.size == 1)
    everyones = comm.allgather([t.grad for t in tensors])
    assert all(parts.same(theirs, everyones[0]) for theirs in everyones)
    assert (tensors[0].grad is None) == (comm.size == 1)


def test_agreement_is_the_share_of_ones_own_votes(comm: MPI.Comm) -> None:
    tensors = parts.parameters((200,), (33,))
    drawn = [parts.draw(tensors, rank) for rank in range(comm.size)]
    parts.give(tensors, drawn[comm.rank])
    report = rounds.job(tensors, policy=Policy("abstain", "zero")).run(0)
    total = np.concatenate([sum(np.sign(parts.flat(its[place])) for its in drawn) for place in (0, 1)])
    shares = []
    for its in drawn:
        mine = np.sign(np.concatenate([parts.flat(g) for g in its]))
        both = (mine != 0) & (total != 0)
        shares.append(float((mine == np.sign(total))[both].mean()))
    assert report.agreement() == pytest.approx(shares)
