"""mpisign.methods on real ranks: what every method promises to any number of them, in closed form."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import mpisign
from mpisign import Method

from . import ballots

if TYPE_CHECKING:
    from mpi4py import MPI

    from .ballots import Floats

pytestmark = pytest.mark.mpi

SHAPES = ((20, 10), (33,), (), (0,), (7, 3), (500,))
EPS = 1e-6  # scales travel as fp32, but what they lose is kept, so that fp64 identities hold far below this
EXCHANGES = ("allgather", "two_phase")

Make = Callable[[int], Method]

METHODS: dict[str, Make] = {
    "noisy_signsgd": lambda size: mpisign.noisy_signsgd(0.5),
    "noisy_signsgd relative": lambda size: mpisign.noisy_signsgd(0.5, relative=True),
    "sto_sign": lambda size: mpisign.sto_sign(4.0),
    "sto_sign maximum": lambda size: mpisign.sto_sign(),
    "dp_sign": lambda size: mpisign.dp_sign(1.0, epsilon=0.5, delta=1e-5, private=False),
    "ternary_vote": lambda size: mpisign.ternary_vote(4.0, 5.0),
    "sparsign": lambda size: mpisign.sparsign(0.5),
    "lion mean": lambda size: mpisign.lion(vote=False),
    "noisy_median": lambda size: mpisign.noisy_median(0.5),
    "ef_signsgd": lambda size: mpisign.ef_signsgd(),
    "double_squeeze": lambda size: mpisign.double_squeeze(),
    "one_bit_adam": lambda size: mpisign.one_bit_adam(freeze_step=1),
    "one_bit_adam late": lambda size: mpisign.one_bit_adam(freeze_step=3),
    "ef21": lambda size: mpisign.ef21(0.1),
    "ef21 signs": lambda size: mpisign.ef21(None),
    "ef21_sgdm": lambda size: mpisign.ef21_sgdm(ratio=0.1),
    "ef21_w": lambda size: mpisign.ef21_w(range(1, size + 1), ratio=0.1),
    "top_k": lambda size: mpisign.top_k(0.1),
    "top_k sample": lambda size: mpisign.top_k(0.05, sample=0.5),
    "dgc": lambda size: mpisign.dgc(0.05, clip=1.0, warmup_epochs=1),
    "dgc heavy ball": lambda size: mpisign.dgc(0.05, nesterov=False, warmup_epochs=0, masking=False),
}
each = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


def model(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return ballots.parameters(*SHAPES, dtypes=[dtype])


def wrap(tensors: Sequence[torch.nn.Parameter], method: Method, lr: float = 0.1, **options: Any) -> Any:
    sgd = torch.optim.SGD(tensors, lr=lr)
    optimizer = mpisign.DistributedSignOptimizer(sgd, ballots.named(tensors), method=method, **options)
    optimizer.set_epoch(0)
    return optimizer


def drawn(tensors: Sequence[torch.Tensor], *seeds: int) -> list[torch.Tensor]:
    """Gradients without zeros, of different sizes on different ranks."""
    random = ballots.generator(*seeds)
    return [torch.randn(t.shape, generator=random, dtype=torch.float64).mul(1 + seeds[-1]).to(t.dtype) for t in tensors]


def step(optimizer: Any, tensors: Sequence[torch.nn.Parameter], gradients: Sequence[torch.Tensor]) -> None:
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient.clone()
    optimizer.step()


def memories(optimizer: Any, field: str) -> list[Floats]:
    """One field of this rank's memory, by parameter."""
    memory = optimizer.state_dict()["mpisign"]["memory"]
    return [ballots.flat(memory[place][field]) for place in sorted(memory)]


def mean_of_ranks(comm: MPI.Comm, values: Sequence[Floats]) -> list[Floats]:
    return [np.mean(ranks, axis=0) for ranks in zip(*comm.allgather(list(values)), strict=True)]


def servers_errors(optimizer: Any, tensors: Sequence[torch.Tensor], comm: MPI.Comm) -> list[Floats]:
    """What the deciding sides keep, put together from the ranks' pieces."""
    whole = [np.zeros(t.numel()) for t in tensors]
    for pieces in comm.allgather(optimizer.state_dict()["mpisign"]["pieces"]):
        for place, parts in pieces.items():
            for lo, part in parts.items():
                whole[place][lo : lo + part.numel()] = ballots.flat(part)
    return whole


def assert_close(ours: Sequence[Floats], expected: Sequence[Floats], tolerance: float = EPS) -> None:
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def assert_same_everywhere(comm: MPI.Comm, tensors: Sequence[torch.Tensor]) -> None:
    mine = [ballots.flat(t) for t in tensors]
    for place, theirs in enumerate(zip(*comm.allgather(mine), strict=True)):
        assert all(np.array_equal(mine[place], one) for one in theirs), place


# ------------------------------------------------------------------------------------------- every method


@each
def test_replicas_stay_the_same(comm: MPI.Comm, make: Make) -> None:
    tensors = model()
    optimizer = wrap(tensors, make(comm.size))
    for at in range(4):
        optimizer.set_epoch(at // 2)
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
    assert_same_everywhere(comm, tensors)
    assert all(torch.isfinite(t).all() for t in tensors)
    assert any((t != 0).any() for t in tensors)


@each
def test_resuming_is_exact(comm: MPI.Comm, make: Make) -> None:
    """Also as a schedule changes the rate at every step, which what is owed has to follow."""
    tensors = model()
    optimizer = wrap(tensors, make(comm.size))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for at in range(2):
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        schedule.step()
    saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    resumed = copy.deepcopy(tensors)
    other = wrap(resumed, make(comm.size))
    others = torch.optim.lr_scheduler.ExponentialLR(other, 0.7)
    other.load_state_dict(saved[0])
    others.load_state_dict(saved[1])
    for at in range(2, 5):
        for theirs, whose, rate in ((tensors, optimizer, schedule), (resumed, other, others)):
            step(whose, theirs, drawn(tensors, at, comm.rank))
            rate.step()
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"] == pytest.approx(0.1 * 0.7**5)
    assert all(torch.equal(a, b) for a, b in zip(tensors, resumed, strict=True))
    for part in ("memory", "pieces"):
        ours, theirs = (whose.state_dict()["mpisign"][part] for whose in (optimizer, other))
        assert ours.keys() == theirs.keys()
        for place, fields in ours.items():
            assert all(torch.equal(value, theirs[place][key]) for key, value in fields.items()), part


@each
def test_a_rank_with_a_nan_abstains_and_its_memory_is_left_alone(comm: MPI.Comm, make: Make) -> None:
    tensors = model()
    optimizer = wrap(tensors, make(comm.size))
    step(optimizer, tensors, drawn(tensors, 0, comm.rank))
    before = copy.deepcopy(optimizer.state_dict()["mpisign"]["memory"])
    # What follows the decision is the same on all ranks; a running average keeps what is finite, as signum's does.
    common = {"average", "momentum", "variance"} if optimizer.method.memory.running else {"momentum"}
    gradients = drawn(tensors, 1, comm.rank)
    broken = comm.rank == comm.size - 1
    if broken:
        gradients[0].view(-1)[3] = torch.nan
    step(optimizer, tensors, gradients)
    assert optimizer.report.skipped == (comm.size == 1)
    assert_same_everywhere(comm, tensors)
    assert all(torch.isfinite(t).all() for t in tensors)
    if broken:
        for place, fields in optimizer.state_dict()["mpisign"]["memory"].items():
            for key in fields.keys() - common:
                assert torch.equal(fields[key], before[place][key]), key


# -------------------------------------------------------------------------------------------- identities


def scaled_sign(p: Floats) -> Floats:
    return float(np.float32(np.abs(p).mean())) * np.sign(p) if p.size else p


def largest(p: Floats, ratio: float = 0.1) -> Floats:
    kept = np.argsort(-np.abs(p))[: max(1, round(ratio * p.size))]
    sent = np.zeros_like(p)
    sent[kept] = p[kept].astype(np.float32)
    return sent


@pytest.mark.parametrize(
    ("method", "compress"),
    [(mpisign.ef_signsgd(), scaled_sign), (mpisign.top_k(0.1), largest), (mpisign.top_k(0.1, sample=0.3), largest)],
    ids=["ef_signsgd", "top_k", "top_k sample"],
)
def test_the_mean_of_compressed_messages(comm: MPI.Comm, method: Method, compress: Callable[[Floats], Floats]) -> None:
    tensors = model(torch.float64)
    optimizer = wrap(tensors, method)
    errors = [[np.zeros(t.numel()) for t in tensors] for _ in range(comm.size)]
    for at in range(3):
        everyones = ballots.gathered(comm, drawn(tensors, at, comm.rank))
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        for place, tensor in enumerate(tensors):
            sent = []
            for rank in range(comm.size):
                p = everyones[rank][place] + errors[rank][place]
                sent.append(compress(p))
                errors[rank][place] = p - sent[-1]
            assert_close([ballots.flat(tensor.grad)], [np.mean(sent, axis=0)])
    assert_close(memories(optimizer, "error"), errors[comm.rank])


@pytest.mark.parametrize("lr", [0.1, None], ids=["constant rate", "falling rate"])
@pytest.mark.parametrize(
    ("method", "exchange"),
    [
        (mpisign.ef_signsgd(), "allgather"),
        (mpisign.top_k(0.1), "auto"),
        (mpisign.double_squeeze(), "allgather"),
        (mpisign.double_squeeze(), "two_phase"),
        (mpisign.double_squeeze(), "auto"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_nothing_is_lost_with_error_feedback(comm: MPI.Comm, method: Method, exchange: str, lr: float | None) -> None:
    """x_t - lr (mean of the ranks' errors + the servers' error) = x_0 - the sum of lr * mean gradient."""
    tensors = model(torch.float64)
    # Many small buckets, so that shards and pieces of all sizes come up.
    for cap in (1.0, 16 / (1 << 20)):
        optimizer = wrap(tensors, method, exchange=exchange, bucket_cap_mb=cap)
        expected = [ballots.flat(t).copy() for t in tensors]
        for at in range(5):
            rate = lr or 0.1 / (1 + at)
            optimizer.param_groups[0]["lr"] = rate
            gradients = drawn(tensors, at, comm.rank)
            mean = mean_of_ranks(comm, [ballots.flat(g) for g in gradients])
            step(optimizer, tensors, gradients)
            expected = [x - rate * g for x, g in zip(expected, mean, strict=True)]
        owed = mean_of_ranks(comm, memories(optimizer, "error"))
        server = servers_errors(optimizer, tensors, comm)
        assert any(e.any() for e in server) == (method.rule.reencodes and comm.size > 1)  # signs of signs lose nothing
        parts = zip(tensors, owed, server, strict=True)
        assert_close([ballots.flat(x) - rate * (e + s) for x, e, s in parts], expected, 1e-9)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_what_a_server_owes_follows_the_rate_across_a_resume(comm: MPI.Comm, exchange: str) -> None:
    tensors = model(torch.float64)
    expected = [np.zeros(t.numel()) for t in tensors]
    state = None
    for at, rate in enumerate((0.1, 0.02)):
        optimizer = wrap(tensors, mpisign.double_squeeze(), exchange=exchange)
        if state is not None:
            optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = rate
        gradients = drawn(tensors, at, comm.rank)
        mean = mean_of_ranks(comm, [ballots.flat(g) for g in gradients])
        step(optimizer, tensors, gradients)
        expected = [x - rate * g for x, g in zip(expected, mean, strict=True)]
        state = optimizer.state_dict()
    owed = mean_of_ranks(comm, memories(optimizer, "error"))
    parts = zip(tensors, owed, servers_errors(optimizer, tensors, comm), strict=True)
    assert_close([ballots.flat(x) - rate * (e + s) for x, e, s in parts], expected, 1e-9)


@pytest.mark.parametrize("make", [METHODS[name] for name in ("ef21", "ef21 signs", "ef21_sgdm", "ef21_w")])
def test_the_average_is_the_mean_of_the_estimates(comm: MPI.Comm, make: Make) -> None:
    tensors = model(torch.float64)
    method = make(comm.size)
    shares = method.rule.shares or [1 / comm.size] * comm.size
    optimizer = wrap(tensors, method)
    for at in range(4):
        gradients = drawn(tensors, at, comm.rank)
        if at == 2 and comm.rank == comm.size - 1:
            gradients[0].view(-1)[3] = torch.inf  # whoever abstains leaves its estimate, and its part of the mean
        step(optimizer, tensors, gradients)
        average = [comm.size * shares[comm.rank] * e for e in memories(optimizer, "estimate")]
        assert_close(mean_of_ranks(comm, average), memories(optimizer, "average"), 1e-9)
        if at != 2:
            assert_close([ballots.flat(t.grad) for t in tensors], memories(optimizer, "average"), 1e-9)


def test_equal_weights_or_not_ef21_w_is_ef21_with_positively_homogeneous_codecs(comm: MPI.Comm) -> None:
    plain, weighted = model(torch.float64), model(torch.float64)
    optimizers = [wrap(plain, mpisign.ef21(0.1)), wrap(weighted, METHODS["ef21_w"](comm.size))]
    for at in range(4):
        for optimizer, tensors in zip(optimizers, (plain, weighted), strict=True):
            step(optimizer, tensors, drawn(tensors, at, comm.rank))
    assert_close([ballots.flat(t) for t in plain], [ballots.flat(t) for t in weighted])


@pytest.mark.parametrize("nesterov", [True, False])
def test_dgc_sends_all_momentum_in_the_end(comm: MPI.Comm, nesterov: bool) -> None:
    """Without masking: what was applied, plus the mean of what is still held, is plain momentum SGD."""
    tensors = model(torch.float64)
    optimizer = wrap(tensors, mpisign.dgc(0.05, 0.9, nesterov, warmup_epochs=0, masking=False), lr=1.0)
    velocity = [np.zeros(t.numel()) for t in tensors]
    moved = [np.zeros(t.numel()) for t in tensors]
    for at in range(4):
        gradients = drawn(tensors, at, comm.rank)
        mean = mean_of_ranks(comm, [ballots.flat(g) for g in gradients])
        step(optimizer, tensors, gradients)
        for place, g in enumerate(mean):
            velocity[place] = 0.9 * (velocity[place] + g) if nesterov else 0.9 * velocity[place] + g
            moved[place] += velocity[place] + (g if nesterov else 0.0)
    held = mean_of_ranks(comm, memories(optimizer, "residual"))
    assert_close([e - ballots.flat(t) for t, e in zip(tensors, held, strict=True)], moved)


@pytest.mark.parametrize("freeze_step", [10**9, 2])
def test_one_bit_adam_is_adam_before_the_freeze(comm: MPI.Comm, freeze_step: int) -> None:
    tensors = model(torch.float64)
    optimizer = wrap(tensors, mpisign.one_bit_adam(freeze_step))
    x, m, v = ([np.zeros(t.numel()) for t in tensors] for _ in range(3))
    for at in range(4):
        gradients = drawn(tensors, at, comm.rank)
        mean = mean_of_ranks(comm, [ballots.flat(g) for g in gradients])
        step(optimizer, tensors, gradients)
        if at < freeze_step:
            for i, g in enumerate(mean):
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = 0.999 * v[i] + 0.001 * g**2
                x[i] = x[i] - 0.1 * m[i] / (np.sqrt(v[i]) + 1e-8)
            assert_close([ballots.flat(t) for t in tensors], x, 1e-9)
        assert_close(memories(optimizer, "variance"), v, 1e-12)  # which stays after the freeze


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zeros", ["abstain", "positive"])
def test_the_mean_of_signs_is_the_same_bits_by_either_exchange(comm: MPI.Comm, zeros: str, dtype: torch.dtype) -> None:
    """With zeros, a parameter that rank 0 has no gradient of, and in the last step a rank that abstains."""
    for exchange in EXCHANGES:
        tensors = model(dtype)
        optimizer = wrap(tensors, mpisign.lion(0.0, 0.0, vote=False), exchange=exchange, zeros=zeros)
        for at in range(3):
            everyones = [drawn(tensors, at, rank) for rank in range(comm.size)]
            for gradients in everyones:
                gradients[0][::3] = 0
            mine = everyones[comm.rank]
            absent = comm.size - 1 if at == 2 and comm.size > 1 else None
            if comm.rank == absent:
                mine[1][7] = torch.nan
            for tensor, gradient in zip(tensors, mine, strict=True):
                tensor.grad = gradient.clone()
            if comm.rank == 0:
                tensors[4].grad = None
            optimizer.step()
            for place, tensor in enumerate(tensors):
                voters = [rank for rank in range(comm.size) if rank != absent and (place, rank) != (4, 0)]
                if not voters:
                    assert tensor.grad is None
                    continue
                votes = [everyones[rank][place].double().sign() for rank in voters]
                if zeros == "positive":
                    votes = [vote + (vote == 0) for vote in votes]
                expected = torch.stack(votes).sum(0).to(torch.promote_types(dtype, torch.float32)) / len(voters)
                assert torch.equal(tensor.grad, expected.to(dtype)), (exchange, at, place)


# ---------------------------------------------------------------------------------------------- the price


@pytest.mark.parametrize(
    ("method", "items"),
    [
        (mpisign.sto_sign(4.0), lambda n: -(-n // 32)),
        (mpisign.ternary_vote(4.0, 5.0), lambda n: 2 * -(-n // 32)),
        (mpisign.sparsign(0.5), lambda n: 2 * -(-n // 32)),
        (mpisign.ef_signsgd(), lambda n: 1 + -(-n // 32)),
        (mpisign.double_squeeze(), lambda n: 1 + -(-n // 32)),
        (mpisign.top_k(0.1), lambda n: 2 * max(1, round(0.1 * n)) if n > 1 else n),
        (mpisign.ef21(0.1), lambda n: 2 * max(1, round(0.1 * n)) if n > 1 else n),
        (mpisign.one_bit_adam(9), lambda n: n),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_bytes_sent_are_the_formula(comm: MPI.Comm, method: Method, items: Callable[[int], int]) -> None:
    tensors = model()
    optimizer = wrap(tensors, method, exchange="allgather")
    step(optimizer, tensors, drawn(tensors, 0, comm.rank))
    sent = (comm.size - 1) * 4 * sum(items(t.numel()) for t in tensors)
    assert optimizer.report.bytes_sent - optimizer.report.header_bytes == sent


def test_both_ways_of_double_squeeze_cost_a_bit_a_coordinate(comm: MPI.Comm) -> None:
    (tensor,) = tensors = ballots.parameters((320 * comm.size,), dtypes=[torch.float32])
    optimizer = wrap(tensors, mpisign.double_squeeze(), exchange="two_phase")
    step(optimizer, tensors, drawn(tensors, 0, comm.rank))
    shard = 1 + tensor.numel() // 32 // comm.size  # a scale each
    assert optimizer.report.bytes_sent - optimizer.report.header_bytes == 2 * (comm.size - 1) * 4 * shard


@pytest.mark.parametrize("zeros", ["coin", "abstain"])
def test_a_mean_of_signs_comes_down_as_counts(comm: MPI.Comm, zeros: str) -> None:
    tensors = ballots.parameters((320 * comm.size,), dtypes=[torch.float32])
    optimizer = wrap(tensors, mpisign.lion(vote=False), exchange="two_phase", zeros=zeros)
    step(optimizer, tensors, drawn(tensors, 0, comm.rank))
    up = 2 if zeros == "abstain" else 1
    planes = up + math.ceil(math.log2(up * comm.size + 1))
    assert optimizer.report.bytes_sent - optimizer.report.header_bytes == (comm.size - 1) * planes * 320 // 8


def test_the_exact_maximum_costs_a_dense_reduction(comm: MPI.Comm) -> None:
    tensors = model()
    prices = []
    for method in (mpisign.sto_sign(4.0), mpisign.sto_sign()):
        optimizer = wrap(tensors, method)
        step(optimizer, tensors, drawn(tensors, 0, comm.rank))
        prices.append(optimizer.report.bytes_sent)
    elements = sum(t.numel() for t in tensors)
    assert prices[1] - prices[0] == 2 * (comm.size - 1) * 4 * elements // comm.size


# ------------------------------------------------------------------------------------------ randomness


def test_ranks_draw_their_own_noise_the_same_in_every_run(comm: MPI.Comm) -> None:
    votes = []
    for seed in (1, 1, 2):
        (tensor,) = tensors = ballots.parameters((1000,), dtypes=[torch.float32])
        optimizer = wrap(
            tensors, Method(mpisign.sparsign(0.5).memory, mpisign.mean().codec, mpisign.mean().rule), seed=seed
        )
        step(optimizer, tensors, [torch.ones(1000)])
        votes.append(ballots.flat(tensor.grad))
    assert np.array_equal(votes[0], votes[1])
    assert not np.array_equal(votes[0], votes[2])
    if comm.size > 1:
        assert len(np.unique(votes[0])) > 2, "all ranks spoke on the same coordinates"


# --------------------------------------------------------------------------------- data of different kinds


@pytest.mark.parametrize(
    ("method", "end"),
    [
        (mpisign.signsgd(), 2.0),
        (mpisign.median(0.0), 2.0),
        (mpisign.mean(), 13 / 3),
        (mpisign.ef_signsgd(), 13 / 3),
        (mpisign.double_squeeze(), 13 / 3),
        (mpisign.ef21(None), 13 / 3),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_votes_stop_at_the_median_and_means_at_the_mean(comm: MPI.Comm, method: Method, end: float) -> None:
    """f_m = |x - a_m|^2 / 2 with a = 1, 2, 10, and -2 a in the second coordinate."""
    if comm.size != 3:
        pytest.skip("three functions, three ranks")
    (x,) = tensors = ballots.parameters((2,), dtypes=[torch.float64])
    optimizer = wrap(tensors, method, lr=0.05)
    direction = torch.tensor([1.0, -2.0], dtype=torch.float64)
    for _ in range(120):
        step(optimizer, tensors, [x.detach() - (1.0, 2.0, 10.0)[comm.rank] * direction])
    np.testing.assert_allclose(ballots.flat(x), end * direction.numpy(), rtol=0, atol=0.5)  # a step or so


def test_top_1_needs_error_feedback(comm: MPI.Comm) -> None:
    """f_m = <a_m, x>^2 + |x|^2 / 4 from (1, 1, 1): without it x grows by 1 + 11 lr / 6 a step."""
    if comm.size != 3:
        pytest.skip("three functions, three ranks")
    a = torch.full((3,), 2.0, dtype=torch.float64)
    a[comm.rank] = -3.0
    lr, steps = 0.01, 20
    naive = Method(mpisign.mean().memory, mpisign.top_k(1 / 3).codec, mpisign.mean().rule)
    ends = []
    for method, at_most in ((naive, steps), (mpisign.top_k(1 / 3), 200), (mpisign.ef21(1 / 3), 200)):
        (x,) = tensors = ballots.parameters((3,), dtypes=[torch.float64])
        x.data.fill_(1.0)
        optimizer = wrap(tensors, method, lr=lr)
        for _ in range(at_most):
            step(optimizer, tensors, [2 * (a @ x.detach()) * a + x.detach() / 2])
        ends.append(float(x.detach().norm()))
    assert ends[0] == pytest.approx((1 + 11 * lr / 6) ** steps * 3**0.5, rel=1e-5)
    assert max(ends[1:]) < 0.5
