"""A group that is replaced between two steps: what depends on it is made anew, and all else goes on."""

from __future__ import annotations

import copy
import gc
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import oracle
import pytest
import torch
from methods_table import FOUR, TABLE, among, exchanges, walk_exchanges
from resumable import assert_equal

import mpisign
from mpisign import Method
from mpisign.rules import RecodedMean
from mpisign.session import current

from . import ballots
from .regroup import LEAVERS, part, watched
from .steps import EXCHANGES, SHAPES, assert_close, assert_same_everywhere, drawn, memories, model, step, wrap

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi(min_size=2)

WHO = pytest.mark.parametrize("leaver", LEAVERS.values(), ids=LEAVERS)


def who_stays(comm: MPI.Comm, leaver: int) -> list[int]:
    return [rank for rank in range(comm.size) if rank != leaver % comm.size]


# ------------------------------------------------------------------------------------------------ the group itself


@WHO
def test_the_new_group_has_new_numbers_and_old_identities(comm: MPI.Comm, leaver: int) -> None:
    mpisign.shutdown()
    mpisign.init(node_of=[rank // 2 for rank in range(comm.size)])
    stays = part([leaver])
    rest = who_stays(comm, leaver) if stays else [comm.rank]
    group = current().group
    assert (mpisign.rank(), mpisign.size()) == (rest.index(comm.rank), len(rest))
    assert (group.identities, group.identity, group.generation) == (tuple(rest), comm.rank, 1)
    assert mpisign.allgather_object(comm.rank) == rest
    if stays:
        beside = [rank for rank in rest if rank // 2 == comm.rank // 2]
        assert group.node.allgather(comm.rank) == beside
        assert (mpisign.local_rank(), mpisign.local_size()) == (beside.index(comm.rank), len(beside))


@pytest.mark.mpi(min_size=3)
def test_one_leaves_after_the_other(comm: MPI.Comm) -> None:
    left = list(range(comm.size))
    while len(left) > 1:
        if not part([0]):
            break
        left.pop(0)
        assert current().group.identities == tuple(left)
        assert current().group.generation == comm.size - len(left)
        assert mpisign.allgather_object(comm.rank) == left


@WHO
def test_all_functions_work_among_those_who_stay(comm: MPI.Comm, leaver: int, tmp_path: Path) -> None:
    stays = part([leaver])
    rest = who_stays(comm, leaver) if stays else [comm.rank]
    mpisign.barrier()
    assert mpisign.broadcast_object(comm.rank, root_rank=len(rest) - 1) == rest[-1]
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.fill_(comm.rank)
    if len(rest) > 1:
        with pytest.raises(mpisign.ConsistencyError, match=rf"this is rank {rest.index(comm.rank)}\)"):
            mpisign.check_consistency(layer)
    mpisign.broadcast_parameters(layer.state_dict())
    mpisign.check_consistency(layer)
    assert (layer.weight == rest[0]).all()
    mpisign.timeline(tmp_path / "trace.json")
    if len(rest) > 1:
        with pytest.raises(mpisign.ConsistencyError, match=r"ranks \[0\] are in barrier\(\)"):
            mpisign.barrier() if mpisign.rank() == 0 else mpisign.allgather_object(0)


def test_those_who_stay_leave_without_the_others(comm: MPI.Comm) -> None:
    """And the others without them; only when all have left may there be a job of all again."""
    stays = part([-1])
    for first in (True, False):
        if stays == first:
            mpisign.shutdown()
            assert not mpisign.is_initialized()
        comm.Barrier()


@pytest.mark.parametrize("join", [False, True], ids=["", "after join()"])
@pytest.mark.parametrize("name", ["signsgd", "sto_sign maximum", "double_squeeze", "centered_clipping", "ef21"])
def test_nothing_keeps_a_group(comm: MPI.Comm, name: str, join: bool, tmp_path: Path) -> None:
    folder = comm.bcast(tmp_path)
    network = torch.nn.Linear(40, 3)
    mpisign.broadcast_parameters(network.state_dict())
    sgd = torch.optim.SGD(network.parameters(), lr=0.1)
    optimizer = mpisign.DistributedSignOptimizer(sgd, network.named_parameters(), method=TABLE[name](comm.size))

    def train() -> None:
        network(torch.ones(2, 40)).square().mean().backward()
        optimizer.step()
        if join:
            optimizer.join()

    mpisign.stop_on_signal()
    train()
    mpisign.checkpoint.save(folder, model=network, optimizer=optimizer, step=1, asynchronous=True)
    mpisign.checkpoint.wait()
    former = watched()
    assert all(reference() is not None for reference in former)
    part([-1])
    train()
    gc.collect()
    assert [reference() for reference in former] == [None] * 4


# ----------------------------------------------------------------------------------------------------------- votes

DTYPES = [torch.float32, torch.float64]  # in which the sums below are exact
POLICIES = [("coin", "coin"), ("abstain", "zero"), ("positive", "positive"), ("abstain", "coin")]


def gradients(tensors: list[torch.nn.Parameter], at: int, identity: int) -> list[torch.Tensor]:
    """A fifth are zeros, and ties abound."""
    return ballots.draw(tensors, ballots.generator(at, identity))


@WHO
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(("zeros", "ties"), POLICIES)
@pytest.mark.parametrize("method", FOUR[:3], ids=lambda method: method.name)
def test_votes_go_on_by_each_ranks_own_coins_and_memory(
    comm: MPI.Comm, leaver: int, exchange: str, zeros: str, ties: str, method: Method
) -> None:
    """Bit for bit what NumPy makes of the identities' gradients, momenta and coins."""
    method = {"signum": mpisign.signum(0.5), "lion": mpisign.lion(0.5, 0.75)}.get(method.name, method)
    update = {
        "signsgd": lambda m, g: (g, m),
        "signum": lambda m, g: oracle.momentum(m, g, 0.5),
        "lion": lambda m, g: oracle.lion(m, g, 0.5, 0.75),
    }[method.name]
    tensors = ballots.parameters(*SHAPES, dtypes=DTYPES)
    optimizer = wrap(tensors, method, lr=1.0, exchange=exchange, zeros=zeros, ties=ties, seed=7)
    kept = [[np.zeros(t.numel()) for t in tensors] for _ in range(comm.size)]
    expected = [np.zeros(t.numel()) for t in tensors]
    members, tied = list(range(comm.size)), 0
    for at in range(5):
        if at == 2:
            members = who_stays(comm, leaver) if part([leaver]) else [comm.rank]
        step(optimizer, tensors, gradients(tensors, at, comm.rank))
        sent = []
        for who in members:
            drawn_by = [ballots.flat(g) for g in gradients(tensors, at, who)]
            both = [update(m, g) for m, g in zip(kept[who], drawn_by, strict=True)]
            sent.append([its for its, _ in both])
            kept[who] = [its for _, its in both]
        decisions, here = ballots.vote(
            sent, [t.numel() for t in tensors], at, zeros=zeros, ties=ties, seed=7, identities=members
        )
        expected = [total - decision for total, decision in zip(expected, decisions, strict=True)]
        assert (optimizer.report.ties, optimizer.report.voters) == (here, tuple(range(len(members))))
        tied += here
        for tensor, total in zip(tensors, expected, strict=True):
            assert np.array_equal(ballots.flat(tensor), total), at
    assert tied or mpisign.size() % 2, "ties shall have been tried"


@pytest.mark.mpi(min_size=3)
def test_coins_are_not_tossed_by_numbers(comm: MPI.Comm) -> None:
    """All gradients are zero, so that decisions are coins alone; a rank has the same coins, whoever leaves."""
    tensors = ballots.parameters((400,), dtypes=DTYPES)
    optimizer = wrap(tensors, mpisign.signsgd(), lr=1.0)
    part(range(comm.size - 1))  # each is alone now, and number 0
    step(optimizer, tensors, [torch.zeros(400)])
    (decision,), _ = ballots.vote([[np.zeros(400)]], [400], 0, identities=[comm.rank])
    assert np.array_equal(ballots.flat(tensors[0]), -decision)
    assert len({its.tobytes() for its in comm.allgather(ballots.flat(tensors[0]))}) == comm.size


# ------------------------------------------------------------------------------------------------------ all methods


@walk_exchanges()
def test_every_method_goes_on(comm: MPI.Comm, make: Callable[[int], Method], exchange: str) -> None:
    """Its memory is kept, replicas stay the same, and an optimizer that loads the state goes on alike, bit for bit."""
    method = make(comm.size - 1) if "shares" not in repr(make(comm.size)) else make(comm.size)
    if exchange not in exchanges(method):
        pytest.skip("not with so few ranks")
    tensors = model()
    optimizer = wrap(tensors, method, exchange=exchange)
    for at in range(3):
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
    before = copy.deepcopy(optimizer.state_dict()["mpisign"])
    stays = part([0])  # so that all numbers change
    state = copy.deepcopy(optimizer.state_dict())
    own = state["mpisign"]
    assert (own["rank"], own["size"], own["step"]) == (mpisign.rank(), mpisign.size(), 3)
    assert_equal(own["memory"], before["memory"])
    assert_equal(own["rates"], before["rates"])
    if not stays:
        return
    twins = [torch.nn.Parameter(t.detach().clone()) for t in tensors]
    twin = wrap(twins, method, exchange=exchange)
    twin.load_state_dict(state)
    for at in range(3, 5):
        for these, its in ((tensors, optimizer), (twins, twin)):
            step(its, these, drawn(these, at, comm.rank))
            assert its.report.voters == tuple(range(mpisign.size()))
    for ours, theirs in zip(tensors, twins, strict=True):
        assert torch.equal(ours, theirs)
    assert_equal(optimizer.state_dict()["mpisign"], twin.state_dict()["mpisign"])
    if not method.exchanges_models:
        assert_same_everywhere(current().group.comm, tensors)


@pytest.mark.parametrize("exchange", ["auto", *EXCHANGES])
@pytest.mark.parametrize("name", among(5, lambda method: isinstance(method.rule, RecodedMean)))
def test_what_shard_owners_keep_starts_anew_and_what_all_keep_stays(comm: MPI.Comm, name: str, exchange: str) -> None:
    """Else replicas would part where all decide what few had decided, each with another part of the error."""
    tensors = model()
    optimizer = wrap(tensors, TABLE[name](comm.size), exchange=exchange)
    for at in range(5):
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
    before = copy.deepcopy(optimizer.state_dict()["mpisign"]["pieces"])
    assert before or name == "one_bit_adam late", "nothing to be kept is no test"
    sharded = exchange == "two_phase" or (exchange == "auto" and comm.size > 2)
    if part([-1]):
        assert_equal(optimizer.state_dict()["mpisign"]["pieces"], {} if sharded else before)
        for at in range(5, 8):
            step(optimizer, tensors, drawn(tensors, at, comm.rank))
        assert optimizer.state_dict()["mpisign"]["pieces"] or mpisign.size() > 1
        assert_same_everywhere(current().group.comm, tensors)


def test_a_center_that_all_remember_stays(comm: MPI.Comm) -> None:
    tensors = model()
    optimizer = wrap(tensors, mpisign.centered_clipping(1.0))
    step(optimizer, tensors, drawn(tensors, 0, comm.rank))
    before = copy.deepcopy(optimizer.state_dict()["mpisign"]["pieces"])
    assert any(piece.any() for pieces in before.values() for piece in pieces.values())
    part([0])
    assert_equal(optimizer.state_dict()["mpisign"]["pieces"], before)


@WHO
@pytest.mark.parametrize("name", among(5, lambda method: bool(method.memory.summed)))
def test_averages_are_of_those_who_stay(comm: MPI.Comm, name: str, leaver: int) -> None:
    """EF21's average is the (weighted) sum of the ranks' estimates, also after one has left."""
    tensors = model(torch.float64)
    method = TABLE[name](comm.size)
    optimizer = wrap(tensors, method)
    for at in range(3):
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
    if not part([leaver]):
        return
    for at in range(3, 5):
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        weights = method.rule.shares or [1 / mpisign.size()] * comm.size
        mine = [weights[comm.rank] * estimate for estimate in memories(optimizer, "estimate")]
        sums = [np.sum(ranks, axis=0) for ranks in zip(*current().group.comm.allgather(mine), strict=True)]
        assert_close(memories(optimizer, "average"), sums)
        assert_same_everywhere(current().group.comm, tensors)


@pytest.mark.parametrize("weighted", [False, True], ids=["ef21", "ef21_w"])
def test_who_has_left_is_no_longer_heard(comm: MPI.Comm, weighted: bool) -> None:
    """By constant gradients EF21 comes to apply their mean over those who stay."""
    method = mpisign.ef21_w(range(1, comm.size + 1), ratio=0.5) if weighted else mpisign.ef21(0.5)
    tensors = ballots.parameters((64,), dtypes=[torch.float64])
    optimizer = wrap(tensors, method, lr=0.0)
    constant = [torch.full((64,), float(10**rank), dtype=torch.float64) for rank in range(comm.size)]
    stays = True
    for at in range(12):
        if at == 4:
            stays = part([0])
        step(optimizer, tensors, [constant[comm.rank]])
    if stays:
        assert_close([ballots.flat(tensors[0].grad)], [np.mean([c.numpy() for c in constant[1:]], axis=0)], 1e-3)


@pytest.mark.mpi(min_size=3)
def test_too_few_ranks_for_a_rule_are_an_error_on_all_that_stay(comm: MPI.Comm) -> None:
    """Before anything is sent, so that they can still save and leave together."""
    tensors = model()
    optimizer = wrap(tensors, mpisign.krum((comm.size - 3) // 2))
    step(optimizer, tensors, drawn(tensors, 0, comm.rank))
    leavers = range((comm.size - 3) % 2 + 1)
    stays = part(leavers)
    if stays:
        with pytest.raises(mpisign.OptionError, match=rf"krum .* needs .*has {mpisign.size()}"):
            step(optimizer, tensors, drawn(tensors, 1, comm.rank))
    mpisign.barrier()


# ------------------------------------------------------------------------------------------------- around the steps


@WHO
def test_agreement_is_of_the_group_that_voted(comm: MPI.Comm, leaver: int) -> None:
    tensors = model()
    optimizer = wrap(tensors, mpisign.signsgd())
    step(optimizer, tensors, drawn(tensors, 0, 0))
    assert optimizer.report.agreement() == [1.0] * comm.size
    part([leaver])
    with pytest.raises(mpisign.MpisignError, match=r"the group that voted in step 0 is no more .*: ask for agreement"):
        optimizer.report.agreement()
    step(optimizer, tensors, drawn(tensors, 1, 0))
    assert optimizer.report.agreement() == [1.0] * mpisign.size()


@WHO
def test_notices_travel_among_those_who_stay(comm: MPI.Comm, leaver: int) -> None:
    tensors = model()
    optimizer = wrap(tensors, mpisign.signsgd())
    mpisign.stop_on_signal()
    step(optimizer, tensors, drawn(tensors, 0, comm.rank))
    stays = part([leaver])
    if not stays:
        signal.raise_signal(signal.SIGUSR1)
    step(optimizer, tensors, drawn(tensors, 1, comm.rank))
    assert mpisign.stop_requested() == (not stays)
    if stays and mpisign.rank() == mpisign.size() - 1:
        signal.raise_signal(signal.SIGUSR1)
    step(optimizer, tensors, drawn(tensors, 2, comm.rank))
    assert mpisign.stop_requested()


@WHO
def test_a_wish_to_stop_outlives_who_has_left(comm: MPI.Comm, leaver: int) -> None:
    mpisign.stop_on_signal()
    if comm.rank == leaver % comm.size:
        signal.raise_signal(signal.SIGUSR1)
    mpisign.barrier()
    part([leaver])
    assert mpisign.stop_requested()


@pytest.mark.mpi(min_size=3)
def test_ranks_out_of_batches_wait_for_those_who_stay(comm: MPI.Comm) -> None:
    tensors = model()
    optimizer = wrap(tensors, mpisign.signsgd())
    stays = part([1])
    for at in range(3 if not stays or mpisign.rank() == 1 else 1):
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
    assert optimizer.join() == (1 if stays else 0)
    if stays:
        assert_same_everywhere(current().group.comm, tensors)


def test_optimizers_made_before_and_after_are_told_apart(comm: MPI.Comm) -> None:
    made: list[Any] = [wrap(model(), mpisign.signsgd())]
    part([0])
    made.append(wrap(model(), mpisign.signsgd()))
    for optimizer in made:
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        step(optimizer, tensors, drawn(tensors, 0, comm.rank))
    if mpisign.size() > 1:
        which = made[mpisign.rank() % 2]
        tensors = [p for group in which.param_groups for p in group["params"]]
        with pytest.raises(mpisign.ConsistencyError, match=r"optimizer \d of the job"):
            step(which, tensors, drawn(tensors, 1, comm.rank))
