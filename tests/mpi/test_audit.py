"""mpisign.exchange.audit on real ranks: who lies is named, and who does not, never."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import mpisign
from mpisign.exchange.audit import Audit, Block
from mpisign.exchange.decider import Deciding

from . import ballots
from .on_nodes import SHAPES, for_kinds, nodes, rounds, take, wrap

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi(min_size=2)
pytest_generate_tests = for_kinds

LARGE = ((64, 3000), (70_000,))  # several blocks in each shard
BOTH = pytest.mark.parametrize("exchange", ["two_phase", "hierarchical"])
VOTES = ("signsgd", "signum", "lion", "ternary_vote")


def large(comm: MPI.Comm, **options: Any) -> tuple[Any, list[Any]]:
    tensors = ballots.parameters(*LARGE)
    return wrap(tensors, audit=3, bucket_cap_mb=1.0, **options), tensors


def steps(comm: MPI.Comm, made: tuple[Any, list[Any]], count: int) -> tuple[str, int]:
    """Step until somebody is accused; what was said, the same on all ranks but for who says it, and after how many."""
    optimizer, tensors = made
    for step in range(count):
        before = [tensor.detach().clone() for tensor in tensors]
        gradients = ballots.draw(tensors, ballots.generator(step, comm.rank))
        caught: mpisign.AuditError | None = None
        try:
            take(optimizer, tensors, list(gradients))
        except mpisign.AuditError as error:
            caught = error
        if caught is not None:
            here = f"this is rank {comm.rank}"
            assert here in str(caught)
            said = str(caught).replace(here, "")
            assert len(set(comm.allgather((said, caught.ranks)))) == 1
            assert all(map(torch.equal, before, tensors)), "nothing of the step is applied"
            return said, step
    return "", count


@contextmanager
def instead(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    usual = getattr(owner, name)
    setattr(owner, name, make(usual))
    try:
        yield
    finally:
        setattr(owner, name, usual)


def falsified(share: float, every: int) -> Callable[[Any], Any]:
    """Decisions of which one in so many blocks has some words the other way round."""

    def make(usual: Any) -> Any:
        def decide(self: Deciding, *args: Any, **kwargs: Any) -> None:
            usual(self, *args, **kwargs)
            out = next(its for its in args if isinstance(its, torch.Tensor) and its.dim() == 2)
            blocks = out[0].numpy().view(np.uint32)
            for at in range(0, blocks.size, 1024 * every):
                blocks[at : at + max(1, int(1024 * share))] ^= 0xFFFF

        return decide

    return make


# ------------------------------------------------------------------------------------------------- honest jobs


@BOTH
@pytest.mark.parametrize("name", VOTES)
def test_an_honest_job_accuses_nobody_and_votes_as_always(
    comm: MPI.Comm, few_kinds: str, name: str, exchange: str
) -> None:
    """With abstentions, zeros, rows of zeros, ties and missing gradients, on nodes of every kind."""
    with nodes(few_kinds, comm):
        method = getattr(mpisign, name)()
        seen = []
        for audit in (0, 2):
            tensors = ballots.parameters(*SHAPES)
            optimizer = wrap(tensors, method=method, exchange=exchange, audit=audit)
            seen.append([take(optimizer, tensors, gradients) for gradients in rounds(comm.rank)])
    assert seen[0] == seen[1]


def test_with_overlap_and_local_steps(comm: MPI.Comm) -> None:
    model = torch.nn.Linear(40, 30)
    mpisign.broadcast_parameters(model.state_dict(), root_rank=0)
    for options in ({"overlap": True}, {"every": 2, "method": mpisign.signsgd(), "outer": sgd}):
        optimizer = mpisign.DistributedSignOptimizer(
            sgd(model.parameters()), model.named_parameters(), exchange="two_phase", audit=1, **options
        )
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(2, 40)).sum().backward()
            optimizer.step()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def test_bytes_are_counted(comm: MPI.Comm) -> None:
    sent = []
    for audit in (0, 3):
        tensors = ballots.parameters((64, 3000))
        optimizer = wrap(tensors, exchange="two_phase", audit=audit, bucket_cap_mb=1.0)
        take(optimizer, tensors, list(ballots.draw(tensors, ballots.generator(comm.rank))))
        sent.append(optimizer.report.bytes_sent)
    words = optimizer._plan.layout.buckets[0].length
    ballot = 4 * min(1024, -(-words // comm.size))
    assert sent[1] - sent[0] == (comm.size - 1) * (8 * (3 + 1) + 3 * ballot)


# ------------------------------------------------------------------------------------------------- liars


@BOTH
def test_an_owner_that_publishes_another_decision_is_named(comm: MPI.Comm, exchange: str) -> None:
    """In a tenth of each block: as soon as somebody draws one of its blocks."""
    liar = 0
    made = large(comm, exchange=exchange)
    lying = falsified(0.1, 1)
    with instead(Deciding, "decide", lying if comm.rank == liar else lambda usual: usual):
        said, _ = steps(comm, made, 40)
    assert f"rank {liar} has published another decision than the votes say" in said


@pytest.mark.mpi(min_size=2)
def test_ranks_of_a_lane_are_named_together(comm: MPI.Comm) -> None:
    """A rank that counts wrong for another is one of those who count together."""
    mpisign.shutdown()
    mpisign.init(node_of=range(comm.size), stall_timeout=60.0)
    made = large(comm, exchange="hierarchical")

    def make(usual: Any) -> Any:
        def tally(self: Deciding, ranks: Any, slices: Any, out: torch.Tensor, start: int) -> None:
            usual(self, ranks, slices, out, start)
            out.view(-1).numpy().view(np.uint32)[:] ^= 0xFFFFFFFF

        return tally

    with instead(Deciding, "tally", make if comm.rank == comm.size - 1 else lambda usual: usual):
        said, _ = steps(comm, made, 40)
    assert f"one of ranks {list(range(comm.size))}, which count together, has published another decision" in said


def test_an_owner_that_tells_ranks_different_decisions(comm: MPI.Comm) -> None:
    made = large(comm, exchange="two_phase")

    def make(usual: Any) -> Any:
        def recount(self: Audit, *args: Any) -> Any:
            if comm.rank == comm.size - 1:  # what rank 0 has told this one
                exchange = self.blocks[0].exchange
                exchange.decision[0, : exchange.shard] ^= 1
            return usual(self, *args)

        return recount

    with instead(Audit, "recount", make):
        said, _ = steps(comm, made, 40)
    assert f"rank 0 has told ranks [{comm.size - 1}] another decision than the others" in said


def test_a_voter_that_gives_the_owner_another_ballot_than_all_others(comm: MPI.Comm) -> None:
    """It would make the owner seem to lie, which shows what it has counted."""
    made = large(comm, exchange="two_phase")

    def make(usual: Any) -> Any:
        def recount(self: Audit, *args: Any) -> Any:
            if comm.rank == comm.size - 1:  # long after the ballots have left
                exchange = self.blocks[0].exchange
                exchange.message[:, : exchange.shard] ^= 1
            return usual(self, *args)

        return recount

    with instead(Audit, "recount", make):
        said, _ = steps(comm, made, 40)
    assert f"ranks [{comm.size - 1}] have given rank 0 another ballot to count than they show now" in said


def test_a_voter_that_tells_auditors_another_ballot_than_the_owner(comm: MPI.Comm) -> None:
    """And all others what it has sent: those who ask it in private would seem to lie."""
    made = large(comm, exchange="two_phase")
    liar, asked = comm.size - 1, 3 * comm.size

    def make(usual: Any) -> Any:
        count = 0

        def answer(self: Audit, block: Any, into: Any) -> None:
            nonlocal count
            usual(self, block, into)
            into[:64] ^= count < asked
            count += 1

        return answer

    with instead(Audit, "_answer", make if comm.rank == liar else lambda usual: usual):
        said, step = steps(comm, made, 40)
    assert step == 0
    assert f"ranks [{liar}] have given rank " in said
    assert "another ballot than they show now" in said


def test_an_owner_that_says_it_has_counted_other_ballots(comm: MPI.Comm) -> None:
    """It is named with whom it accuses, as nobody else has seen what was sent."""
    made = large(comm, exchange="two_phase")

    def make(usual: Any) -> Any:
        def held(self: Any) -> Any:
            return [(voter, its ^ 1 if voter == 1 else its) for voter, its in usual(self)]

        return held

    lying = falsified(0.1, 1)
    with (
        instead(Deciding, "decide", lying if comm.rank == 0 else lambda usual: usual),
        instead(Block, "held", make if comm.rank == 0 else lambda usual: usual),
    ):
        said, _ = steps(comm, made, 40)
    assert "ranks [1] have given rank 0 another ballot to count than they show now" in said
    assert "or rank 0 says so falsely" in said


@pytest.mark.parametrize("possible", [True, False])
def test_who_accuses_falsely(comm: MPI.Comm, possible: bool) -> None:
    accuser = comm.size - 1
    made = large(comm, exchange="two_phase")

    def make_recount(usual: Any) -> Any:
        def recount(self: Audit, *args: Any) -> Any:
            self._others = self._others if possible else [10**6]
            return usual(self, *args)

        return recount

    def make_right(usual: Any) -> Any:
        def is_right(self: Audit, number: int, ballots: Any, said: Any, *decided: Any) -> bool:
            return bool(decided) and usual(self, number, ballots, said, *decided)  # in public it says what is true

        return is_right

    its = (lambda make: make) if comm.rank == accuser else (lambda make: lambda usual: usual)
    with instead(Audit, "recount", its(make_recount)), instead(Audit, "_is_right", its(make_right)):
        said, step = steps(comm, made, 40)
    assert step == 0
    assert f"rank {accuser} accuses " + ("rank " if possible else "in a way that cannot be") in said
    assert ("falsely, of items " in said) == possible


@pytest.mark.few
def test_a_tenth_of_the_blocks_is_found_within_20_steps(comm: MPI.Comm) -> None:
    """With a probability above 0.99 each time: that two of eight jobs pass unseen happens once in 500 such tests."""
    found = 0
    for _ in range(8):
        tensors = ballots.parameters((10 * 1024 * 32 * comm.size,))
        optimizer = wrap(tensors, audit=3, exchange="two_phase", bucket_cap_mb=4.0)
        with instead(Deciding, "decide", falsified(0.01, 10) if comm.rank == 0 else lambda usual: usual):
            for _ in range(20):
                tensors[0].grad = torch.ones_like(tensors[0])
                try:
                    optimizer.step()
                except mpisign.AuditError:
                    found += 1
                    break
    assert found >= 7


# ------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("audit", [-1, 1.5, True, "2"])
def test_blocks_are_a_number(comm: MPI.Comm, audit: Any) -> None:
    with pytest.raises(mpisign.OptionError, match="audit="):
        wrap(ballots.parameters((5,)), audit=audit)


def test_what_counts_no_votes_is_refused(comm: MPI.Comm) -> None:
    with pytest.raises(mpisign.OptionError, match=r"audit=2 recounts votes, and the rule .* counts none"):
        wrap(ballots.parameters((5,)), audit=2, method=mpisign.mean())


def test_ranks_that_audit_differently(comm: MPI.Comm) -> None:
    tensors = ballots.parameters((5,))
    optimizer = wrap(tensors, audit=1 + comm.rank)
    with pytest.raises(mpisign.ConsistencyError, match="audit 1"):
        take(optimizer, tensors, [torch.ones(5)])
