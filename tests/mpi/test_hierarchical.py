"""mpisign.exchange.hierarchical on real ranks, on nodes of every kind: the flat exchanges' bits, and the oracle's."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import oracle
import pytest
import torch
from gpu_branch import gpu_branch, needs_compiler
from methods_table import among

import mpisign
from mpisign import cuts
from mpisign.rules import TallyRule

from . import ballots
from .on_nodes import EXCHANGES, SHAPES, Gradients, assert_same, for_kinds, nodes, rounds, take, train, wrap

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi
pytest_generate_tests = for_kinds

POLICIES = [(zeros, ties) for zeros in ("rows", "coin", "abstain", "positive") for ties in ("coin", "zero", "positive")]

coins = functools.cache(ballots.coins)


# --------------------------------------------------------------------------------------------- the oracle's bits


def ballots_of(updates: Sequence[ballots.Floats | None], place: int, step: int, zeros: str, told: bool) -> list[Any]:
    """By rank, what it votes on a parameter, or None: rows of zeros abstain where they are told."""
    start, size = first_word(place), int(np.prod(SHAPES[place]))
    found: list[Any] = []
    for rank, mine in enumerate(updates):
        if mine is None:
            found.append(None)
            continue
        tossed = coins(5, step, oracle.zeros_stream(rank), start, size)
        ballot = oracle.ballot(mine, "coin" if zeros == "rows" else zeros, tossed)
        found.append(np.where(oracle.zero_rows(mine, SHAPES[place]) & told, 0, ballot).astype(np.int8))
    return found


def oracles(everyones: Sequence[Sequence[Gradients]], zeros: str, ties: str) -> list[tuple[list[Any], int]]:
    """By step, the decisions, None where nobody votes, and the ties. ``everyones[rank][step][place]``."""
    found, told = [], set[int]()
    for step in range(len(everyones[0])):
        decisions: list[Any] = []
        tied = 0
        for place, shape in enumerate(SHAPES):
            given = [mine[step][place] for mine in everyones]
            updates = [None if g is None else ballots.flat(g) for g in given]
            cast = [b for b in ballots_of(updates, place, step, zeros, place in told) if b is not None]
            tossed = coins(5, step, oracle.TIES, first_word(place), int(np.prod(shape)))
            decision, here = oracle.majority(cast, ties, tossed) if cast else (None, 0)
            decisions.append(decision)
            tied += here
        for place, shape in enumerate(SHAPES):
            given = [mine[step][place] for mine in everyones]
            if zeros == "rows" and any(g is not None and oracle.zero_rows(ballots.flat(g), shape).any() for g in given):
                told.add(place)
        found.append((decisions, tied))
    return found


def first_word(place: int) -> int:
    return oracle.first_words([int(np.prod(shape)) for shape in SHAPES])[place]


def assert_oracles(seen: Sequence[Any], expected: Sequence[tuple[list[Any], int]]) -> None:
    for step, ((decisions, _, report, _), (oracles_decisions, tied)) in enumerate(zip(seen, expected, strict=True)):
        for place, decision in enumerate(oracles_decisions):
            if decision is not None:
                assert decisions[place] == str(decision.astype(float).tolist()), (step, place)
        assert report[3] == tied, step


@pytest.mark.parametrize(("zeros", "ties"), POLICIES)
def test_every_policy_decides_the_oracles_bits(comm: MPI.Comm, zeros: str, ties: str, kind: str) -> None:
    """Zeros, ties, rows that are told from the second step on, and parameters on which not everybody votes."""
    with nodes(kind, comm):
        steps = rounds(comm.rank)
        seen = assert_same(steps, zeros=zeros, ties=ties, seed=5)
        assert_oracles(seen, oracles(comm.allgather(steps), zeros, ties))
        assert len({str(decisions) for decisions in comm.allgather([its[0] for its in seen])}) == 1


@pytest.mark.parametrize("zeros", ["coin", "abstain"])
def test_a_mean_of_signs_is_the_oracles(comm: MPI.Comm, zeros: str, kind: str) -> None:
    with nodes(kind, comm):
        steps = rounds(comm.rank, missing=False)
        seen = assert_same(steps, method=mpisign.lion(0.5, 0.5, vote=False), zeros=zeros, seed=5)
        kept = [[np.zeros(int(np.prod(shape))) for shape in SHAPES] for _ in range(comm.size)]
        for step, everyones in enumerate(zip(*comm.allgather(steps), strict=True)):
            for place, dtype in enumerate(t.dtype for t in ballots.parameters(*SHAPES)):
                sent = []
                for rank, mine in enumerate(everyones):
                    update, kept[rank][place] = oracle.lion(kept[rank][place], ballots.flat(mine[place]), 0.5, 0.5)
                    sent.append(update)
                cast = ballots_of(sent, place, step, zeros, told=False)
                mean = torch.from_numpy(np.sum(cast, axis=0, dtype=np.float64) / comm.size)
                decided = torch.tensor(json.loads(seen[step][0][place]), dtype=torch.float64)
                torch.testing.assert_close(decided, mean, rtol=0, atol=2e-3 if dtype.itemsize == 2 else 1e-7)


def repeats(method: mpisign.Method) -> bool:
    """Whether its noise is the same when it is run again."""
    return not getattr(method.memory, "private", False)


COUNTING = among(1, lambda method: isinstance(method.rule, TallyRule) and repeats(method))


def test_the_methods_that_count_are_these() -> None:
    assert {"signsgd", "signum", "lion", "lion mean", "ternary_vote", "sparsign"} <= set(COUNTING)


@pytest.mark.parametrize("name", COUNTING)
def test_every_method_that_counts(comm: MPI.Comm, name: str, few_kinds: str) -> None:
    """With a memory, noise, trits; ballots that end at a NaN, on every rank elsewhere."""
    with nodes(few_kinds, comm):
        steps, places = rounds(comm.rank), (7, 1, 6, 0, 2)
        steps[1] = rounds(comm.rank, 2, missing=False)[1]
        spoilt = steps[1][places[comm.rank % 5]]
        assert spoilt is not None
        spoilt.view(-1)[-1] = float("nan")
        seen = assert_same(steps, method=COUNTING[name])
        if not COUNTING[name].memory.needs_all:
            assert dict(seen[1][2][2]) == {rank: f"p{places[rank % 5]}" for rank in range(comm.size)}


# ------------------------------------------------------------------------------------------------- abstentions


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_ballot_ends_where_the_oracle_ends_it(comm: MPI.Comm, kind: str, value: str) -> None:
    """The wire's order is from the last parameter to the first; what was encoded before the bad value counts."""
    with nodes(kind, comm):
        steps = [rounds(comm.rank, 1, missing=False)[0] for _ in range(2)]
        place = 6 - comm.rank % 4
        if comm.rank:
            spoilt = steps[1][place]
            assert spoilt is not None
            if spoilt.numel():
                spoilt.view(-1)[0] = float(value)
        seen = assert_same(steps, zeros="coin", seed=5)
        for rank, its in enumerate(everyones := comm.allgather(steps)):
            at = 6 - rank % 4
            if rank and its[1][at].numel():
                its[1][: at + 1] = [None] * (at + 1)
        assert_oracles(seen, oracles(everyones, "coin", "coin"))


def test_ranks_without_any_gradient_and_steps_without_any_voter(comm: MPI.Comm, kind: str) -> None:
    """Whole nodes abstain, one after the other; then everybody; and then all vote again."""
    with nodes(kind, comm) as node_of:
        number = max(node_of) + 1
        nothing: Gradients = [None] * len(SHAPES)
        votes = [node_of[comm.rank] != node for node in range(number)] + [False, True]
        drawn = rounds(comm.rank, len(votes), missing=False)
        steps = [gradients if vote else nothing for gradients, vote in zip(drawn, votes, strict=True)]
        seen = assert_same(steps, zeros="coin", seed=5)
        for node in range(number):
            assert seen[node][2][0] == tuple(rank for rank, its in enumerate(node_of) if its != node)
        assert seen[-2][2][4]
        assert_oracles(seen, oracles(comm.allgather(steps), "coin", "coin"))


def test_a_loss_scale_that_overflows(comm: MPI.Comm, kind: str) -> None:
    """The last rank's scaler has found an infinity, and the others have voted without it."""
    with nodes(kind, comm):
        ends = []
        for exchange in EXCHANGES:
            tensors = ballots.parameters((100,), (5, 7), dtypes=[torch.float32])
            optimizer = wrap(tensors, exchange=exchange)
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            scaler.scale(torch.zeros(()))
            for step in range(3):
                for tensor, drawn in zip(
                    tensors, ballots.draw(tensors, ballots.generator(step, comm.rank)), strict=True
                ):
                    tensor.grad = 4.0 * drawn
                if step == 1 and comm.rank == comm.size - 1:
                    assert tensors[0].grad is not None
                    tensors[0].grad[3] = float("inf")
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            ends.append(([ballots.flat(t).tolist() for t in tensors], optimizer.report.voters))
        assert ends[0] == ends[1] == ends[2]


def test_ranks_that_have_joined(comm: MPI.Comm, kind: str) -> None:
    """Rank r has r + 1 batches; who is done goes on counting, and deciding, for the others."""
    with nodes(kind, comm):
        ends = []
        for exchange in EXCHANGES:
            tensors = ballots.parameters(*SHAPES)
            optimizer = wrap(tensors, method=mpisign.signum(0.5), exchange=exchange)
            for gradients in rounds(comm.rank, comm.rank + 1):
                take_quietly(optimizer, tensors, gradients)
            optimizer.join()
            ends.append([ballots.flat(t).tolist() for t in tensors])
        assert ends[0] == ends[1] == ends[2]
        assert all(its == ends[0] for its in comm.allgather(ends[0]))


def take_quietly(
    optimizer: mpisign.DistributedSignOptimizer, tensors: Sequence[torch.Tensor], gradients: Gradients
) -> None:
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient
    optimizer.step()


# --------------------------------------------------------------------------------------------- cost, and steps


@pytest.mark.parametrize(
    ("method", "zeros", "up", "down"),
    [
        (mpisign.signsgd(), "coin", 1, lambda ranks: 1),
        (mpisign.signsgd(), "abstain", 2, lambda ranks: 2),
        (mpisign.ternary_vote(4.0, 5.0), "coin", 2, lambda ranks: 2),
        (mpisign.lion(vote=False), "coin", 1, lambda ranks: int(np.ceil(np.log2(ranks + 1)))),
    ],
    ids=["signs", "two planes", "trits", "mean of signs"],
)
def test_bytes_out_of_a_nodes_card_are_the_formula(
    comm: MPI.Comm, method: mpisign.Method, zeros: str, up: int, down: Callable[[int], int], kind: str
) -> None:
    """``(N - 1)/N (ceil(log2(G + 1)) + 1) d/8`` of signs; header and handshake are of each rank."""
    with nodes(kind, comm) as node_of:
        number, lanes = len(set(node_of)), min(map(node_of.count, node_of))
        elements = 32 * 8 * number * lanes
        (tensor,) = ballots.parameters((elements,), dtypes=[torch.float32])
        tensor.grad = torch.ones(elements)
        optimizer = wrap([tensor], method=method, zeros=zeros, exchange="hierarchical", bucket_cap_mb=1.0)
        optimizer.synchronize()
        report = optimizer.report
        sent = comm.allgather(report.bytes_sent - report.header_bytes)
        counts = up * int(np.ceil(np.log2(max(map(node_of.count, node_of)) + 1)))
        by_card = (number - 1) * elements // 8 // number * (counts + down(comm.size))
        for node in set(node_of):
            assert sum(its for its, at in zip(sent, node_of, strict=True) if at == node) == by_card
        others = comm.size - 1
        assert report.header_bytes == others * (7 * 8 + 6 + (8 if method.rule.elects else 0))


@pytest.mark.parametrize("words", [1, 2, 7, 13])
def test_slices_and_shards_may_be_empty(comm: MPI.Comm, kind: str, words: int) -> None:
    with nodes(kind, comm):
        (tensor,) = ballots.parameters((32 * words - 5,))
        (drawn,) = ballots.draw([tensor], ballots.generator(words, comm.rank))
        for zeros in ("coin", "abstain"):
            tensor.grad = drawn.clone()
            optimizer = wrap([tensor], zeros=zeros, exchange="hierarchical")
            optimizer.synchronize()
            (decision,), tied = ballots.vote(ballots.gathered(comm, [drawn]), [tensor.numel()], 0, zeros=zeros)
            assert ballots.flat(tensor.grad).tolist() == decision.tolist()
            assert optimizer.report.ties == tied


def test_messages_are_cut_where_mpi_counts_no_further(
    comm: MPI.Comm, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuts, "LIMIT_BYTES", 24)
    with nodes(kind, comm):
        for zeros, method in (("coin", mpisign.signsgd()), ("abstain", mpisign.lion(vote=False))):
            assert_same(rounds(comm.rank, 2), method=method, zeros=zeros, bucket_cap_mb=1.0)


def test_two_optimizers_in_turn(comm: MPI.Comm, kind: str) -> None:
    """Each has its own part of the node's memory: the decision of one is there after a step of the other."""
    with nodes(kind, comm):
        steps, others = rounds(comm.rank, 4), rounds(comm.rank + 100, 4)
        options: list[dict[str, Any]] = [{"zeros": "coin"}, {"zeros": "abstain", "ties": "zero"}]
        apart = [train(its, "allgather", **option) for its, option in zip((steps, others), options, strict=True)]
        models = [ballots.parameters(*SHAPES) for _ in options]
        wrapped = [wrap(its, exchange="hierarchical", **one) for its, one in zip(models, options, strict=True)]
        for step in range(4):
            for number in (0, 1) if step % 2 else (1, 0):
                gradients = (steps, others)[number][step]
                assert take(wrapped[number], models[number], gradients) == apart[number][step], (number, step)
            if step:
                before = wrapped[step % 2].report
                assert str(before.agreement()) == apart[step % 2][step][3]


def test_a_plan_is_made_anew_in_the_middle(comm: MPI.Comm, kind: str) -> None:
    """Parameters are frozen and unfrozen; each time the node shares other memory."""
    with nodes(kind, comm):
        steps, seen = rounds(comm.rank, 5), []
        for exchange in EXCHANGES:
            tensors = ballots.parameters(*SHAPES)
            optimizer = wrap(tensors, exchange=exchange)
            its = []
            for step, gradients in enumerate(steps):
                tensors[2].requires_grad_(step % 2 == 0)
                tensors[5].requires_grad_(step != 3)
                mine = [g if t.requires_grad else None for g, t in zip(gradients, tensors, strict=True)]
                its.append(take(optimizer, tensors, mine))
            seen.append(its)
        assert seen[0] == seen[1] == seen[2]


def test_one_rank_makes_its_plan_anew(comm: MPI.Comm, kind: str) -> None:
    """The last rank forgets its plan, as after loading a state: all share memory again."""
    with nodes(kind, comm):
        steps, seen = rounds(comm.rank, 4), []
        for exchange in EXCHANGES:
            tensors = ballots.parameters(*SHAPES)
            optimizer = wrap(tensors, exchange=exchange)
            its = []
            for step, gradients in enumerate(steps):
                if step == 2 and comm.rank == comm.size - 1:
                    optimizer._drop_plan()
                its.append(take(optimizer, tensors, gradients))
            seen.append(its)
        assert seen[0] == seen[1] == seen[2]


@needs_compiler
@pytest.mark.parametrize("zeros", ["rows", "abstain"])
def test_ballots_that_come_from_a_gpu(comm: MPI.Comm, few_kinds: str, zeros: str) -> None:
    """From all ranks, and from every other one. Through the shim, which has one memory, kernels count them as well."""
    with nodes(few_kinds, comm):
        steps = rounds(comm.rank)
        for method in (mpisign.signum(0.5), mpisign.lion(vote=False)):
            host = train(steps, "hierarchical", method=method, zeros=zeros)
            for gpu in (True, comm.rank % 2 == 1):
                with gpu_branch(gpu):
                    assert train(steps, "hierarchical", method=method, zeros=zeros) == host
