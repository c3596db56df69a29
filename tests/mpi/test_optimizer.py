"""mpisign.optimizer on real ranks: replicas stay equal, methods do what the papers say, bad input has a name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import oracle
import pytest
import torch

import mpisign

from . import ballots

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi

EXCHANGES = ("allgather", "two_phase", "auto")
SHAPES = ((7, 5), (33,), (4, 9), (), (0,), (64,))
NAN, INF = float("nan"), float("inf")

Wrapped = mpisign.DistributedSignOptimizer


def wrap(tensors: Sequence[torch.Tensor], lr: float = 1.0, **options: Any) -> Wrapped:
    options.setdefault("method", mpisign.signsgd())
    return Wrapped(torch.optim.SGD(tensors, lr=lr), ballots.named(tensors), **options)


def give(tensors: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = None if gradient is None else gradient.clone()


def sizes_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [t.numel() for t in tensors]


def grads_of(tensors: Sequence[torch.Tensor]) -> list[list[float] | None]:
    return [None if t.grad is None else ballots.flat(t.grad).tolist() for t in tensors]


def lists(decisions: Sequence[oracle.Ballot | None]) -> list[list[int] | None]:
    return [None if d is None else d.tolist() for d in decisions]


def snapshot(tensors: Sequence[torch.Tensor]) -> bytes:
    return b"".join(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)


def assert_equal_on_all_ranks(comm: MPI.Comm, tensors: Sequence[torch.Tensor]) -> None:
    assert len(set(comm.allgather(snapshot(tensors)))) == 1


# ------------------------------------------------------------------------------------------- replicas stay equal


def train_on_rough_ground(comm: MPI.Comm, steps: int, **options: Any) -> list[torch.nn.Parameter]:
    """Every rank pulls elsewhere and has coordinates it knows nothing of; gradients are missing or NaN now and then."""
    tensors = ballots.parameters(*SHAPES)
    optimizer = wrap(tensors, lr=0.01, method=mpisign.signum(0.9), **options)
    random = ballots.generator(comm.rank)
    targets = [torch.randn(t.shape, generator=random).to(t.dtype) for t in tensors]
    known = [torch.rand(t.shape, generator=random) < 0.7 for t in tensors]
    for step in range(steps):
        optimizer.zero_grad()
        losses = [
            ((t - target) * k).double().square().sum() for t, target, k in zip(tensors, targets, known, strict=True)
        ]
        absent = 1 + (step + comm.rank) % (len(losses) - 1)
        sum(loss for i, loss in enumerate(losses) if i != absent).backward()
        if step % 20 == comm.rank:
            tensors[0].grad[0, 0] = NAN
        optimizer.step()
    return tensors


@pytest.mark.parametrize("ties", ["coin", "zero", "positive"])
@pytest.mark.parametrize("zeros", ["coin", "abstain", "positive"])
def test_parameters_are_bit_identical_after_200_steps(comm: MPI.Comm, zeros: str, ties: str) -> None:
    """On all ranks, and whichever way the votes went ("auto" takes one of the two)."""
    ends = set()
    for exchange in ("allgather", "two_phase"):
        tensors = train_on_rough_ground(comm, 200, zeros=zeros, ties=ties, exchange=exchange)
        assert all(t.abs().max() > 0.05 for t in tensors if t.numel() > 1)
        ends.update(comm.allgather(snapshot(tensors)))
    assert len(ends) == 1


# ------------------------------------------------------------------------------------------- methods, by their papers


def test_signsgd(comm: MPI.Comm) -> None:
    check_method(comm, mpisign.signsgd(), lambda m, g: (g, m))


def test_signum(comm: MPI.Comm) -> None:
    check_method(comm, mpisign.signum(0.5), lambda m, g: oracle.momentum(m, g, 0.5))


def test_lion(comm: MPI.Comm) -> None:
    check_method(comm, mpisign.lion(0.5, 0.75), lambda m, g: oracle.lion(m, g, 0.5, 0.75))


def check_method(
    comm: MPI.Comm, method: mpisign.Method, remember: Callable[[Any, Any], tuple[Any, Any]], steps: int = 6
) -> None:
    """Small integers and decays that are powers of two: no arithmetic rounds, so that every sign must agree."""
    tensors = ballots.parameters(*SHAPES)
    optimizer = wrap(tensors, lr=0.25, method=method, seed=11)
    random = ballots.generator(comm.rank)
    memories = [[np.zeros(n) for n in sizes_of(tensors)] for _ in range(comm.size)]
    positions = [np.zeros(n) for n in sizes_of(tensors)]
    for step in range(steps):
        gradients = ballots.draw(tensors, random)
        everyones = ballots.gathered(comm, gradients)
        updates = [
            [remember(m, g) for m, g in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(memories, everyones, strict=True)
        ]
        memories = [[kept for _, kept in mine] for mine in updates]
        decisions, ties = ballots.vote(
            [[sent for sent, _ in mine] for mine in updates], sizes_of(tensors), step, seed=11
        )
        give(tensors, gradients)
        optimizer.step()
        assert grads_of(tensors) == lists(decisions), f"step {step}"
        assert optimizer.report.ties == ties
        positions = [x - 0.25 * decision for x, decision in zip(positions, decisions, strict=True)]
        assert [ballots.flat(t).tolist() for t in tensors] == [x.tolist() for x in positions]


def test_mean(comm: MPI.Comm) -> None:
    """The wrapped optimizer sees the mean gradient, so its own momentum is ordinary momentum SGD."""
    (tensor,) = tensors = ballots.parameters((40,), dtypes=[torch.float64])
    optimizer = Wrapped(torch.optim.SGD(tensors, lr=0.1, momentum=0.9), method=mpisign.mean())
    random = ballots.generator(comm.rank)
    position, velocity = np.zeros(40), np.zeros(40)
    for _ in range(5):
        tensor.grad = torch.randn(40, generator=random, dtype=torch.float64)
        velocity = 0.9 * velocity + oracle.mean([g for (g,) in ballots.gathered(comm, [tensor.grad])])
        position -= 0.1 * velocity
        optimizer.step()
    np.testing.assert_allclose(tensor.detach().numpy(), position, rtol=1e-12)
    with pytest.raises(mpisign.MpisignError, match="casts no votes"):
        optimizer.report.agreement()


# ------------------------------------------------------------------------------------------- who does not vote


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_parameter_without_a_gradient_here_is_decided_by_the_others(comm: MPI.Comm, exchange: str) -> None:
    """Rank r lacks parameter r's gradient, everybody lacks the last one's."""
    tensors = ballots.parameters(*((40 + i,) for i in range(comm.size + 1)))
    optimizer = wrap(tensors, exchange=exchange)
    gradients: list[torch.Tensor | None] = list(ballots.draw(tensors, ballots.generator(comm.rank)))
    gradients[comm.rank] = gradients[-1] = None
    decisions, ties = ballots.vote(ballots.gathered(comm, gradients), sizes_of(tensors), 0)
    give(tensors, gradients)
    optimizer.step()
    assert decisions[-1] is None
    assert (decisions[0] is None) == (comm.size == 1)
    assert grads_of(tensors) == lists(decisions)
    assert optimizer.report.ties == ties
    assert not tensors[-1].any()
    if comm.size > 1:
        assert optimizer.report.voters == tuple(range(comm.size))
        assert not optimizer.report.skipped


def test_no_gradient_anywhere_skips_the_step(comm: MPI.Comm) -> None:
    tensors = [torch.nn.Parameter(torch.ones(5))]
    optimizer = Wrapped(torch.optim.SGD(tensors, lr=0.1, weight_decay=0.1))
    optimizer.step()
    assert optimizer.report.skipped
    assert optimizer.report.voters == ()
    assert optimizer.report.abstentions == dict.fromkeys(range(comm.size), "no gradient")
    assert tensors[0].tolist() == [1.0] * 5


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "method", [mpisign.signsgd(), mpisign.signum(0.5), mpisign.lion(0.5, 0.75), mpisign.mean()], ids=attrgetter("name")
)
def test_a_rank_with_a_non_finite_gradient_abstains(comm: MPI.Comm, method: mpisign.Method, bad: float) -> None:
    """From the whole step, although its first buckets were on their way; the others decide as if it were not there."""
    sick = comm.size - 1
    tensors = ballots.parameters(*SHAPES)
    healthy = ballots.parameters(*SHAPES)
    optimizer = wrap(tensors, method=method, zeros="positive", ties="positive")
    gradients = ballots.draw(tensors, ballots.generator(comm.rank))
    give(tensors, gradients)
    if comm.rank == sick:
        tensors[0].grad[0, 0] = bad  # parameter 0 is sent last
    optimizer.step()
    report = optimizer.report
    assert report.voters == tuple(range(sick))
    assert report.abstentions == {sick: "non-finite gradient"}
    assert report.skipped == (comm.size == 1)
    assert_equal_on_all_ranks(comm, tensors)

    others = comm.Split(int(comm.rank == sick))
    mpisign.shutdown()
    mpisign.init(others)
    if comm.rank != sick:
        alone = wrap(healthy, method=method, zeros="positive", ties="positive")
        give(healthy, gradients)
        alone.step()
        assert snapshot(tensors) == snapshot(healthy)
    else:
        assert not any(t.any() for t in tensors) or comm.size > 1
    mpisign.shutdown()
    others.Free()


@pytest.mark.parametrize("method", [mpisign.signum(0.5), mpisign.lion(0.5, 0.75)], ids=attrgetter("name"))
@pytest.mark.parametrize("dtype", ballots.DTYPES, ids=str)
def test_a_non_finite_gradient_does_not_poison_the_memory(
    comm: MPI.Comm, method: mpisign.Method, dtype: torch.dtype
) -> None:
    sick = comm.size - 1
    (tensor,) = tensors = ballots.parameters((40,), dtypes=[dtype])
    optimizer = wrap(tensors, method=method)
    for step in range(3):
        tensor.grad = torch.full_like(tensor, -2.0)
        if step == 1 and comm.rank == sick:
            tensor.grad[5] = NAN
        optimizer.step()
        assert optimizer.report.voters == tuple(r for r in range(comm.size) if step != 1 or r != sick)
    memory = optimizer.state_dict()["mpisign"]["memory"][0]["momentum"]
    assert memory.isfinite().all()
    assert (memory < 0).all()
    assert tensor.tolist() == [2.0 if comm.size == 1 else 3.0] * 40


def test_when_all_ranks_are_non_finite_no_rank_steps(comm: MPI.Comm) -> None:
    tensor = torch.nn.Parameter(torch.ones(40))
    optimizer = Wrapped(torch.optim.SGD([tensor], lr=0.1, weight_decay=0.1, momentum=0.9))
    tensor.grad = torch.full((40,), NAN)
    optimizer.step()
    assert optimizer.report.skipped
    assert optimizer.report.abstentions == dict.fromkeys(range(comm.size), "non-finite gradient")
    assert tensor.tolist() == [1.0] * 40
    assert not optimizer.state
    tensor.grad = torch.ones(40)
    optimizer.step()
    assert not optimizer.report.skipped
    assert (tensor < 1).all()


@pytest.mark.parametrize(("zeros", "moves"), [("abstain", -1.0), ("positive", 1.0)])
def test_silent_coordinates(comm: MPI.Comm, zeros: str, moves: float) -> None:
    """Rank 0 says -1 and all others say nothing: who is heard depends on what a zero votes."""
    (tensor,) = tensors = ballots.parameters((50,))
    optimizer = wrap(tensors, zeros=zeros, ties="positive")
    tensor.grad = torch.full((50,), -1.0 if comm.rank == 0 else 0.0)
    optimizer.synchronize()
    assert tensor.grad.tolist() == [-1.0 if comm.size == 1 else moves] * 50


def test_a_coordinate_on_which_all_are_silent_stays(comm: MPI.Comm) -> None:
    (tensor,) = tensors = ballots.parameters((50,))
    optimizer = wrap(tensors, zeros="abstain", ties="positive")
    tensor.grad = torch.zeros(50)
    tensor.grad[::2] = -0.0
    optimizer.synchronize()
    assert tensor.grad.tolist() == [0.0] * 50
    assert optimizer.report.ties == 0


# ------------------------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("unscale_first", [False, True])
def test_a_rank_whose_scaler_found_inf_abstains(comm: MPI.Comm, unscale_first: bool) -> None:
    sick = comm.size - 1
    tensor = torch.nn.Parameter(torch.zeros(40))
    optimizer = wrap([tensor], method=mpisign.signum(0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        optimizer.zero_grad()
        factor = INF if step == 1 and comm.rank == sick else -2.0
        scaler.scale((tensor * factor).sum()).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            assert optimizer.report.abstentions == {sick: "inf found by GradScaler"}
            assert optimizer.report.voters == tuple(range(sick))
        else:
            assert optimizer.report.abstentions == {}
    assert scaler.get_scale() == (512.0 if comm.rank == sick else 1024.0)
    assert tensor.tolist() == [2.0 if comm.size == 1 else 3.0] * 40
    memory = optimizer.state_dict()["mpisign"]["memory"][0]["momentum"]
    # Unscaled, and an average of as many gradients of -2 as this rank has voted with.
    assert memory.tolist() == [-1.5 if comm.rank == sick else -1.75] * 40


def test_a_scaled_gradient_votes_with_its_sign_even_where_unscaling_underflows(comm: MPI.Comm) -> None:
    """Small gradients are what the scaler is for: 2^-10 / 2^16 is no fp16 number, and still negative."""
    tensor = torch.nn.Parameter(torch.zeros(64, dtype=torch.float16))
    optimizer = wrap([tensor])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.zeros(()))  # from here on it has a scale
    tensor.grad = torch.full_like(tensor, -(2.0**-10))
    scaler.step(optimizer)
    assert tensor.tolist() == [1.0] * 64


def test_scaled_gradients_must_be_unscaled_before_they_are_synchronized_by_hand(comm: MPI.Comm) -> None:
    """Else the mean, and every memory, would be of gradients 1024 times too large."""
    tensor = torch.nn.Parameter(torch.zeros(40))
    optimizer = wrap([tensor], method=mpisign.mean())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(-tensor.sum()).backward()
    optimizer.synchronize()
    with optimizer.skip_synchronize(), pytest.raises(mpisign.SynchronizationError, match="unscale_"):
        scaler.step(optimizer)
    assert not tensor.any()


@pytest.mark.mpi(min_size=2)
def test_a_rank_without_a_gradient_under_a_scaler(comm: MPI.Comm) -> None:
    (tensor,) = tensors = ballots.parameters((40,), dtypes=[torch.float32])
    optimizer = wrap(tensors)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = scaler.scale(-tensor.sum())
    if comm.rank != 0:
        loss.backward()
    scaler.step(optimizer)
    assert optimizer.report.abstentions == {0: "no gradient"}
    assert tensor.tolist() == [1.0] * 40


# ------------------------------------------------------------------------------------------- join


@pytest.mark.parametrize("method", [mpisign.signum(0.5), mpisign.mean()], ids=attrgetter("name"))
def test_join_with_uneven_batches(comm: MPI.Comm, method: mpisign.Method) -> None:
    """Rank r has 2 + r batches: the last rank ends alone, and the others get what it then has."""
    tensors = ballots.parameters(*SHAPES)
    sgd = torch.optim.SGD(tensors, lr=0.25, momentum=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, step_size=2, gamma=0.5)
    optimizer = Wrapped(sgd, ballots.named(tensors), method=method)
    last = comm.size - 1
    random = ballots.generator(comm.rank)
    for step in range(2 + comm.rank):
        give(tensors, ballots.draw(tensors, random))
        optimizer.step()
        schedule.step()
        joined = [r for r in range(comm.size) if 2 + r <= step]
        assert optimizer.report.abstentions == dict.fromkeys(joined, "joined")
    assert optimizer.join() == last
    assert_equal_on_all_ranks(comm, tensors)
    assert_equal_on_all_ranks(comm, [optimizer.state[t]["momentum_buffer"] for t in tensors])
    assert {group["lr"] for group in optimizer.param_groups} == set(comm.allgather(sgd.param_groups[0]["lr"]))
    assert all(t.any() for t in tensors if t.numel() > 1)

    give(tensors, ballots.draw(tensors, random))  # and the next epoch begins in step
    optimizer.step()
    assert optimizer.report.step == 2 + last
    assert optimizer.report.abstentions == {}
    assert_equal_on_all_ranks(comm, tensors)


def test_the_last_rank_alone_decides_the_steps_it_makes_alone(comm: MPI.Comm) -> None:
    (tensor,) = tensors = ballots.parameters((40,))
    optimizer = wrap(tensors)
    mine = 1.0 if comm.rank == comm.size - 1 else -1.0
    for _ in range(1 if mine < 0 else 4):
        tensor.grad = torch.full((40,), mine)
        optimizer.step()
    optimizer.join()
    together = {1: -1.0, 2: None}.get(comm.size, 1.0)  # a tie of two is the coin's
    if together is not None:
        assert tensor.tolist() == [together - 3.0] * 40
    else:
        assert set(tensor.tolist()) == {1.0 - 3.0, -1.0 - 3.0}


def test_those_who_join_at_the_same_time_keep_what_they_have(comm: MPI.Comm) -> None:
    (tensor,) = tensors = ballots.parameters((40,))
    optimizer = wrap(tensors)
    tensor.grad = torch.ones(40)
    optimizer.step()
    assert optimizer.join() == 0
    assert optimizer.join() == 0
    assert tensor.tolist() == [-1.0] * 40


# ------------------------------------------------------------------------------------------- states of others


@pytest.mark.mpi(min_size=2)
def test_a_state_of_a_job_of_another_size_is_refused(comm: MPI.Comm) -> None:
    (tensor,) = tensors = ballots.parameters((4,))
    optimizer = wrap(tensors, method=mpisign.signum())
    tensor.grad = torch.ones(4)
    optimizer.step()
    state = optimizer.state_dict()
    alone = comm.Split(comm.rank)
    mpisign.shutdown()
    mpisign.init(alone)
    with pytest.raises(
        mpisign.CheckpointError, match=rf"rank 0: .*{comm.size} ranks and this one has 1, .*start with -n"
    ):
        optimizer.load_state_dict(state)
    mpisign.shutdown()
    alone.Free()


@pytest.mark.mpi(min_size=2)
def test_a_state_of_another_rank_loads_with_a_fresh_memory(comm: MPI.Comm) -> None:
    (tensor,) = tensors = ballots.parameters((4,))
    optimizer = wrap(tensors, method=mpisign.signum())
    tensor.grad = torch.ones(4)
    optimizer.step()
    neighbour = comm.allgather(optimizer.state_dict())[comm.rank - 1]
    with pytest.warns(
        UserWarning, match=f"rank {comm.rank}: .*starts fresh.*state of rank {neighbour['mpisign']['rank']}"
    ):
        optimizer.load_state_dict(neighbour)
    assert optimizer.state_dict()["mpisign"]["memory"] == {}


# ------------------------------------------------------------------------------------------- ranks that differ


def frozen(tensors: list[torch.nn.Parameter]) -> dict[str, Any]:
    tensors[1].requires_grad_(False)
    return {}


def reshaped(tensors: list[torch.nn.Parameter]) -> dict[str, Any]:
    tensors[1] = torch.nn.Parameter(torch.zeros(11, 3))
    return {}


def retyped(tensors: list[torch.nn.Parameter]) -> dict[str, Any]:
    tensors[1] = torch.nn.Parameter(torch.zeros(33, dtype=torch.float16))
    return {}


def longer(tensors: list[torch.nn.Parameter]) -> dict[str, Any]:
    tensors.append(torch.nn.Parameter(torch.zeros(3)))
    return {}


def option(**options: Any) -> Callable[[list[torch.nn.Parameter]], dict[str, Any]]:
    return lambda tensors: options


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(frozen, "'p1'", id="frozen"),
        pytest.param(reshaped, r"'p1' \(11, 3\)", id="shape"),
        pytest.param(retyped, r"'p1' \(33,\) float16", id="dtype"),
        pytest.param(longer, "'p6'", id="one-parameter-more"),
        pytest.param(option(method=mpisign.signum(0.8)), r"signum .*0\.8", id="method"),
        pytest.param(option(zeros="positive"), "zeros='positive'", id="zeros"),
        pytest.param(option(ties="zero"), "ties='zero'", id="ties"),
        pytest.param(option(seed=7), "seed=7", id="seed"),
        pytest.param(option(exchange="two_phase"), "exchange 'two_phase'", id="exchange"),
        pytest.param(option(bucket_cap_mb=4e-6), "bucket", id="bucket-cap"),
    ],
)
def test_another_layout_or_option_on_one_rank_is_an_error_on_all(
    comm: MPI.Comm, change: Callable[[list[torch.nn.Parameter]], dict[str, Any]], named: str
) -> None:
    odd = comm.size - 1
    tensors = ballots.parameters(*SHAPES, dtypes=[torch.float32])
    options = change(tensors) if comm.rank == odd else {}
    optimizer = wrap(tensors, **options)
    drawn = ballots.draw(tensors, ballots.generator(comm.rank))
    give(tensors, [g if t.requires_grad else None for t, g in zip(tensors, drawn, strict=True)])
    before = snapshot(tensors), grads_of(tensors)
    with pytest.raises(mpisign.ConsistencyError) as error:
        optimizer.step()
    message = str(error.value)
    assert f"ranks [{odd}]" in message
    assert f"this is rank {comm.rank}" in message
    assert re.search(named, message)
    assert f" on rank {odd}" in message
    assert (snapshot(tensors), grads_of(tensors)) == before


@pytest.mark.mpi(min_size=2)
def test_ranks_a_step_apart_are_an_error_on_all(comm: MPI.Comm) -> None:
    (tensor,) = tensors = ballots.parameters((4,))
    odd = comm.size - 1
    optimizer = wrap(tensors)
    for _ in range(2):
        tensor.grad = torch.ones(4)
        optimizer.step()
    state = optimizer.state_dict()
    state["mpisign"]["step"] -= comm.rank == odd
    optimizer.load_state_dict(state)
    with pytest.raises(
        mpisign.ConsistencyError, match=rf"step: rank {odd} at 1, the others at 2 \(this is rank {comm.rank}\)"
    ):
        optimizer.step()
    assert tensor.tolist() == [-2.0] * 4

    mpisign.broadcast_optimizer_state(optimizer)  # brings the numbers together again
    tensor.grad = torch.ones(4)
    optimizer.step()
    assert tensor.tolist() == [-3.0] * 4


def test_a_group_added_on_all_ranks_takes_part(comm: MPI.Comm) -> None:
    old, new = tensors = ballots.parameters((40,), (70,), dtypes=[torch.float32])
    optimizer = wrap([old], method=mpisign.signum(0.5))
    old.grad = torch.full((40,), 4.0)
    optimizer.step()
    optimizer.add_param_group({"params": [new], "lr": 0.5})
    # Old memory 2, so that -1 does not turn it; new memory 0.
    give(tensors, [torch.full((40,), -1.0), torch.full((70,), -1.0)])
    optimizer.step()
    assert old.tolist() == [-2.0] * 40
    assert new.tolist() == [0.5] * 70


@pytest.mark.mpi(min_size=2)
def test_a_group_added_on_one_rank_is_an_error_on_all(comm: MPI.Comm) -> None:
    old, new = ballots.parameters((40,), (70,), dtypes=[torch.float32])
    optimizer = wrap([old])
    if comm.rank == 0:
        optimizer.add_param_group({"params": [new]})
    old.grad = torch.ones(40)
    with pytest.raises(mpisign.ConsistencyError, match=r"'group1\.param0'"):
        optimizer.step()


# ------------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    ("zeros", "ties"), [("coin", "coin"), ("abstain", "zero"), ("abstain", "coin"), ("coin", "zero")]
)
def test_agreement_is_the_share_of_each_ballot_that_won(comm: MPI.Comm, zeros: str, ties: str, exchange: str) -> None:
    tensors = ballots.parameters(*SHAPES)
    sizes = sizes_of(tensors)
    optimizer = wrap(tensors, zeros=zeros, ties=ties, exchange=exchange)
    silent = comm.size - 1 if comm.size > 2 else None
    gradients = ballots.draw(tensors, ballots.generator(comm.rank))
    if comm.rank == 0:
        gradients[1] = None
    give(tensors, gradients)
    if comm.rank == silent:
        tensors[0].grad[0, 0] = NAN
    everyones = ballots.gathered(comm, gradients)
    if silent is not None:
        everyones[silent] = [None] * len(tensors)
    decisions, _ = ballots.vote(everyones, sizes, 0, zeros=zeros, ties=ties)
    optimizer.step()

    expected = []
    for rank, updates in enumerate(everyones):
        agreed = spoken = 0
        for update, decision, n, start in zip(updates, decisions, sizes, oracle.first_words(sizes), strict=True):
            if update is not None:
                coins = ballots.coins(0, 0, oracle.zeros_stream(rank), start, n)
                ballot = oracle.ballot(update, zeros, coins)
                spoken += np.count_nonzero(ballot * decision)
                agreed += np.count_nonzero(ballot * decision == 1)
        expected.append(agreed / spoken if spoken else NAN)
    shares = optimizer.report.agreement()
    assert shares == pytest.approx(expected, nan_ok=True)
    assert len(set(map(str, comm.allgather(shares)))) == 1

    earlier = optimizer.report
    give(tensors, gradients)
    optimizer.step()
    with pytest.raises(mpisign.MpisignError, match="step 0 are gone"):
        earlier.agreement()


def test_the_report_is_the_same_on_every_rank(comm: MPI.Comm) -> None:
    tensors = ballots.parameters(*SHAPES)
    optimizer = wrap(tensors)
    give(tensors, ballots.draw(tensors, ballots.generator(comm.rank)))
    optimizer.step()
    reports = comm.allgather(dataclasses.replace(optimizer.report, seconds={}, _agreement=None))
    assert all(report == reports[0] for report in reports)
    assert set(optimizer.report.seconds) == {"pack", "exchange", "decide", "unpack"}
    assert all(seconds > 0 for seconds in optimizer.report.seconds.values())


@pytest.mark.mpi(min_size=2)
def test_two_optimizers_alike_are_not_mistaken_for_each_other(comm: MPI.Comm) -> None:
    """Ranks that step them in another order would else vote on each other's parameters."""
    tensors = [torch.nn.Parameter(torch.zeros(40)) for _ in range(2)]
    optimizers = [wrap([tensor]) for tensor in tensors]
    for tensor in tensors:
        tensor.grad = torch.ones(40)
    with pytest.raises(mpisign.ConsistencyError, match=r"optimizer \d+ of the job"):
        optimizers[comm.rank == 0].step()
    assert all(tensor.tolist() == [0.0] * 40 for tensor in tensors)


def test_a_state_saved_after_shutdown_is_still_this_ranks(comm: MPI.Comm) -> None:
    tensor = torch.nn.Parameter(torch.zeros(5))
    optimizer = wrap([tensor])
    tensor.grad = torch.ones(5)
    optimizer.step()
    mpisign.shutdown()
    saved = optimizer.state_dict()["mpisign"]
    assert (saved["rank"], saved["size"]) == (comm.rank, comm.size)
